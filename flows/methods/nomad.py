"""NOMAD (Chen et al., 2024): the teacher learns to write conversations like the real ones; the student gets both, mixed.

The real examples are the reference set.
"""

from flows.methods.environment import Method, Proposal, Round
from tasks.nomad import check_steps, measure_norm_sim, mix_with_real, train_conversationalist, write_conversations
from tasks.students import train_student


def _propose(now: Round) -> Proposal:
    run, folder, label = now.run, now.folder, now.label
    teacher = train_conversationalist(run, folder / "teacher", f"{label}: teacher on conversations")
    count = run.experiment.training.examples
    # At least one is written, however near to 1 the share.
    real = min(round(count * run.experiment.nomad.real_share), count - 1, len(run.sources().reference))
    written = write_conversations(run, folder / "training", f"{label}: conversations", teacher, count - real)
    measure_norm_sim(run, folder / "norm-sim", f"{label}: nearness to real examples", written.examples)
    mixed = mix_with_real(run, f"{label}: real and synthetic", written.examples, real, folder / "examples.parquet")
    recipe, student = run.experiment.nomad.training, None
    if recipe is not None:
        student = train_student(run, folder / "student", f"{label}: student training", mixed, recipe, count, False)
    return Proposal(mixed, teacher, student)


NOMAD = Method(
    "nomad",
    "The teacher, trained on whole conversations of the reference set, writes more; the student learns from both.",
    _propose,
    check=check_steps,
)

"""NOMAD (Chen et al., 2024): the teacher learns to write conversations like the reference set; the student trains on both."""

from flows.methods.method import Method, Proposal, Round
from tasks.nomad import check_steps, measure_norm_sim, mix_with_real, train_nomad_teacher, write_conversations


def _propose(now: Round) -> Proposal:
    run, step = now.run, now.step
    teacher = train_nomad_teacher(step.at("teacher", "teacher training on conversations"))
    count = run.experiment.training.examples
    # The teacher writes at least one, for any share below 1.
    real = min(round(count * run.experiment.nomad.real_share), count - 1, len(run.sources().reference))
    written = write_conversations(step.at("training", "conversations"), teacher, count - real)
    measure_norm_sim(step.at("norm-sim", "similarity to real examples"), written.examples)
    mixed = mix_with_real(step, written.examples, real)
    training = run.experiment.nomad.training
    recipe = None if training is None else run.experiment.training.model_copy(update=dict(training))
    return Proposal(mixed, teacher, recipe=recipe)


NOMAD = Method(
    "nomad",
    "The teacher, trained on whole conversations of the reference set, writes more; the student learns from both.",
    _propose,
    check=check_steps,
)

"""The optimisation ablation of Table 2: the teacher learns which of its responses to an instruction help the student."""

from flows.methods.environment import Method, Proposal, Round
from flows.methods.tailoring import probe, write_training_set
from montessori_core.schema import EXAMPLES, read_table
from tasks.influence import collect_influence
from tasks.synthesis import answer_again
from tasks.teachers import collect_preferences, update_teacher


def _propose(now: Round) -> Proposal:
    run, teacher = now.run, now.run.first_teacher()
    probed = probe(run, 1, teacher, None, None)
    # As many influences as the other methods measure: several of each instruction, so fewer instructions.
    instructions = max(1, (probed.last - probed.first) // run.experiment.synthesis.samples_per_prompt)
    answered = answer_again(
        run,
        now.folder / "answers",
        f"{now.label}: several responses to an instruction",
        teacher,
        probed.synthesized.examples,
        probed.first,
        probed.first + instructions,
        draw="answers",
    )
    influence = collect_influence(
        run,
        now.folder / "influence",
        now.folder / "influence.parquet",
        f"{now.label}: influence of the responses",
        probed.student,
        answered,
        0,
        read_table(answered, EXAMPLES).num_rows,
        paired=True,
    )
    preferences = collect_preferences(run, now.folder, now.label, answered, influence)
    updated = update_teacher(
        run, now.folder / "teacher", f"{now.label}: teacher update", teacher, preferences, answered=answered
    )
    training = write_training_set(run, now.folder / "training", now.label, updated)
    return Proposal(training.examples, updated)


RESPONSE = Method("response", "DPO of the teacher on the local data influence of its responses.", _propose)

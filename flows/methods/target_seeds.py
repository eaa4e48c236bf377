"""Self-Instruct on the target: the instructions of the reference set are the demonstrations, in place of the seed pool's."""

from flows.methods.method import Method, Proposal, Round
from flows.methods.tailoring import write_training_set
from montessori_core.data.sources import check_single_turns
from tasks.run import Run
from tasks.synthesis import check_demonstrations


def _propose(now: Round) -> Proposal:
    teacher = now.run.initial_teacher()
    training = write_training_set(now.step, teacher, seed_pool=now.run.sources().reference)
    return Proposal(training.examples, teacher)


def _check(run: Run) -> None:
    """Check that the reference set has enough demonstrations for a prompt, all of them single instructions.

    Raises:
        UserError: it has not.
    """
    check_single_turns(run.sources().reference, "target_seeds")
    check_demonstrations("target_seeds: reference", run.sources().reference, run.experiment.synthesis)


TARGET_SEEDS = Method(
    "target_seeds",
    "The unmodified teacher is shown the instructions of the reference set in place of the seed pool's.",
    _propose,
    check=_check,
)

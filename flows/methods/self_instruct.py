"""Self-Instruct (Wang et al., 2023): the unmodified teacher, or a stronger one behind an API."""

from pathlib import Path

from flows.methods.environment import Method, Proposal, Round
from montessori_core.config import Endpoint
from tasks.run import Model, Run
from tasks.synthesis import Synthesized, synthesize


def imitate_seeds(
    run: Run, folder: Path, label: str, earlier: list[Path], teacher: Model | Endpoint | None = None
) -> Synthesized:
    """A training set from the first teacher, or another, asked as the tailored one is; it repeats nothing of `earlier`."""
    return synthesize(
        run,
        folder,
        f"{label}: training set",
        teacher or run.first_teacher(),
        count=run.experiment.training.examples,
        draw="i1-training",
        earlier=earlier,
        synthetic_pool=None,
    )


def _propose(now: Round) -> Proposal:
    training = imitate_seeds(now.run, now.folder / "training", now.label, earlier=[])
    return Proposal(training.examples, now.run.first_teacher())


def _propose_strong(now: Round) -> Proposal:
    strong = now.run.experiment.strong_teacher
    training = imitate_seeds(now.run, now.folder / "training", now.label, [], strong)
    return Proposal(training.examples, now.run.first_teacher())


SELF_INSTRUCT = Method("self_instruct", "The unmodified teacher writes the data.", _propose)
SELF_INSTRUCT_STRONG = Method(
    "self_instruct_strong",
    "A stronger teacher behind an API writes the data.",
    _propose_strong,
    needs="strong_teacher",
)

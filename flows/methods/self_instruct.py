"""Self-Instruct (Wang et al., 2023): data of the unmodified teacher, or of a stronger teacher behind an API."""

from flows.methods.method import Method, Proposal, Round
from flows.methods.tailoring import write_training_set
from tasks.run import ApiModel, Model


def _propose(now: Round, teacher: Model | ApiModel) -> Proposal:
    training = write_training_set(now.step, teacher)
    return Proposal(training.examples, now.run.initial_teacher())


SELF_INSTRUCT = Method(
    "self_instruct", "The unmodified teacher writes the data.", lambda now: _propose(now, now.run.initial_teacher())
)
SELF_INSTRUCT_STRONG = Method(
    "self_instruct_strong",
    "A stronger teacher behind an API writes the data.",
    lambda now: _propose(now, ApiModel("strong_teacher")),
    needs="strong_teacher",
)

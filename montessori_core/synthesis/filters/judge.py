"""The filter `judge`: a model behind an API scores instruction and response high enough."""

from montessori_core.config import JudgeFilter
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

LOW = "scored too low"
NO_SCORE = "no score"


def _open(settings: JudgeFilter, context: Context) -> Reject:
    def reject(candidate: Candidate) -> str | None:
        score = context.measured[candidate.instruction, candidate.response]
        if score is None:
            return None if settings.keep_unscored else NO_SCORE
        return LOW if score < settings.minimum else None

    return reject


JUDGE = Filter(
    "judge",
    "Examples that the model of the section judge scores high enough.",
    _open,
    JudgeFilter,
    reads="examples",
    has_jobs=True,
)

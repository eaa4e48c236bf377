"""The filter `rouge_l`: an instruction differs from demonstrations and from accepted instructions (Section 4)."""

from montessori_core.config.filters import RougeFilter
from montessori_core.data.rouge import RougeIndex, f_measure
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

LIKE_DEMONSTRATION = "too similar to a demonstration"
LIKE_ACCEPTED = "too similar to an accepted instruction"


def _open(settings: RougeFilter, context: Context) -> Reject:
    index = RougeIndex(max_rouge_l=settings.maximum)

    def reject(candidate: Candidate) -> str | None:
        for accepted in context.accepted[len(index) :]:
            index.add(accepted)
        if any(f_measure(candidate.instruction, shown) > settings.maximum for shown in candidate.demonstrations):
            return LIKE_DEMONSTRATION
        return None if index.nearest(candidate.instruction) is None else LIKE_ACCEPTED

    return reject


ROUGE_L = Filter("rouge_l", "Instructions that differ from demonstrations and accepted ones.", _open, RougeFilter)

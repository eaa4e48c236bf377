"""The filter `semantic`: the embedding of an instruction differs from those of seeds and accepted instructions."""

from montessori_core.config import SemanticFilter
from montessori_core.data.cosine import CosineIndex
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

LIKE_SEED = "means nearly the same as a seed"
LIKE_ACCEPTED = "means nearly the same as an accepted instruction"


def _open(settings: SemanticFilter, context: Context) -> Reject:
    index = CosineIndex(settings.maximum)  # seeds, then accepted instructions

    def reject(candidate: Candidate) -> str | None:
        seeds, accepted = context.seeds, context.accepted
        while len(index) < len(seeds) + len(accepted):
            text = seeds[len(index)] if len(index) < len(seeds) else accepted[len(index) - len(seeds)]
            index.add(context.measured[text, ""])
        nearest = index.nearest(context.measured[candidate.instruction, ""])
        if nearest is None:
            return None
        return LIKE_SEED if nearest < len(seeds) else LIKE_ACCEPTED

    return reject


SEMANTIC = Filter(
    "semantic",
    "Instructions whose embedding differs from those of seeds and accepted ones; needs a model.",
    _open,
    SemanticFilter,
    has_jobs=True,
)

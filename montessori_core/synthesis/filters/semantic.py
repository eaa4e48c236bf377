"""The filter `semantic`: the embedding of an instruction differs from those of seeds and accepted instructions."""

import numpy as np

from montessori_core.config import SemanticFilter
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

LIKE_SEED = "means nearly the same as a seed"
LIKE_ACCEPTED = "means nearly the same as an accepted instruction"


def _open(settings: SemanticFilter, context: Context) -> Reject:
    vectors, count = np.zeros((0, 0), np.float32), 0  # [capacity, features]: seeds, then accepted instructions

    def add(vector: np.ndarray) -> None:
        nonlocal vectors, count
        if count == len(vectors):
            grown = np.zeros((max(64, 2 * count), len(vector)), np.float32)
            grown[:count] = vectors if count else 0.0
            vectors = grown
        vectors[count] = vector
        count += 1

    def reject(candidate: Candidate) -> str | None:
        seeds, accepted = context.seeds, context.accepted
        while count < len(seeds) + len(accepted):
            text = seeds[count] if count < len(seeds) else accepted[count - len(seeds)]
            add(context.measured[text, ""])
        if not count:
            return None
        similarities = vectors[:count] @ context.measured[candidate.instruction, ""]
        nearest = int(similarities.argmax())
        if similarities[nearest] <= settings.maximum:
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

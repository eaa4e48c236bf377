"""Control of `select`: other examples of the probing set with the same response lengths, chosen without their influence.

Influence depends on the length of a response, and so does the number of tokens that a student trains on. If `select` beats
`random` but not this control, its gain comes from the lengths.
"""

import random
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from flows.methods.method import Method, Proposal, Round
from flows.methods.select import most_influential
from flows.methods.subset import check_choice, measure_candidates, propose_subset
from montessori_core.seeding import seed_of


def _propose(now: Round) -> Proposal:
    experiment = now.run.experiment
    examples, measured = measure_candidates(now)
    selected = most_influential(measured, experiment.training.examples)
    return propose_subset(now, examples, match_lengths(measured, selected, seed_of(experiment.seed, "length_matched")))


def match_lengths(measured: pa.Table, selected: Sequence[str], seed: int) -> list[str]:
    """Return as many other examples as are selected, with response tokens as near to theirs as possible.

    From the longest to the shortest, a selected example is replaced by the nearest in response tokens that is not taken
    yet; among equally near ones `seed` decides. The selected examples themselves are taken only when no others remain.

    Args:
        measured: rows of an influence table.
        selected: ids of rows.
        seed: of the draw.
    """
    order = list(range(measured.num_rows))
    random.Random(seed).shuffle(order)
    shuffled = measured.select(["example_id", "response_tokens"]).take(order)
    ids, tokens = shuffled["example_id"].to_pylist(), shuffled["response_tokens"].to_numpy()
    is_selected = np.isin(ids, list(selected))
    free, matched = ~is_selected, []
    for length in np.sort(tokens[is_selected])[::-1]:
        if not free.any():
            free = is_selected.copy()
        candidates = np.flatnonzero(free)
        nearest = candidates[np.argmin(np.abs(tokens[candidates] - length))]
        free[nearest] = False
        matched.append(ids[nearest])
    return matched


LENGTH_MATCHED = Method(
    "length_matched",
    "Other examples of the probing set, with the response lengths of those that `select` takes.",
    _propose,
    check=check_choice,
)

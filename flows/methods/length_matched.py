"""Control of `select`: other examples of the probing set with the same response lengths, chosen without their influence.

Influence depends on the length of a response, and so does the number of tokens that a student trains on. If `select` beats
`random` but not this control, its gain comes from the lengths.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from flows.methods.method import Method, Proposal, Round
from flows.methods.select import most_influential
from flows.methods.subset import check_choice, measure_candidates, propose_subset
from montessori_core.seeding import seed_of
from montessori_core.selection.lengths import match_lengths as matching_rows


def _propose(now: Round) -> Proposal:
    experiment = now.run.experiment
    examples, measured = measure_candidates(now)
    selected = most_influential(measured, experiment.training.examples)
    return propose_subset(now, examples, match_lengths(measured, selected, seed_of(experiment.seed, "length_matched")))


def match_lengths(measured: pa.Table, selected: Sequence[str], seed: int) -> list[str]:
    """Return as many other examples as are selected, with response tokens as near to theirs as possible.

    See `montessori_core.selection.lengths`.

    Args:
        measured: rows of an influence table.
        selected: ids of rows.
        seed: of the draw.
    """
    ids, lengths = measured["example_id"].to_pylist(), measured["response_tokens"].to_numpy().astype(np.int64)
    return [ids[row] for row in matching_rows(lengths, np.isin(ids, list(selected)), seed)]


LENGTH_MATCHED = Method(
    "length_matched",
    "Other examples of the probing set, with the response lengths of those that `select` takes.",
    _propose,
    check=check_choice,
)

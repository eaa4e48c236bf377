"""Best of many: the student trains on the most influential of the unmodified teacher's examples; no teacher is updated."""

import pyarrow as pa

from flows.methods.method import Method, Proposal, Round
from flows.methods.subset import check_choice, measure_candidates, propose_subset
from montessori_core.influence.preferences import highest


def _propose(now: Round) -> Proposal:
    examples, measured = measure_candidates(now)
    return propose_subset(now, examples, most_influential(measured, now.run.experiment.training.examples))


def most_influential(measured: pa.Table, count: int) -> list[str]:
    """Return the ids of the `count` rows of an influence table with the highest influence, highest first."""
    return highest(measured["example_id"].to_pylist(), measured["influence_student"].to_pylist(), count)


SELECT = Method(
    "select", "The most influential examples of the unmodified teacher's probing set.", _propose, check=check_choice
)

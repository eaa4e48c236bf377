"""Measuring influence by the configured estimator, see `montessori_core.influence.screening`."""

from typing import Protocol

import pyarrow as pa

from montessori_core.config import Influence
from montessori_core.data.rows import Positions
from montessori_core.data.tables import INFLUENCE
from montessori_core.influence.screening import calibrate, combine, doubtful, draw_audit


class InfluenceStages(Protocol):
    """Stages that measure a set of examples."""

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        """Measure every example by an estimator; return their influence table, in their order."""

    def measure_exactly(self, name: str, positions: Positions) -> pa.RecordBatchReader:
        """Measure the examples at some positions exactly, in a stage of that name."""


def estimate_influence(stages: InfluenceStages, settings: Influence, baseline: str) -> pa.RecordBatchReader:
    """Measure examples by the configured estimator; the table is in their order.

    Args:
        stages: of these examples.
        settings: which estimator, and its audit.
        baseline: what a sign is against, see `config.Preferences`.
    """
    if settings.estimator != "screened":
        return stages.measure_all(settings.estimator)

    def exactly(name: str, positions: Positions) -> pa.Table:
        return stages.measure_exactly(name, positions).read_all() if len(positions) else INFLUENCE.empty_table()

    # 1. First order, or linear, for every example.
    estimates = stages.measure_all(settings.screening.estimator).read_all()
    # 2. Exact for a random audit, which says how far the estimates are off.
    audit = draw_audit(estimates, settings.screening.audit_examples)
    audited = exactly("audit", audit)
    report = calibrate(estimates, audit, audited, settings.screening, baseline)
    # 3. Exact wherever the sign is in doubt.
    in_doubt = doubtful(estimates, audit, report, baseline)
    confirmed = exactly("confirm", in_doubt)
    return combine(estimates, audit, audited, in_doubt, confirmed, report).to_reader()

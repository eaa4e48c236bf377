"""The screened estimator: first order for every example, exact for a random audit and wherever the sign is in doubt.

The audit measures some examples both ways. One half of it sets an *offset*, by which first order is off in the middle (what
it leaves out, the second order of the step, is much the same for all examples), and a *width*: how much further it may be off
for all but a configured share of examples (split conformal prediction: no assumption on the errors but that audit and
other examples are drawn alike). First order is corrected by the offset; examples that then lie within the width of the
threshold are confirmed exactly. The other half, which had no part in setting either, says how often the signs that come
out agree with exact ones. If they agree too seldom even so, every example is measured exactly. Which examples are
audited follows from their ids alone.

With the mean of its prompt for a threshold, a row is in doubt if it may lie on the other side of the estimated mean. That
settles the order of pairs: both rows are exact, or one lies farther from the mean than first order is uncertain.
"""

import hashlib
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest, spearmanr

from montessori_core.config import Screening
from montessori_core.data.rows import Positions
from montessori_core.data.tables import INFLUENCE, check
from montessori_core.influence.preferences import Floats, thresholds_of
from montessori_core.influence.table import read_influence_metadata

_NOTE = b"montessori.screening"
_MOVING = ("median", "prompt")
"""Baselines whose threshold is made of the estimates."""


@dataclass(frozen=True)
class Agreement:
    """A share of signs that agree, with its exact (Clopper-Pearson) 95 % interval.

    Attributes:
        share, low, high: NaN, 0 and 1 if there were no signs to compare.
        signs: how many there were: those outside the noise floor.
    """

    share: float
    low: float
    high: float
    signs: int

    @staticmethod
    def of(agreeing: npt.NDArray[np.bool_]) -> "Agreement":
        """Count the signs that agree."""
        if not len(agreeing):
            return Agreement(math.nan, 0.0, 1.0, 0)
        test = binomtest(int(agreeing.sum()), len(agreeing))
        interval = test.proportion_ci(method="exact")
        return Agreement(float(test.statistic), float(interval.low), float(interval.high), len(agreeing))

    def __str__(self) -> str:
        if not self.signs:
            return "no signs outside the noise floor"
        return f"{self.share:.1%} of {self.signs} signs (95 % interval {self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class ScreeningReport:
    """How well the screen did; kept with the table.

    Attributes:
        audited: examples measured both ways.
        confirmed: examples beyond the audit whose sign was in doubt, measured exactly.
        offset: what first order was corrected by, nats.
        width: half the width of doubt around a threshold, nats.
        spearman: rank correlation of first order and exact over the audit.
        first_order: how often the signs of first order alone agree with exact ones, over the audit.
        screened: the same after correction and confirmation, over the half of the audit that did not set them.
        fell_back: too few signs agreed even after correction, so every example was measured exactly.
    """

    audited: int
    confirmed: int
    offset: float
    width: float
    spearman: float
    first_order: Agreement
    screened: Agreement
    fell_back: bool


def draw_audit(first_order: pa.Table, count: int) -> Positions:
    """Positions of the examples to audit, in the order in which they were drawn; see `draw_ids`."""
    ids = first_order["example_id"]
    names = draw_ids(ids.filter(pc.equal(first_order["status"], "ok")).to_pylist(), count)
    positions: Positions = pc.index_in(pa.array(names, pa.string()), ids).to_numpy()
    return positions


def calibrate(
    first_order: pa.Table, audit: Positions, audited: pa.Table, settings: Screening, baseline: str
) -> ScreeningReport:
    """Compare first order with exact measurements of the audit.

    Args:
        first_order: the influence table of all examples, by first order.
        audit: positions of the audited examples.
        audited: their exact influence table, in that order.
        settings: of the audit.
        baseline: what a sign is against, see `config.Preferences`.

    Returns:
        The report, with no example confirmed yet.
    """
    estimated, true = first_order["influence_student"].to_numpy()[audit], audited["influence_student"].to_numpy()
    sound = np.isfinite(true)
    calibrating = np.arange(len(audit)) % 2 == 0
    offset = float(np.median((true - estimated)[calibrating & sound])) if (calibrating & sound).any() else 0.0
    corrected, threshold = estimated + offset, _thresholds(first_order, baseline, offset)[audit]
    floor = read_influence_metadata(first_order, "noise_floor")
    clear = sound & (np.abs(true - threshold) > floor)
    agreement = Agreement.of(_agree(corrected, true, threshold)[clear])
    fell_back = agreement.signs > 0 and agreement.share < settings.minimum_agreement
    # Errors of unmeasurable examples are infinite: too many of them, and everything is in doubt.
    errors = np.where(sound, np.abs(corrected - true), np.inf)
    width = max(floor, conformal_width(errors[calibrating], settings.error_rate))
    settled = _agree(corrected, true, threshold) | (np.abs(corrected - threshold) <= width) | fell_back
    moving = baseline in _MOVING
    return ScreeningReport(
        audited=len(audit),
        confirmed=0,
        offset=offset,
        width=width,
        spearman=float(spearmanr(estimated[sound], true[sound]).statistic) if sound.sum() > 2 else math.nan,
        first_order=agreement if moving else Agreement.of(_agree(estimated, true, threshold)[clear]),
        screened=Agreement.of(settled[~calibrating & clear]),
        fell_back=fell_back,
    )


def doubtful(first_order: pa.Table, audit: Positions, report: ScreeningReport, baseline: str) -> Positions:
    """Positions of the examples beyond the audit whose sign is in doubt: all of them if first order is unfit."""
    thresholds = _thresholds(first_order, baseline, report.offset)
    distances = np.abs(first_order["influence_student"].to_numpy() + report.offset - thresholds)
    usable = pc.equal(first_order["status"], "ok").to_numpy()
    in_doubt = usable & (report.fell_back | (distances <= report.width))
    in_doubt[audit] = False
    return np.flatnonzero(in_doubt)


def combine(
    first_order: pa.Table,
    audit: Positions,
    audited: pa.Table,
    in_doubt: Positions,
    confirmed: pa.Table,
    report: ScreeningReport,
) -> pa.Table:
    """The screened influence table, in the order of the examples: exact where `estimator` says so, with the report.

    Args:
        first_order: the influence table of all examples, by first order.
        audit, audited: positions of the audited examples, and their exact influence table.
        in_doubt, confirmed: the same of the examples whose sign was in doubt.
        report: of the audit.
    """
    table = first_order
    for column in ("influence_student", "influence_null_step"):
        table = _replace(table, column, pc.add(table[column], report.offset))
    measured = pa.concat_tables([table, _replace(audited, "audited", pa.repeat(True, len(audit))), confirmed])
    order = np.arange(table.num_rows)
    order[audit] = table.num_rows + np.arange(len(audit))
    order[in_doubt] = table.num_rows + len(audit) + np.arange(len(in_doubt))
    joined = _replace(measured.take(order), "first_order_null_step", first_order["influence_null_step"])
    note = {_NOTE: json.dumps(asdict(replace(report, confirmed=len(in_doubt)))).encode()}
    return check(joined.replace_schema_metadata({**table.schema.metadata, **note}), INFLUENCE, "screened influence")


def screening_report(table: pa.Table) -> ScreeningReport | None:
    """The report kept with a table; None if it was not screened."""
    note = (table.schema.metadata or {}).get(_NOTE)
    if note is None:
        return None
    content = json.loads(note)
    first_order, screened = (Agreement(**content.pop(name)) for name in ("first_order", "screened"))
    return ScreeningReport(first_order=first_order, screened=screened, **content)


def draw_ids(ids: Sequence[str], count: int) -> list[str]:
    """At random, by the hash of the id: the same however the ids are ordered, and a larger audit holds a smaller one."""
    return heapq.nsmallest(count, ids, key=lambda name: hashlib.sha256(f"audit {name}".encode()).digest())


def conformal_width(errors: Floats, error_rate: float) -> float:
    """The width that the next error, drawn like these, exceeds with at most `error_rate`; infinite if they are too few."""
    rank = math.ceil((len(errors) + 1) * (1 - error_rate))
    return float(np.sort(errors)[rank - 1]) if 0 < rank <= len(errors) else math.inf


def _thresholds(first_order: pa.Table, baseline: str, offset: float) -> Floats:
    """The threshold of each example's sign; one that is made of the estimates has their common error."""
    return thresholds_of(first_order, baseline) + (offset if baseline in _MOVING else 0.0)


def _agree(estimated: Floats, true: Floats, threshold: Floats) -> npt.NDArray[np.bool_]:
    agreeing: npt.NDArray[np.bool_] = (estimated > threshold) == (true > threshold)
    return agreeing


def _replace(table: pa.Table, column: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with other values in a column."""
    index = table.column_names.index(column)
    return table.set_column(index, table.field(index), values)

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest, spearmanr

from montessori_core.config import Influence, Screening
from montessori_core.influence_table import influence_note
from montessori_core.preferences import Floats, Positions, thresholds_of
from montessori_core.program import Row
from montessori_core.schema import INFLUENCE, check

Measure = Callable[[str, str, list[Row]], pa.RecordBatchReader]
"""Measures rows: from a name for the pass, 'exact' or 'first_order', and rows, to their influence table in that order."""

_NOTE = b"montessori.screening"


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


def estimate_influence(rows: list[Row], measure: Measure, settings: Influence, baseline: str) -> pa.RecordBatchReader:
    """Measure rows by the configured estimator; the table is in their order."""
    if settings.estimator == "screened":
        return screen(rows, measure, settings.screening, baseline).to_reader()
    return measure(settings.estimator, settings.estimator, rows)


def screen(rows: list[Row], measure: Measure, settings: Screening, baseline: str) -> pa.Table:
    """Measure rows by the screened estimator.

    Args:
        rows: with `example_id`.
        measure: how to measure some of them.
        settings: of the audit.
        baseline: what a sign is against, see `config.Preferences`.

    Returns:
        The influence table in the order of the rows: exact where `estimator` says so, with a `ScreeningReport`.
    """
    table = measure("screen", "first_order", rows).read_all()
    floor = influence_note(table, "noise_floor")
    first_order: Floats = table["influence_student"].to_numpy()
    usable = pc.equal(table["status"], "ok")
    names = draw_audit(table["example_id"].filter(usable).to_pylist(), settings.audit_examples)
    audit: Positions = pc.index_in(pa.array(names, pa.string()), table["example_id"]).to_numpy()

    def exactly(name: str, some: Positions) -> pa.Table:
        return measure(name, "exact", [rows[i] for i in some]).read_all() if len(some) else INFLUENCE.empty_table()

    audited = exactly("audit", audit)
    estimated, true = first_order[audit], audited["influence_student"].to_numpy()
    sound = np.isfinite(true)
    calibrating = np.arange(len(audit)) % 2 == 0
    offset = float(np.median((true - estimated)[calibrating & sound])) if (calibrating & sound).any() else 0.0
    corrected, thresholds = estimated + offset, thresholds_of(table, baseline)
    moving = baseline in ("median", "prompt")  # a threshold that is made of the estimates has their common error
    if moving:
        thresholds = thresholds + offset
    threshold = thresholds[audit]
    clear = sound & (np.abs(true - threshold) > floor)
    agreement = Agreement.of(_agree(corrected, true, threshold)[clear])
    fell_back = agreement.signs > 0 and agreement.share < settings.minimum_agreement
    # Errors of unmeasurable examples are infinite: too many of them, and everything is in doubt.
    errors = np.where(sound, np.abs(corrected - true), np.inf)
    width = max(floor, conformal_width(errors[calibrating], settings.error_rate))
    doubtful = usable.to_numpy() & (fell_back | (np.abs(first_order + offset - thresholds) <= width))
    doubtful[audit] = False
    confirmed = exactly("confirm", np.flatnonzero(doubtful))

    settled = _agree(corrected, true, threshold) | (np.abs(corrected - threshold) <= width) | fell_back
    report = ScreeningReport(
        audited=len(audit),
        confirmed=int(doubtful.sum()),
        offset=offset,
        width=width,
        spearman=float(spearmanr(estimated[sound], true[sound]).statistic) if sound.sum() > 2 else math.nan,
        first_order=agreement if moving else Agreement.of(_agree(estimated, true, threshold)[clear]),
        screened=Agreement.of(settled[~calibrating & clear]),
        fell_back=fell_back,
    )
    estimates = table["influence_null_step"]
    for column in ("influence_student", "influence_null_step"):
        table = _replace(table, column, pc.add(table[column], offset))
    measured = pa.concat_tables([table, _replace(audited, "audited", pa.repeat(True, len(audit))), confirmed])
    order = np.arange(len(rows))
    order[audit] = len(rows) + np.arange(len(audit))
    order[doubtful] = len(rows) + len(audit) + np.arange(confirmed.num_rows)
    joined = _replace(measured.take(order), "first_order_null_step", estimates)
    note = {_NOTE: json.dumps(asdict(report)).encode()}
    return check(joined.replace_schema_metadata({**table.schema.metadata, **note}), INFLUENCE, "screened influence")


def screening_report(table: pa.Table) -> ScreeningReport | None:
    """The report kept with a table; None if it was not screened."""
    note = (table.schema.metadata or {}).get(_NOTE)
    if note is None:
        return None
    content = json.loads(note)
    first_order, screened = (Agreement(**content.pop(name)) for name in ("first_order", "screened"))
    return ScreeningReport(first_order=first_order, screened=screened, **content)


def draw_audit(ids: Sequence[str], count: int) -> list[str]:
    """At random, by the hash of the id: the same however the ids are ordered, and a larger audit holds a smaller one."""
    return heapq.nsmallest(count, ids, key=lambda name: hashlib.sha256(f"audit {name}".encode()).digest())


def conformal_width(errors: Floats, error_rate: float) -> float:
    """The width that the next error, drawn like these, exceeds with at most `error_rate`; infinite if they are too few."""
    rank = math.ceil((len(errors) + 1) * (1 - error_rate))
    return float(np.sort(errors)[rank - 1]) if 0 < rank <= len(errors) else math.inf


def _agree(estimated: Floats, true: Floats, threshold: Floats) -> npt.NDArray[np.bool_]:
    agreeing: npt.NDArray[np.bool_] = (estimated > threshold) == (true > threshold)
    return agreeing


def _replace(table: pa.Table, column: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with other values in a column."""
    index = table.column_names.index(column)
    return table.set_column(index, table.field(index), values)

"""The screened estimator: first order or linear for every example, exact for an audit and wherever the sign is in doubt.

1. The audit measures a random sample with both estimators. The ids alone decide which examples are audited.
2. One half of the audit calibrates. The *offset* is the median error of the estimates: they omit the second order of the
   step, which is similar for all examples. The *width* bounds the remaining error for all but a configured share of examples
   (split conformal prediction, which assumes only that audit and other examples are exchangeable).
3. The estimates are corrected by the offset. Examples within the width of the threshold are measured exactly. If too few
   corrected signs of the audit agree with exact ones, every example is.
4. The other half validates: it measures how often the resulting signs agree with exact ones.

If the threshold is the mean of the prompt, a row is in doubt if it may lie on the other side of the estimated mean. That
decides the order of each pair: both rows are exact, or one is farther from the mean than the uncertainty of the estimates.
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

from montessori_core.config import Screening
from montessori_core.config.influence import conformal_rank
from montessori_core.data.rows import Positions
from montessori_core.data.tables import INFLUENCE, check
from montessori_core.influence.preferences import Floats, thresholds_of
from montessori_core.influence.table import read_influence_metadata

_METADATA = b"montessori.screening"
_FROM_ESTIMATES = ("median", "prompt")
"""Baselines whose threshold is computed from the estimates."""


@dataclass(frozen=True)
class Agreement:
    """The share of signs that agree, with its exact (Clopper-Pearson) 95 % interval.

    Attributes:
        share, low, high: NaN, 0 and 1 if there are no signs to compare.
        signs: number of compared signs: those outside the noise floor.
    """

    share: float
    low: float
    high: float
    signs: int

    @staticmethod
    def of(agreeing: npt.NDArray[np.bool_]) -> "Agreement":
        """Return the agreement of signs, given whether each agrees."""
        if not len(agreeing):
            return Agreement(math.nan, 0.0, 1.0, 0)
        from scipy.stats import binomtest  # takes half a second to import

        test = binomtest(int(agreeing.sum()), len(agreeing))
        interval = test.proportion_ci(method="exact")
        return Agreement(float(test.statistic), float(interval.low), float(interval.high), len(agreeing))

    def __str__(self) -> str:
        if not self.signs:
            return "no signs outside the noise floor"
        return f"{self.share:.1%} of {self.signs} signs (95 % interval {self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class ScreeningReport:
    """Quality of a screening; stored with the table.

    Attributes:
        audited: number of audited examples.
        confirmed: number of other examples in doubt, measured exactly.
        offset: correction added to the estimates, nats.
        width: an example is in doubt if it is at most this far from its threshold, nats.
        spearman: rank correlation of estimates and exact influence over the audit.
        estimated: agreement of the signs of the estimates with exact ones, over the audit; corrected if the threshold is
            computed from the estimates themselves.
        screened: agreement after correction and confirmation, over the half of the audit that validates.
        fell_back: whether too few corrected signs of the audit agreed, so that every example was measured exactly.
        estimator: of the estimates, see `INFLUENCE`.
    """

    audited: int
    confirmed: int
    offset: float
    width: float
    spearman: float
    estimated: Agreement
    screened: Agreement
    fell_back: bool
    estimator: str = "first_order"  # of tables that were written before there was a choice

    @property
    def estimator_name(self) -> str:
        """The estimator in words."""
        return self.estimator.replace("_", " ")

    def describe(self) -> list[tuple[str, str]]:
        """Return the report in words: names and values."""
        agreement = f"{self.estimated}, Spearman {self.spearman:.3f}"
        lines = [
            ("measured exactly", f"{self.audited} to audit, {self.confirmed} in doubt"),
            (f"{self.estimator_name} against exact", agreement),
            ("common error, corrected", f"{self.offset:.3g} nats per token"),
            ("after correction and confirmation", str(self.screened)),
        ]
        if self.fell_back:
            lines.append(("fell back", f"{self.estimator_name} failed the audit: every example was measured exactly"))
        return lines


def draw_audit(estimates: pa.Table, count: int) -> Positions:
    """Return the positions of the examples to audit, in the order in which `draw_ids` draws them."""
    ids = estimates["example_id"]
    audit_ids = draw_ids(ids.filter(pc.equal(estimates["status"], "ok")).to_pylist(), count)
    positions: Positions = pc.index_in(pa.array(audit_ids, pa.string()), ids).to_numpy()
    return positions


def calibrate(
    estimates: pa.Table, audit: Positions, audited: pa.Table, settings: Screening, baseline: str
) -> ScreeningReport:
    """Compare estimates with exact measurements of the audit.

    Args:
        estimates: influence table of all examples, by first order or linear.
        audit: positions of the audited examples.
        audited: exact influence table of the audited examples, in that order.
        settings: settings of the audit.
        baseline: baseline of the signs, see `config.Preferences`.

    Returns:
        The report; no example is confirmed yet.
    """
    from scipy.stats import spearmanr

    estimated, exact = estimates["influence_student"].to_numpy()[audit], audited["influence_student"].to_numpy()
    finite = np.isfinite(exact)
    calibrating = np.arange(len(audit)) % 2 == 0
    offset = float(np.median((exact - estimated)[calibrating & finite])) if (calibrating & finite).any() else 0.0
    corrected, threshold = estimated + offset, _thresholds(estimates, baseline, offset)[audit]
    floor = read_influence_metadata(estimates, "noise_floor")
    above_noise = finite & (np.abs(exact - threshold) > floor)
    agreement = Agreement.of(_agree(corrected, exact, threshold)[above_noise])
    fell_back = agreement.signs > 0 and agreement.share < settings.minimum_agreement
    # Errors of unmeasurable examples are infinite: if there are too many, everything is in doubt.
    errors = np.where(finite, np.abs(corrected - exact), np.inf)
    width = max(floor, conformal_width(errors[calibrating], settings.error_rate))
    correct = _agree(corrected, exact, threshold) | (np.abs(corrected - threshold) <= width) | fell_back
    return ScreeningReport(
        audited=len(audit),
        confirmed=0,
        offset=offset,
        width=width,
        spearman=float(spearmanr(estimated[finite], exact[finite]).statistic) if finite.sum() > 2 else math.nan,
        estimated=(
            agreement if baseline in _FROM_ESTIMATES else Agreement.of(_agree(estimated, exact, threshold)[above_noise])
        ),
        screened=Agreement.of(correct[~calibrating & above_noise]),
        fell_back=fell_back,
        estimator=estimates["estimator"][0].as_py(),
    )


def doubtful(estimates: pa.Table, audit: Positions, report: ScreeningReport, baseline: str) -> Positions:
    """Return the positions of the examples outside the audit whose sign is in doubt: all if the screening fell back."""
    thresholds = _thresholds(estimates, baseline, report.offset)
    distances = np.abs(estimates["influence_student"].to_numpy() + report.offset - thresholds)
    usable = pc.equal(estimates["status"], "ok").to_numpy()
    in_doubt = usable & (report.fell_back | (distances <= report.width))
    in_doubt[audit] = False
    return np.flatnonzero(in_doubt)


def combine(
    estimates: pa.Table,
    audit: Positions,
    audited: pa.Table,
    in_doubt: Positions,
    confirmed: pa.Table,
    report: ScreeningReport,
) -> pa.Table:
    """Return the screened influence table, with the report, in the order of the examples.

    Args:
        estimates: influence table of all examples, by first order or linear.
        audit, audited: positions of the audited examples, and their exact influence table.
        in_doubt, confirmed: positions of the examples in doubt, and their exact influence table.
        report: the report of `calibrate`.
    """
    table = estimates
    for column in ("influence_student", "influence_null_step"):
        table = _replace(table, column, pc.add(table[column], report.offset))
    measured = pa.concat_tables([table, _replace(audited, "audited", pa.repeat(True, len(audit))), confirmed])
    order = np.arange(table.num_rows)
    order[audit] = table.num_rows + np.arange(len(audit))
    order[in_doubt] = table.num_rows + len(audit) + np.arange(len(in_doubt))
    joined = _replace(measured.take(order), "first_order_null_step", estimates["influence_null_step"])
    metadata = {_METADATA: json.dumps(asdict(replace(report, confirmed=len(in_doubt)))).encode()}
    return check(joined.replace_schema_metadata({**table.schema.metadata, **metadata}), INFLUENCE, "screened influence")


def screening_report(table: pa.Table) -> ScreeningReport | None:
    """Return the report stored with a table; None if the table was not screened."""
    metadata = (table.schema.metadata or {}).get(_METADATA)
    if metadata is None:
        return None
    content = json.loads(metadata)
    if "first_order" in content:  # its name in tables of earlier versions
        content["estimated"] = content.pop("first_order")
    estimated, screened = (Agreement(**content.pop(name)) for name in ("estimated", "screened"))
    return ScreeningReport(estimated=estimated, screened=screened, **content)


def draw_ids(ids: Sequence[str], count: int) -> list[str]:
    """Draw ids at random, by hash: their order does not matter, and a larger audit contains a smaller one."""
    return heapq.nsmallest(count, ids, key=lambda name: hashlib.sha256(f"audit {name}".encode()).digest())


def conformal_width(errors: Floats, error_rate: float) -> float:
    """Return the width that an exchangeable error exceeds with probability `error_rate` at most; infinite for few errors."""
    rank = conformal_rank(len(errors), error_rate)
    return float(np.sort(errors)[rank - 1]) if 0 < rank <= len(errors) else math.inf


def _thresholds(estimates: pa.Table, baseline: str, offset: float) -> Floats:
    """Return [rows] thresholds; a threshold computed from the estimates is corrected by their offset."""
    return thresholds_of(estimates, baseline) + (offset if baseline in _FROM_ESTIMATES else 0.0)


def _agree(estimated: Floats, exact: Floats, threshold: Floats) -> npt.NDArray[np.bool_]:
    agreeing: npt.NDArray[np.bool_] = (estimated > threshold) == (exact > threshold)
    return agreeing


def _replace(table: pa.Table, column: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the table with new values in a column."""
    index = table.column_names.index(column)
    return table.set_column(index, table.field(index), values)

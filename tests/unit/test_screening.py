"""The screened estimator: calibrated, correctly reported, and independent of row order."""

import math
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from flows.validation import MeasuredStages
from montessori_core.config import Influence, Preferences, Screening
from montessori_core.data.rows import Positions
from montessori_core.data.tables import table_from_rows
from montessori_core.errors import ConfigError
from montessori_core.influence.preferences import pair_by_influence
from montessori_core.influence.screening import (
    Agreement,
    ScreeningReport,
    calibrate,
    conformal_width,
    draw_ids,
    screening_report,
)
from montessori_core.influence.table import schema_with_metadata
from montessori_core.program import Row
from tasks.screening import InfluenceStages, estimate_influence

SETTINGS = Screening(audit_examples=100)
NULL_STEP = 0.25
"""Influence of the null step, nats."""


class Bench:
    """Rows with given exact influence, and a first-order estimate with a given error; counts measurements.

    The status of a NaN is 'non_finite'.
    """

    def __init__(self, count: int, error: float, seed: int = 0, shift: float = 0.0, apart: float = 0.0) -> None:
        """`apart` is the distance between the means of prompts, which have four rows each."""
        self.noise_floor = 1e-9
        draw = random.Random(seed)
        self.rows: list[Row] = [{"example_id": f"e{n:04d}", "prompt_id": f"p{n // 4}"} for n in range(count)]
        self.exact = {row["example_id"]: draw.gauss(0.2, 1.0) + n // 4 * apart for n, row in enumerate(self.rows)}
        self.estimate = {name: value + shift + draw.gauss(0.0, error) for name, value in self.exact.items()}
        self.measured: dict[str, int] = {}

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        return self._measure("screen", estimator, self.rows)

    def measure_exactly(self, name: str, positions: Positions) -> pa.RecordBatchReader:
        return self._measure(name, "exact", [self.rows[i] for i in positions])

    def _measure(self, name: str, estimator: str, rows: list[Row]) -> pa.RecordBatchReader:
        self.measured[name] = len(rows)
        values = self.exact if estimator == "exact" else self.estimate
        records = [
            {
                "example_id": row["example_id"],
                "prompt_id": row["prompt_id"],
                "status": "ok" if math.isfinite(value) else "non_finite",
                "tokens": 9,
                "response_tokens": 5,
                "truncated": False,
                "example_loss": 1.0,
                "influence_student": value if math.isfinite(value) else None,
                "influence_null_step": value - NULL_STEP if math.isfinite(value) else None,
                "reference_tokens": 100 if estimator == "exact" else 0,
                "estimator": estimator,
                "audited": False,
                "gradient_norm": 2.0 + len(name),
                "dominated_share": 0.5 if estimator == "exact" else 0.25,
            }
            for row in rows
            for value in [values[row["example_id"]]]
        ]
        notes = {
            "noise_floor": self.noise_floor,
            "null_step_influence": NULL_STEP,
            "student_loss": 2.0,
            "reference_tokens": 100.0,
        }
        return table_from_rows(records, schema_with_metadata(notes)).to_reader()


def screen(stages: InfluenceStages, settings: Screening, baseline: str) -> pa.Table:
    return estimate_influence(stages, Influence(estimator="screened", screening=settings), baseline).read_all()


def test_screened_signs_in_doubt_are_exact() -> None:
    bench = Bench(2000, error=0.05)
    table = screen(bench, SETTINGS, "student")
    report = screening_report(table)
    assert report is not None
    assert table["example_id"].to_pylist() == [row["example_id"] for row in bench.rows]
    confirmed = [r for r in table.to_pylist() if r["estimator"] == "exact"]
    assert len(confirmed) == report.audited + report.confirmed == sum(bench.measured.values()) - 2000
    assert sum(r["audited"] for r in table.to_pylist()) == 100
    passes = {"first_order": {(8.0, 0.25)}, "exact": {(7.0, 0.5), (9.0, 0.5)}}  # screen; audit and confirmation
    for estimator, expected in passes.items():
        rows = [r for r in table.to_pylist() if r["estimator"] == estimator]
        assert {(r["gradient_norm"], r["dominated_share"]) for r in rows} == expected
    assert all(r["influence_student"] == bench.exact[r["example_id"]] for r in confirmed)
    assert all(r["first_order_null_step"] == bench.estimate[r["example_id"]] - NULL_STEP for r in confirmed)
    assert report.confirmed < 300  # the width follows the errors, not the influences
    wrong = sum((r["influence_student"] > 0) != (bench.exact[r["example_id"]] > 0) for r in table.to_pylist())
    alone = sum((bench.estimate[name] > 0) != (value > 0) for name, value in bench.exact.items())
    assert wrong <= 0.05 * 2000
    assert wrong < alone / 3
    assert not report.fell_back
    assert "fell back" not in dict(report.describe())


def test_linear_estimates_are_audited_as_first_order_is() -> None:
    settings = SETTINGS.model_copy(update={"estimator": "linear"})
    linear, first_order = (screen(Bench(400, error=0.05), chosen, "student") for chosen in (settings, SETTINGS))
    assert set(linear["estimator"].to_pylist()) == {"linear", "exact"}
    assert linear["influence_student"].equals(first_order["influence_student"])
    report = screening_report(linear)
    assert report is not None
    assert report.estimator_name == "linear"


def test_report_of_earlier_version_is_read() -> None:
    table = screen(Bench(400, error=0.05), SETTINGS, "student")
    earlier = {
        key: value.replace(b'"estimated"', b'"first_order"') for key, value in (table.schema.metadata or {}).items()
    }
    assert earlier != table.schema.metadata
    assert screening_report(table.replace_schema_metadata(earlier)) == screening_report(table)


def test_screened_from_both_tables_equals_measured() -> None:
    bench = Bench(400, error=0.05)
    both = MeasuredStages(*(bench.measure_all(estimator).read_all() for estimator in ("first_order", "exact")))
    tables = [screen(stages, SETTINGS, "student") for stages in (bench, both)]
    assert screening_report(tables[0]) == screening_report(tables[1])
    first, second = (table.drop_columns(["gradient_norm"]) for table in tables)  # names the stage here
    assert first.equals(second)


@pytest.mark.parametrize("baseline", ["student", "median"])
def test_common_error_is_corrected_by_offset(baseline: str) -> None:
    shifted = Bench(2000, error=0.05, shift=0.8)
    table = screen(shifted, SETTINGS, baseline)
    report = screening_report(table)
    assert report is not None
    if baseline == "student":
        assert report.estimated.high < 0.9  # a quarter of the signs are wrong before the correction
    else:
        assert report.estimated.share > 0.9  # the median has the same error
    assert report.screened.share > 0.95
    assert not report.fell_back
    assert report.offset == pytest.approx(-0.8, abs=0.05)
    assert 0 < report.confirmed < 300
    threshold = 0.0 if baseline == "student" else float(np.median([*shifted.exact.values()]))
    for row in table.to_pylist():
        exact, estimate = (values[row["example_id"]] for values in (shifted.exact, shifted.estimate))
        if row["estimator"] == "first_order":
            assert row["influence_student"] == estimate + report.offset
            assert row["influence_null_step"] == row["first_order_null_step"] + report.offset
            assert row["influence_student"] == pytest.approx(exact, abs=0.3)
        elif not row["audited"]:
            assert exact == pytest.approx(threshold, abs=0.4)


def test_prompt_baseline_decides_order_within_prompts() -> None:
    """The means of prompts are far apart, so no common threshold divides them; the common error cancels."""
    bench = Bench(800, error=0.2, shift=0.8, apart=10.0)

    def wrong_pairs(table: pa.Table) -> int:
        pairs = pair_by_influence(table, Preferences(baseline="prompt"))
        assert pairs.num_rows > 600
        ids = zip(pairs["chosen_id"].to_pylist(), pairs["rejected_id"].to_pylist(), strict=True)
        return sum(bench.exact[chosen] < bench.exact[rejected] for chosen, rejected in ids)

    table = screen(bench, SETTINGS, "prompt")
    report = screening_report(table)
    assert report is not None
    assert not report.fell_back
    assert report.estimated.share > 0.9
    assert 0 < report.confirmed < 400
    alone = wrong_pairs(bench.measure_all("first_order").read_all())
    assert wrong_pairs(table) < alone / 3


def test_agreement_interval_has_nominal_coverage() -> None:
    """95 % intervals for first order over many draws; the error rate of the width holds on average."""
    covered = exceeding = 0
    for seed in range(120):
        bench = Bench(400, error=0.3, seed=seed)
        report = screening_report(screen(bench, Screening(minimum_agreement=0.0), "student"))
        assert report is not None
        true = np.mean([(bench.estimate[n] > 0) == (v > 0) for n, v in bench.exact.items()])
        covered += report.estimated.low <= true <= report.estimated.high
        errors = [abs(bench.estimate[name] + report.offset - value) for name, value in bench.exact.items()]
        exceeding += np.mean(np.array(errors) > report.width)
    assert covered >= 0.95 * 120 - 6
    assert exceeding / 120 <= 0.06


def test_unfit_screening_falls_back_to_exact() -> None:
    bench = Bench(300, error=3.0)
    for name in ("e0007", "e0100"):
        bench.estimate[name] = bench.exact[name] = math.nan
    (audited,) = draw_ids([*bench.exact], 1)
    bench.exact[audited] = math.nan  # its estimate is finite
    table = screen(bench, SETTINGS, "student")
    report = screening_report(table)
    assert report is not None
    assert report.fell_back
    assert report.estimated.share < 0.9
    assert dict(report.describe())["fell back"] == "first order failed the audit: every example was measured exactly"
    assert bench.measured == {"screen": 300, "audit": 100, "confirm": 198}
    for row in table.to_pylist():
        if row["example_id"] in ("e0007", "e0100"):  # not measured again
            assert (row["status"], row["estimator"]) == ("non_finite", "first_order")
        elif row["example_id"] == audited:
            assert (row["status"], row["estimator"], row["influence_student"]) == ("non_finite", "exact", None)
        else:
            assert (row["influence_student"], row["estimator"]) == (bench.exact[row["example_id"]], "exact")


AUDIT = [
    (2.0, 3.2),  # calibrates, error -1.2
    (1.0, 2.05),  # right sign
    (-0.5, 0.6),  # calibrates, error -1.1; wrong sign before the correction
    (0.35, 1.15),  # wrong sign, in doubt
    (0.8, 1.8),  # calibrates, error -1
    (0.6, 0.4),  # wrong sign, not in doubt
    (-3.0, -2.1),  # calibrates, error -0.9
    (0.24, 1.9),  # wrong sign, but within the noise floor of the threshold
    (5.0, 3.0),  # calibrates, error 2
    (math.nan, 1.0),
    (math.nan, 1.0),  # calibrates
    (-2.0, -1.1),  # right sign
]
"""Exact influence and first-order estimate of audited examples; signs are against NULL_STEP, after an offset of -1."""


def calibrated(floor: float, minimum_agreement: float = 0.5) -> ScreeningReport:
    """Return the report of AUDIT; the width bounds four of the six errors that calibrate."""
    bench = Bench(len(AUDIT), error=0.0)
    bench.noise_floor = floor
    for name, (exact, estimate) in zip(bench.exact, AUDIT, strict=True):
        bench.exact[name], bench.estimate[name] = exact, estimate
    audit = np.arange(len(AUDIT))
    audited = bench.measure_exactly("audit", audit).read_all()
    settings = Screening(error_rate=0.45, minimum_agreement=minimum_agreement)
    return calibrate(bench.measure_all("first_order").read_all(), audit, audited, settings, "null_step")


def test_audit_calibrates_and_validates_by_definition() -> None:
    report = calibrated(floor=0.05)
    assert report.offset == pytest.approx(-1.0)  # the median; the mean is -0.44
    assert report.width == pytest.approx(0.2)  # errors are 0, 0.1, 0.1, 0.2, 3 and, of the NaN, infinite
    # The squared differences of the ten ranks add up to 22.
    assert report.spearman == pytest.approx(1 - 6 * 22 / (10 * 99))
    assert (report.estimated.share, report.estimated.signs) == (8 / 9, 9)
    assert (report.screened.share, report.screened.signs) == (3 / 4, 4)
    assert not report.fell_back
    # Seven of the nine signs are right after the correction.
    assert not calibrated(floor=0.05, minimum_agreement=0.77).fell_back
    unfit = calibrated(floor=0.05, minimum_agreement=0.78)
    assert unfit.fell_back
    assert unfit.screened.share == 1
    # The sign of 0.35 is unknown too.
    noisy = calibrated(floor=0.3)
    assert noisy.width == 0.3
    assert (noisy.screened.share, noisy.screened.signs) == (2 / 3, 3)


@pytest.mark.parametrize("baseline", ["student", "null_step", "median", "prompt"])
def test_screened_values_do_not_depend_on_order(baseline: str) -> None:
    bench = Bench(500, error=0.1)
    table = screen(bench, SETTINGS, baseline)
    shuffled = list(bench.rows)
    random.Random(1).shuffle(shuffled)
    bench.rows = shuffled
    other = screen(bench, SETTINGS, baseline)
    by_id = {row["example_id"]: row for row in other.to_pylist()}
    assert [by_id[row["example_id"]] for row in table.to_pylist()] == table.to_pylist()
    assert screening_report(table) == screening_report(other)


def test_without_calibration_every_example_is_measured_exactly() -> None:
    """The half of the audit that calibrates has no finite row."""
    bench = Bench(500, error=0.1)
    calibrating = draw_ids(list(bench.exact), 100)[::2]
    bench.exact |= dict.fromkeys(calibrating, math.nan)
    table = screen(bench, SETTINGS, "student")
    report = screening_report(table)
    assert report is not None
    assert (report.offset, report.width, report.confirmed, report.fell_back) == (0.0, math.inf, 400, False)
    finite = table.filter(pc.equal(table["status"], "ok"))
    assert finite["influence_student"].to_pylist() == [value for value in bench.exact.values() if math.isfinite(value)]


def test_small_sets_are_measured_exactly() -> None:
    bench = Bench(60, error=0.1)
    table = estimate_influence(bench, Influence(estimator="screened"), "student").read_all()
    assert table["influence_student"].to_pylist() == list(bench.exact.values())
    assert "confirm" not in bench.measured


def test_larger_audit_contains_smaller_one() -> None:
    names = [f"e{n}" for n in range(300)]
    assert set(draw_ids(names, 50)) <= set(draw_ids(names[::-1], 100))


def test_width_of_too_few_errors_is_infinite() -> None:
    errors = np.arange(1.0, 20.0)
    assert conformal_width(errors, 0.05) == 19.0
    assert conformal_width(errors[:18], 0.05) == np.inf


def test_interval_is_clopper_pearsons() -> None:
    """Golden values of the binomial interval for 9 of 10 and 0 of 5."""
    nine = Agreement.of(np.array([True] * 9 + [False]))
    assert (round(nine.low, 4), round(nine.high, 4)) == (0.5550, 0.9975)
    none = Agreement.of(np.zeros(5, bool))
    assert (none.low, round(none.high, 4)) == (0.0, 0.5218)


@pytest.mark.parametrize(
    ("examples", "rate", "enough"),
    [(100, 0.05, True), (40, 0.05, True), (98, 0.02, True), (97, 0.02, True), (96, 0.02, False), (100, 0.01, False)],
)
def test_audit_too_small_for_its_error_rate_is_refused(examples: int, rate: float, enough: bool) -> None:
    """Every example would be in doubt, and measured exactly."""
    settings = Influence.model_validate({"screening": {"audit_examples": examples, "error_rate": rate}})
    assert math.isfinite(conformal_width(np.zeros(-(-examples // 2)), rate)) == enough
    if enough:
        settings.refuse_small_audit()
        return
    with pytest.raises(ConfigError, match="too few to tell an error") as refusal:
        settings.refuse_small_audit()
    needed = int(re.findall(r"set at least (\d+)", str(refusal.value))[0])
    screening = settings.screening.model_copy(update={"audit_examples": needed})
    settings.model_copy(update={"screening": screening}).refuse_small_audit()
    settings.model_copy(update={"estimator": "first_order"}).refuse_small_audit()

"""The pilot of a probing set: measured first and once; warns of too few pairs, with a remedy."""

import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from montessori_core.config import Preferences
from montessori_core.data.rows import Rows
from montessori_core.data.tables import INFLUENCE, table_from_rows, write_table
from montessori_core.influence.pilot import measure_after_pilot, pilot_size, predict_pair_count
from montessori_core.influence.table import join_influence, schema_with_metadata
from montessori_core.program import Row


def rows(count: int, of_prompt: int = 4) -> list[Row]:
    return [{"example_id": f"e{n}", "prompt_id": f"p{n // of_prompt}"} for n in range(count)]


def influence(some: list[Row], common: float, scale: float = 1.0) -> pa.Table:
    """Return an influence table with random values of standard deviation `scale` around `common`."""
    records = [
        {
            **row,
            "status": "ok",
            "tokens": 9,
            "response_tokens": 5,
            "truncated": False,
            "influence_student": common + (value := random.Random(row["example_id"]).gauss(0, scale)),
            "influence_null_step": value,
            "standard_error": 0.3,
            "reference_tokens": 0,
            "estimator": "first_order",
            "audited": False,
        }
        for row in some
    ]
    notes = {"noise_floor": 1e-3, "null_step_influence": common, "student_loss": 2.0, "reference_tokens": 9.0}
    return table_from_rows(records, schema_with_metadata(notes))


@pytest.mark.parametrize(
    ("count", "of_prompt", "size"),
    [(255, 4, 0), (256, 4, 64), (256, 3, 66), (300, 64, 64), (300, 65, 65), (300, 300, 0)],
)
def test_pilot_is_64_rows_of_whole_prompts(count: int, of_prompt: int, size: int) -> None:
    assert pilot_size([row["prompt_id"] for row in rows(count, of_prompt)]) == size


@pytest.mark.parametrize(("common", "warned"), [(0.0, False), (9.0, True)])
def test_pilot_warns_before_others_are_measured(common: float, warned: bool, tmp_path: Path) -> None:
    events: list[str] = []

    def measure(some: Rows, is_pilot: bool) -> list[Path]:
        events.append(f"pilot {len(some)}" if is_pilot else f"others {len(some)}")
        part = tmp_path / f"{len(events)}.parquet"
        write_table(influence(next(some.tables()).to_pylist(), common), part, INFLUENCE)
        return [part]

    warnings: list[str] = []

    def warn(warning: str) -> None:
        events.append("warning")
        warnings.append(warning)

    parts = measure_after_pilot(Rows.of(rows(300)), measure, Preferences(baseline="student"), warn)
    assert events == ["pilot 64", *["warning"] * warned, "others 236"]
    assert join_influence(parts).read_all().equals(influence(rows(300), common))
    if warned:
        assert "first 64 examples make 0 preference pairs (preferences.baseline=student); all 300" in warnings[0]
        assert "With preferences.baseline=" in warnings[0]


def test_small_sets_have_no_pilot(tmp_path: Path) -> None:
    calls: list[tuple[int, bool]] = []

    def measure(some: Rows, is_pilot: bool) -> list[Path]:
        calls.append((len(some), is_pilot))
        return []

    measure_after_pilot(Rows.of(rows(255)), measure, Preferences(), pytest.fail)
    assert calls == [(255, False)]


def test_predicted_remedy_makes_pairs() -> None:
    pilot = influence(rows(64), common=9.0)
    warning = predict_pair_count(pilot, Preferences(baseline="student"), 10_000)
    assert warning is not None
    remedy = re.search(r"With preferences.baseline=(\w+) they make (\d+)", warning)
    assert remedy is not None
    assert predict_pair_count(pilot, Preferences(baseline=remedy[1]), 10_000) is None
    assert int(remedy[2]) > 40


@pytest.mark.parametrize(
    ("settings", "scale", "remedy"),
    [
        ({"margin": 3.0}, 0.1, "lower preferences.margin, or raise synthesis.samples_per_prompt"),
        ({}, 1e-5, "raise synthesis.samples_per_prompt"),
        ({"pairs": "across_prompts", "baseline": "median"}, 1e-5, "most influence is below the noise floor"),
    ],
)
def test_prediction_names_remedy_if_no_baseline_helps(settings: dict[str, Any], scale: float, remedy: str) -> None:
    """The examples differ by less than the margin, or than the noise floor."""
    warning = predict_pair_count(influence(rows(64), 0.0, scale), Preferences(**settings), 10_000)
    assert warning is not None
    assert warning.endswith(f"No baseline makes enough: {remedy}")


def test_remedy_across_prompts_is_a_common_threshold() -> None:
    """The sign of momentum is that of all examples; of the other baselines, the mean of a prompt is no threshold here."""
    settings = Preferences(pairs="across_prompts", baseline="student")
    warning = predict_pair_count(influence(rows(64), common=9.0), settings, 10_000)
    assert warning is not None
    assert re.search(r"With preferences.baseline=(null_step|median) they make 3\d;", warning)


def test_prediction_ignores_max_pairs() -> None:
    assert predict_pair_count(influence(rows(64), 0.0), Preferences(baseline="prompt", max_pairs=1), 10_000) is None

"""Preference pairs: the full cross product within a prompt, and nothing the measurement cannot carry."""

from typing import Any

import pyarrow as pa
import pytest

from montessori_core.config import Preferences
from montessori_core.errors import DataError
from montessori_core.influence_table import join_influence, note_influence, summarize_influence
from montessori_core.preferences import build_preferences, threshold_of
from montessori_core.schema import EXAMPLES, INFLUENCE, PREFERENCES, check, read_table, table_from_rows, write_table


def examples(*ids: str) -> pa.Table:
    return table_from_rows(
        [
            {
                "example_id": name,
                "prompt_id": name[0],
                "prompt": f"prompt {name[0]}",
                "raw_output": f"raw {name}",
                "instruction": name,
                "response": "...",
                "response_finished": True,
            }
            for name in ids
        ],
        EXAMPLES,
    )


def influence(values: dict[str, float | None], null_step: float = 0.0, noise: float = 0.0) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {
            "example_id": name,
            "prompt_id": name[0],
            "status": "ok" if value is not None else "non_finite",
            "tokens": 9,
            "response_tokens": 5,
            "truncated": False,
            "example_loss": 1.0,
            "influence_student": value,
            "influence_null_step": None if value is None else value - null_step,
            "standard_error": None,
            "estimator": "exact",
            "audited": False,
            "reference_tokens": 900,
        }
        for name, value in values.items()
    ]
    notes = {"noise_floor": noise, "null_step_influence": null_step, "student_loss": 2.0, "reference_tokens": 900.0}
    return note_influence(table_from_rows(rows, INFLUENCE), notes)


VALUES = {
    "a1": 3.0,
    "a2": 1.0,
    "a3": -1.0,
    "a4": -2.0,
    "b1": 5.0,
    "b2": 4.0,
    "c1": -1.0,
    "c2": None,
    "d1": 0.0,
    "d2": -9.0,
}


def pairs(settings: Preferences, **kwargs: float) -> list[tuple[str, str]]:
    table = build_preferences(examples(*VALUES), influence(VALUES, **kwargs), settings)
    return list(zip(table["chosen_id"].to_pylist(), table["rejected_id"].to_pylist(), strict=True))


def test_pairs_are_the_cross_product_of_signs_within_a_prompt() -> None:
    assert pairs(Preferences()) == [("a1", "a3"), ("a1", "a4"), ("a2", "a3"), ("a2", "a4")]


def test_baseline_moves_the_threshold() -> None:
    assert pairs(Preferences(baseline="null_step"), null_step=4.5) == [("b1", "b2")]
    # The median of the measured is 0: d1 lies on it and is neither.
    assert threshold_of(influence(VALUES), "median") == 0.0
    assert pairs(Preferences(baseline="median")) == pairs(Preferences())


def test_nothing_within_noise_or_margin_makes_a_pair() -> None:
    assert pairs(Preferences(), noise=1.5) == [("a1", "a4")]
    assert pairs(Preferences(margin=1.5)) == [("a1", "a4")]


def test_a_limit_keeps_the_widest_gaps_in_table_order() -> None:
    assert pairs(Preferences(max_pairs=2)) == [("a1", "a3"), ("a1", "a4")]
    assert pairs(Preferences(max_pairs=1)) == [("a1", "a4")]


def test_pairs_carry_raw_outputs_and_both_influences() -> None:
    row = build_preferences(examples(*VALUES), influence(VALUES, null_step=0.5), Preferences(max_pairs=1)).to_pylist()[
        0
    ]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("prompt a", "raw a1", "raw a4")
    assert (row["chosen_influence_student"], row["chosen_influence_null_step"]) == (3.0, 2.5)


def test_join_keeps_order_and_the_largest_noise() -> None:
    first, second = influence({"a1": 1.0}, noise=1e-9), influence({"b1": 2.0}, noise=3e-9)
    joined = join_influence([first, second])
    assert joined["example_id"].to_pylist() == ["a1", "b1"]
    assert summarize_influence(joined, 1.5)["noise_floor"] == 3e-9
    assert summarize_influence(joined, 1.5)["share_positive"] == 0.5


def test_tables_are_checked_on_write_and_read(tmp_path: Any) -> None:
    path = tmp_path / "t.parquet"
    table = influence(VALUES)
    write_table(table, path, INFLUENCE)
    assert read_table(path, INFLUENCE).equals(table, check_metadata=True)
    with pytest.raises(DataError, match="expected table 'preferences' version 1, found 'influence'"):
        read_table(path, PREFERENCES)
    with pytest.raises(DataError, match="column 'status' is missing"):
        check(table.drop_columns(["status"]), INFLUENCE, "t")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_table(path, INFLUENCE)
    with pytest.raises(DataError, match="not found"):
        read_table(tmp_path / "absent.parquet", INFLUENCE)

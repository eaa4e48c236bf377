"""Preference pairs within a prompt and across prompts, without pairs below the noise floor."""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import Preferences
from montessori_core.data import tables
from montessori_core.data.tables import (
    EXAMPLES,
    INFLUENCE,
    PREFERENCES,
    check,
    read_table,
    table_from_rows,
    write_table,
)
from montessori_core.errors import DataError
from montessori_core.influence import preferences
from montessori_core.influence.preferences import (
    pair_across_prompts,
    pair_by_influence,
    pair_by_utility,
    standard_errors,
    threshold_of,
    thresholds_of,
    write_preferences,
)
from montessori_core.influence.table import (
    influence_warnings,
    join_influence,
    read_influence_metadata,
    schema_with_metadata,
    summarize_influence,
)


def examples(*ids: str) -> pa.Table:
    return table_from_rows(
        [
            {
                "example_id": name,
                "prompt_id": name[0],
                "prompt": f"prompt {name[0]}",
                "raw_output": f"raw {name}",
                "output_ids": [*name.encode()],
                "vocabulary": "v",
                "instruction": name,
                "response": "...",
                "response_finished": True,
            }
            for name in ids
        ],
        EXAMPLES,
    )


def influence(
    values: dict[str, float | None],
    null_step: float = 0.0,
    noise: float = 0.0,
    errors: dict[str, float] | None = None,
    estimator: str = "exact",
) -> pa.Table:
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
            "standard_error": (errors or {}).get(name),
            "estimator": estimator,
            "audited": False,
            "reference_tokens": 900,
            "gradient_norm": value and abs(value),
            "dominated_share": value and abs(value) / 10,
        }
        for name, value in values.items()
    ]
    notes = {"noise_floor": noise, "null_step_influence": null_step, "student_loss": 2.0, "reference_tokens": 900.0}
    return table_from_rows(rows, schema_with_metadata(notes))


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
    "d2": -90.0,
}


def pairs(settings: Preferences, **kwargs: float) -> list[tuple[str, str]]:
    table = pair_by_influence(influence(VALUES, **kwargs), settings)
    return list(zip(table["chosen_id"].to_pylist(), table["rejected_id"].to_pylist(), strict=True))


def test_pairs_are_cross_product_within_prompt() -> None:
    assert pairs(Preferences(baseline="student")) == [("a1", "a3"), ("a1", "a4"), ("a2", "a3"), ("a2", "a4")]


def test_baseline_moves_the_threshold() -> None:
    assert pairs(Preferences(baseline="null_step"), null_step=4.5) == [("b1", "b2")]
    # The median of the measured rows is 0, their mean is -9: d1 lies on the median and makes no pair.
    assert threshold_of(influence(VALUES), "median") == 0.0
    assert pairs(Preferences(baseline="median")) == pairs(Preferences(baseline="student"))


def test_prompt_baseline_pairs_around_its_mean() -> None:
    """An odd number of rows makes as many pairs as possible; a single row makes none."""
    table = influence(VALUES | {"e1": 1.0, "e2": 2.0, "e3": 9.0, "f1": 0.1, "f2": 0.1, "f3": 0.1})
    found = pair_by_influence(table, Preferences(baseline="prompt"))
    assert list(zip(found["chosen_id"].to_pylist(), found["rejected_id"].to_pylist(), strict=True)) == [
        *(("a1", "a3"), ("a1", "a4"), ("a2", "a3"), ("a2", "a4")),
        *(("b1", "b2"), ("d1", "d2"), ("e3", "e1"), ("e3", "e2")),
    ]
    assert thresholds_of(table, "prompt")[:8].tolist() == [0.25] * 4 + [4.5] * 2 + [-1.0] * 2
    assert np.isnan(thresholds_of(influence({"a1": None}), "prompt")).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"baseline": "prompt"}, [("a2", "a1"), ("b2", "b1")]),
        ({"baseline": "median"}, []),
        ({"baseline": "median", "pairs": "across_prompts"}, [("a2", "b1"), ("a1", "b2")]),  # the mean is above a1
    ],
)
def test_utility_is_compared_as_influence_is(settings: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    """Prompt a has higher utility than prompt b: the median lies between them."""
    utility = pa.table(
        {"example_id": ["a1", "a2", "b1", "b2"], "prompt_id": ["a", "a", "b", "b"], "utility": [5.0, 60.0, 1.0, 2.0]}
    )
    measured, rules = influence({"a1": 5.0, "a2": 60.0, "b1": 1.0, "b2": 2.0}), Preferences.model_validate(settings)
    for table in (pair_by_utility(utility, rules), pair_by_influence(measured, rules)):
        assert list(zip(table["chosen_id"].to_pylist(), table["rejected_id"].to_pylist(), strict=True)) == expected


def test_prompt_baseline_ignores_common_momentum() -> None:
    moved = {name: None if value is None else value + 1024.0 for name, value in VALUES.items()}
    settings = Preferences(baseline="prompt")
    assert pair_by_influence(influence(moved), Preferences(baseline="student")).num_rows == 0
    chosen = [pair_by_influence(influence(of), settings)["chosen_id"].to_pylist() for of in (VALUES, moved)]
    assert chosen[0] == chosen[1] != []


def test_influence_within_noise_makes_no_pair() -> None:
    assert pairs(Preferences(baseline="student"), noise=1.5) == [("a1", "a4")]


def test_margin_is_in_standard_errors() -> None:
    """Gaps of a1 and a2 to a3 and a4 are 4, 5, 2 and 3; the standard errors of a pair are 1, 2 and 5."""
    errors = {"a1": 0.6, "a2": 3.0, "a3": 0.8, "a4": 4.0}

    def kept(margin: float, estimator: str = "exact", **known: float) -> list[tuple[str, str]]:
        table = pair_by_influence(
            influence(VALUES, errors=known, estimator=estimator), Preferences(baseline="student", margin=margin)
        )
        return list(zip(table["chosen_id"].to_pylist(), table["rejected_id"].to_pylist(), strict=True))

    assert kept(0.5, **errors) == [("a1", "a3"), ("a1", "a4"), ("a2", "a3"), ("a2", "a4")]
    assert kept(0.62, **errors) == [("a1", "a3"), ("a1", "a4"), ("a2", "a3")]
    assert kept(3.9, **errors) == [("a1", "a3")]
    assert kept(4.1, **errors) == []
    assert kept(0.1, a1=0.6, a3=0.8, a4=4.0) == [("a1", "a3"), ("a1", "a4")]  # a2 has no standard error
    # First order: each row gets the root mean square of all errors, here 2; a difference has 2.8.
    first_order = dict.fromkeys(VALUES, 0.0) | {"a1": 6.0}
    assert kept(1.0, "first_order", **first_order) == [("a1", "a3"), ("a1", "a4"), ("a2", "a4")]
    # Screened: the first-order rows a3 and a4 get 2.9, the exact rows keep their errors.
    better, worse = ({name: VALUES[name] for name in names} for names in (("a1", "a2"), ("a3", "a4")))
    screened = pa.concat_tables(
        [influence(better, errors=errors), influence(worse, errors=errors, estimator="first_order")]
    )
    assert standard_errors(screened).round(2).tolist() == [0.6, 3.0, 2.88, 2.88]
    (pair,) = pair_by_influence(screened, Preferences(baseline="student", margin=1.5)).to_pylist()
    assert (pair["chosen_id"], pair["rejected_id"]) == ("a1", "a4")


def test_max_pairs_keeps_widest_gaps_in_order() -> None:
    assert pairs(Preferences(baseline="student", max_pairs=2)) == [("a1", "a3"), ("a1", "a4")]
    assert pairs(Preferences(baseline="student", max_pairs=1)) == [("a1", "a4")]


def across(baseline: str = "student", **settings: Any) -> Preferences:
    return Preferences(pairs="across_prompts", baseline=baseline, **settings)


def test_pairs_across_prompts_match_best_with_worst() -> None:
    """Helpful: b1 5, b2 4, a1 3, a2 1. Harmful: d2 -90, a4 -2, then a3 and c1 -1. d1 is on the threshold."""
    first = [("b1", "d2"), ("b2", "a4"), ("a1", "a3"), ("a2", "c1")]
    second = [("b1", "a4"), ("b2", "a3"), ("a1", "c1"), ("a2", "d2")]
    assert pairs(across()) == pairs(across("median")) == first
    assert pairs(across(max_uses=2)) == first + second
    # Six pairs use the best three rows twice.
    assert pairs(across(max_uses=2, max_pairs=6)) == [*first[:3], ("b1", "c1"), ("b2", "d2"), ("a1", "a4")]
    assert len(set(pairs(across(max_uses=99)))) == 16
    # Two of five rows are harmful: the other side is shifted.
    few = [("b1", "d2"), ("b2", "a4"), ("a1", "d2"), ("a2", "a4")]
    assert pairs(across("null_step", max_uses=2), null_step=-1.0) == few
    assert pairs(across(), noise=9.0) == []


def test_pairs_across_prompts_keep_rejected_prompt(tmp_path: Path) -> None:
    write_table(examples(*VALUES), tmp_path / "examples.parquet", EXAMPLES)
    made = pair_by_influence(influence(VALUES), across(max_pairs=1))
    write_preferences(made, tmp_path / "examples.parquet", tmp_path / "preferences.parquet", PREFERENCES)
    (row,) = read_table(tmp_path / "preferences.parquet", PREFERENCES).to_pylist()
    assert (row["prompt_id"], row["prompt"]) == ("d", "prompt d")
    assert (row["chosen"], row["rejected"], row["rejected_influence_student"]) == ("raw b1", "raw d2", -90.0)


NUMBERS = st.floats(-1.0, 1.0)


@given(st.lists(NUMBERS, max_size=40), NUMBERS, st.floats(0.0, 0.5), st.integers(1, 50))
def test_pairs_across_prompts_are_distinct_with_positive_gaps(
    numbers: list[float], threshold: float, floor: float, max_uses: int
) -> None:
    values = np.array(numbers, float)
    best, worst = pair_across_prompts(values, np.full(len(values), threshold), floor, max_uses)
    assert len(set(zip(best.tolist(), worst.tolist(), strict=True))) == len(best)
    assert (values[best] > values[worst]).all()
    for side in (best, worst):
        assert np.bincount(side, minlength=1).max() <= max_uses
    counts = [int(above.sum()) for above in (values > threshold + floor, values < threshold - floor)]
    assert len(best) == min(counts) * min(max_uses, max(counts))


def test_pairs_have_raw_outputs_and_influences(tmp_path: Path) -> None:
    write_table(examples(*VALUES), tmp_path / "examples.parquet", EXAMPLES)
    pairs = pair_by_influence(influence(VALUES, null_step=0.5), Preferences(baseline="student", max_pairs=1))
    write_preferences(pairs, tmp_path / "examples.parquet", tmp_path / "preferences.parquet", PREFERENCES)
    (row,) = read_table(tmp_path / "preferences.parquet", PREFERENCES).to_pylist()
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("prompt a", "raw a1", "raw a4")
    assert (row["chosen_influence_student"], row["chosen_influence_null_step"]) == (3.0, 2.5)


def test_join_keeps_order_and_largest_noise_floor(tmp_path: Path) -> None:
    parts = [tmp_path / "part-0.parquet", tmp_path / "part-1.parquet"]
    write_table(influence({"a1": 1.0}, noise=1e-9), parts[0], INFLUENCE)
    write_table(influence({"b1": 2.0}, noise=3e-9), parts[1], INFLUENCE)
    joined = join_influence(parts).read_all()
    assert joined["example_id"].to_pylist() == ["a1", "b1"]
    assert summarize_influence(joined, 1.5)["noise_floor"] == 3e-9
    assert summarize_influence(joined, 1.5)["share_positive"] == 0.5


def test_join_keeps_the_number_of_cut_references(tmp_path: Path) -> None:
    """The first part is of a version that did not count them."""
    parts, table = [tmp_path / "part-0.parquet", tmp_path / "part-1.parquet"], influence({"a1": 1.0})
    write_table(table, parts[0], INFLUENCE)
    write_table(
        table.replace_schema_metadata({**table.schema.metadata, b"montessori.reference_truncated": b"3.0"}),
        parts[1],
        INFLUENCE,
    )
    (warning,) = influence_warnings(summarize_influence(join_influence(parts).read_all(), 0.0))
    assert "the end of 3 reference examples is cut" in warning
    assert influence_warnings(summarize_influence(join_influence(parts[:1]).read_all(), 0.0)) == []


def test_summary_warns_of_dominating_gradients() -> None:
    summary = summarize_influence(influence(VALUES), 0.0)
    assert (summary["median_gradient_norm"], summary["median_dominated_share"]) == (2.0, 0.2)
    assert influence_warnings(summary) == []
    (warning,) = influence_warnings(summarize_influence(influence({"a1": 4.0, "a2": 6.0, "a3": -8.0, "a4": None}), 0.0))
    assert "60% of the coordinates" in warning
    assert "--warm-state" in warning
    assert influence_warnings(summarize_influence(influence({"a1": None}), 0.0)) == []


def defined_pairs(examples: pa.Table, influence: pa.Table, settings: Preferences) -> list[dict[str, Any]]:
    """Return pairs by definition: all helpful with all harmful examples of a prompt, those with the widest gaps."""
    floor = read_influence_metadata(influence, "noise_floor")
    measured = [row for row in influence.to_pylist() if row["status"] == "ok"]
    common = {
        "student": 0.0,
        "null_step": read_influence_metadata(influence, "null_step_influence"),
        "median": statistics.median([row["influence_student"] for row in measured] or [0.0]),
    }

    def threshold(row: dict[str, Any]) -> float:
        if settings.baseline != "prompt":
            return common[settings.baseline]
        return float(np.mean([r["influence_student"] for r in measured if r["prompt_id"] == row["prompt_id"]]))

    def sure(best: dict[str, Any], worst: dict[str, Any]) -> bool:
        error = float(np.hypot(best["standard_error"], worst["standard_error"]))
        return bool(best["influence_student"] - worst["influence_student"] > settings.margin * error)

    helpful = [row for row in measured if row["influence_student"] > threshold(row) + floor]
    harmful = [row for row in measured if row["influence_student"] < threshold(row) - floor]
    paired = [
        (best, worst)
        for prompt in dict.fromkeys(row["prompt_id"] for row in helpful)
        for best in helpful
        for worst in harmful
        if best["prompt_id"] == worst["prompt_id"] == prompt and sure(best, worst)
    ]
    widest = sorted(paired, key=lambda pair: pair[1]["influence_student"] - pair[0]["influence_student"])
    texts = {row["example_id"]: row for row in examples.to_pylist()}
    return [
        {
            "prompt_id": best["prompt_id"],
            "prompt": texts[best["example_id"]]["prompt"],
            "chosen": texts[best["example_id"]]["raw_output"],
            "rejected": texts[worst["example_id"]]["raw_output"],
            "chosen_id": best["example_id"],
            "rejected_id": worst["example_id"],
            "chosen_influence_student": best["influence_student"],
            "rejected_influence_student": worst["influence_student"],
            "chosen_influence_null_step": best["influence_null_step"],
            "rejected_influence_null_step": worst["influence_null_step"],
            "chosen_output_ids": texts[best["example_id"]]["output_ids"],
            "chosen_vocabulary": "v",
            "rejected_output_ids": texts[worst["example_id"]]["output_ids"],
            "rejected_vocabulary": "v",
        }
        for best, worst in paired
        if (best, worst) in widest[: settings.max_pairs]
    ]


@pytest.mark.parametrize("group", [1, 7, 8192])
def test_pairs_match_definition_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", group)
    monkeypatch.setattr(preferences, "ROW_GROUP", group)
    for seed in range(12):
        draw = random.Random(seed)
        ids = [f"{draw.choice('abcdefg')}{n}" for n in range(draw.randint(1, 50))]  # interleaved prompts
        values = {name: draw.choice([None, round(draw.gauss(0, 1), 1), draw.gauss(0, 1)]) for name in ids}
        sample = dict(draw.sample(sorted(values.items()), len(ids) * 3 // 4))
        measured = influence(sample, 0.2, draw.choice([0.0, 0.3]), {name: draw.random() for name in ids})
        texts = examples(*ids)
        write_table(texts, tmp_path / "examples.parquet", EXAMPLES)
        for baseline in ("student", "null_step", "median", "prompt"):
            settings = Preferences(
                baseline=baseline, max_pairs=draw.choice([None, 1, 20]), margin=draw.choice([0.0, 1.0])
            )
            made = pair_by_influence(measured, settings)
            write_preferences(made, tmp_path / "examples.parquet", tmp_path / "preferences.parquet", PREFERENCES)
            table = read_table(tmp_path / "preferences.parquet", PREFERENCES)
            assert table.to_pylist() == defined_pairs(texts, measured, settings)


def test_pairs_of_missing_examples_are_refused(tmp_path: Path) -> None:
    write_table(examples("a1", "a2"), tmp_path / "examples.parquet", EXAMPLES)
    made = pair_by_influence(influence(VALUES), Preferences(baseline="student"))
    with pytest.raises(DataError, match=r"examples.parquet: examples of the pairs are missing"):
        write_preferences(made, tmp_path / "examples.parquet", tmp_path / "preferences.parquet", PREFERENCES)
    assert not (tmp_path / "preferences.parquet").exists()


def test_parquet_bytes_do_not_depend_on_batching(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    values = dict(zip((f"{n % 7}-{n}" for n in range(20_000)), draw.normal(size=20_000), strict=True))
    table = influence(values)

    def written(pieces: pa.Table | pa.RecordBatchReader) -> bytes:
        write_table(pieces, tmp_path / "table.parquet", INFLUENCE)
        return (tmp_path / "table.parquet").read_bytes()

    expected = written(table)
    assert written(table.to_reader(max_chunksize=100)) == expected
    cuts = np.sort(draw.integers(0, 20_000, 30))
    slices = [table.slice(start, stop - start) for start, stop in zip([0, *cuts], [*cuts, 20_000], strict=True)]
    assert written(pa.concat_tables(slices)) == expected
    assert read_table(tmp_path / "table.parquet", INFLUENCE).equals(table, check_metadata=True)


GROWTH = """
import json, re, sys
from pathlib import Path
from montessori_core.config import Preferences
from montessori_core.influence.table import join_influence
from montessori_core.influence.preferences import pair_by_influence, write_preferences
from montessori_core.data.tables import INFLUENCE, PREFERENCES, read_table, write_table

folder = Path(sys.argv[1])
write_table(join_influence(sorted(folder.glob("part-*"))), folder / "influence.parquet", INFLUENCE)
pairs = pair_by_influence(read_table(folder / "influence.parquet", INFLUENCE), Preferences())
write_preferences(pairs, folder / "examples.parquet", folder / "preferences.parquet", PREFERENCES)
peak = re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]
print(json.dumps([pairs.num_rows, int(peak) * 1024]))
"""


@pytest.mark.slow
def test_pairing_keeps_no_texts_in_memory(tmp_path: Path) -> None:
    """A row has 3,400 bytes of text and takes at most 1,000 bytes of memory: 1 GB for 1,000,000 rows."""
    draw = np.random.default_rng(0)
    text = draw.integers(32, 127, 10_000_000, np.uint8).tobytes().decode()

    def example(n: int) -> dict[str, object]:
        prompt, place = 997 * (n // 4) % 9_000_000, 1009 * n % 9_000_000
        return {
            "example_id": f"probing-{n // 4}-{n % 4}",
            "prompt_id": f"probing-{n // 4}",
            "prompt": text[prompt : prompt + 2500],
            "raw_output": text[place : place + 200],
            "instruction": text[place : place + 200],
            "response": text[place : place + 500],
            "response_finished": True,
        }

    def peak(rows: int) -> int:
        folder = tmp_path / str(rows)
        folder.mkdir()
        cut = [range(start, start + 2000) for start in range(0, rows, 2000)]
        tables = (table_from_rows([example(n) for n in some], EXAMPLES) for some in cut)
        batches = (batch for table in tables for batch in table.to_batches())
        write_table(pa.RecordBatchReader.from_batches(EXAMPLES, batches), folder / "examples.parquet", EXAMPLES)
        for number, some in enumerate(cut):
            part = influence(
                {f"probing-{n // 4}-{n % 4}": float(v) for n, v in zip(some, draw.normal(size=2000), strict=True)}
            )
            part = part.set_column(1, INFLUENCE.field("prompt_id"), pa.array([f"probing-{n // 4}" for n in some]))
            write_table(part, folder / f"part-{number:05d}.parquet", INFLUENCE)
        command = [sys.executable, "-c", GROWTH, str(folder)]
        returning = {
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }  # free at once
        outcome = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | returning)
        pairs, found = json.loads(outcome.stdout)
        assert pairs > 0.7 * rows
        return int(found)

    assert (peak(100_000) - peak(50_000)) / 50_000 < 1000


def test_tables_are_validated_on_write_and_read(tmp_path: Any) -> None:
    path = tmp_path / "t.parquet"
    table = influence(VALUES)
    write_table(table, path, INFLUENCE)
    assert read_table(path, INFLUENCE).equals(table, check_metadata=True)
    with pytest.raises(DataError, match="expected table 'preferences' version 2, found 'influence'"):
        read_table(path, PREFERENCES)
    with pytest.raises(DataError, match="column 'status' is missing"):
        check(table.drop_columns(["status"]), INFLUENCE, "t")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_table(path, INFLUENCE)
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "absent.parquet", INFLUENCE)

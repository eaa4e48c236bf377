"""Names of reference sets."""

import json
import logging
from pathlib import Path
from typing import Any, NoReturn

import pytest

from flows.measurement import Measurement, names_of_targets, opened_inputs
from montessori_core.config import Cluster, DataSource, Influence, Student
from montessori_core.data.tables import INFLUENCE, table_from_rows, write_table
from montessori_core.errors import UserError
from montessori_core.influence.table import NOTES, schema_with_metadata
from support.runs import invoke


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["coding.jsonl", "builtin/maths", "openai/gsm8k"], ["coding", "maths", "gsm8k"]),
        (["a/set.jsonl.gz", "b/set.parquet", "c/set.json"], ["set", "set-2", "set-3"]),
        (["a-2.jsonl", "x/a.jsonl", "y/a.jsonl", "z/a.jsonl"], ["a-2", "a", "a-3", "a-4"]),
        (["s3://bucket/päter noster", "..."], ["p-ter-noster", "set"]),
    ],
)
def test_reference_sets_have_different_names(paths: list[str], names: list[str]) -> None:
    first, *others = (DataSource(path=path) for path in paths)
    measurement = Measurement(
        Student(model="student"), None, first, first, Influence(), "student", Cluster(), targets=tuple(others)
    )
    assert names_of_targets(measurement) == names


@pytest.mark.parametrize(
    ("command", "result", "measuring"),
    [
        ("influence", "out.parquet", "flows.influence.estimate_influence"),
        ("validate", "out.parquet/validation.json", "flows.validation._measure_predictors"),
    ],
)
def test_result_of_other_options_is_removed(
    command: str, result: str, measuring: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is interrupted leaves no result of other options or data, which would pass for its own."""

    def interrupted(*_: Any) -> NoReturn:
        raise UserError("interrupted")

    monkeypatch.setattr(measuring, interrupted)
    rows = [{"instruction": f"Do {n}.", "output": "Done."} for n in range(21)]
    for name in ("pool", "reference"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--examples", "pool.jsonl", "--reference", "reference.jsonl", "--out", "out.parquet"]
    words = [command, "--student", str(tiny_llama), *files, "--max-length", "64"]
    table = table_from_rows([], schema_with_metadata(dict.fromkeys(NOTES, 0.0)))
    rate = ["--learning-rate", "1e-4"]
    for options, edited, kept in (
        ([], False, False),
        ([], False, True),
        (rate, False, False),
        (rate, False, True),
        (rate, True, False),
    ):
        if edited:
            (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
        code, output = invoke(*words, *options, cwd=tmp_path)
        assert (code, "interrupted" in output) == (1, True), output
        assert (tmp_path / result).exists() == kept
        write_table(table, tmp_path / result, INFLUENCE)


def test_log_names_one_of_several_sets(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "montessori_core.data")
    for name, rows in (("pool", 3), ("coding", 2), ("maths", 1)):
        lines = (json.dumps({"instruction": f"Do {n}.", "output": "Done."}) for n in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    pool, coding, maths = (DataSource(path=str(tmp_path / f"{name}.jsonl")) for name in ("pool", "coding", "maths"))
    student = Student(model=str(tiny_llama), max_length=64)
    for targets, logged in (
        ((), ["reference: 2 rows, format: alpaca"]),
        ((maths,), ["coding: reference: 2 rows, format: alpaca", "maths: reference: 1 rows, format: alpaca"]),
    ):
        caplog.clear()
        measurement = Measurement(student, None, pool, coding, Influence(), "student", Cluster(), targets=targets)
        with opened_inputs(measurement, tmp_path / "measured"):
            assert caplog.messages == ["examples: 3 rows, format: alpaca", *logged]

"""Inputs of a measurement: names of reference sets, AdamW's moments, and the rate of a step."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file

from flows.measurement import Measurement, names_of_targets, opened_inputs, step_rate
from montessori_core.config import Cluster, DataSource, Influence, Student, Warmup
from montessori_core.data.tables import INFLUENCE, table_from_rows, write_table
from montessori_core.errors import DataError, UserError
from montessori_core.influence.table import NOTES, schema_with_metadata
from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.fingerprints import moments_recipe
from montessori_core.training.moments import Moments, load_moments, save_moments
from support.runs import invoke
from tasks.screening import estimate_influence


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


def _interrupted(*_: Any) -> NoReturn:
    raise UserError("interrupted")


def _write_rows(folder: Path, **files: int) -> None:
    """Write files of so many rows."""
    for name, rows in files.items():
        lines = (json.dumps({"instruction": f"Do {n}.", "output": "Done."}) for n in range(rows))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("command", "result", "measuring"),
    [
        ("influence", "out.parquet", "flows.influence.estimate_influence"),
        ("validate", "out.parquet/validation.json", "flows.validation._measure_predictors"),
        ("validate", "out.parquet/validation.html", "flows.validation._measure_predictors"),
    ],
)
def test_result_of_other_options_is_removed(
    command: str, result: str, measuring: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is interrupted leaves no result of other options or data, which would pass for its own."""
    monkeypatch.setattr(measuring, _interrupted)
    _write_rows(tmp_path, pool=21, reference=21)
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
            _write_rows(tmp_path, pool=20)
        code, output = invoke(*words, *options, cwd=tmp_path)
        assert (code, "interrupted" in output) == (1, True), output
        assert (tmp_path / result).exists() == kept
        write_table(table, tmp_path / result, INFLUENCE)


def test_refused_options_keep_the_result(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.validation._measure_predictors", _interrupted)
    _write_rows(tmp_path, pool=21, few=9, reference=8, small=7)
    (tmp_path / "gpus.yaml").write_text("resources: {influence: {gpus_per_node: 99}}")
    words = ["validate", "--student", str(tiny_llama), "--examples", "pool.jsonl", "--reference", "reference.jsonl"]
    words += ["--out", "out", "--max-length", "64"]
    code, output = invoke(*words, cwd=tmp_path)
    assert (code, "interrupted" in output) == (1, True), output
    (tmp_path / "out" / "validation.json").touch()
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    for options, message in (
        (["--subset-size", "6000"], "--subset-size 6000"),
        (["--examples", "few.jsonl"], "9 examples; a validation needs"),
        (["--reference", "small.jsonl"], "holds 7 examples"),
        (["--subset-size", "6", "--cluster", "gpus.yaml"], "99 GPUs"),
    ):
        code, output = invoke(*words, *options, cwd=tmp_path)
        assert (code, message in " ".join(output.split())) == (1, True), output
        assert {path: path.read_bytes() for path in before} == before


def test_measurement_is_finished_with_its_last_table(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several sets, whichever tables an interrupted command finds, removes and writes."""
    _write_rows(tmp_path, pool=3, a=2, b=2)
    words = ["influence", "--student", str(tiny_llama), "--examples", "pool.jsonl", "--out", "out.parquet"]
    words += ["--reference", "a.jsonl", "--reference", "b.jsonl", "--estimator", "first_order", "--max-length", "64"]
    measured = iter(())

    def measure(*arguments: Any) -> Any:
        return estimate_influence(*arguments) if next(measured, True) else _interrupted()

    monkeypatch.setattr("flows.influence.estimate_influence", measure)
    first, last = (tmp_path / f"out-{name}.parquet" for name in "ab")
    for options, absent in ([], None), (["--learning-rate", "1e-4"], None), (["--learning-rate", "1e-3"], first):
        if absent:
            absent.unlink()
        measured = iter((True, False))  # interrupted after the first table
        code, output = invoke(*words, *options, cwd=tmp_path)
        assert (code, "interrupted" in output) == (1, True), output
        assert (first.exists(), last.exists()) == (True, False)
        assert "Resume with" in invoke("status", "out.parquet.parts", cwd=tmp_path)[1]
        assert invoke(*words, *options, cwd=tmp_path)[0] == 0
        assert "Resume with" not in invoke("status", "out.parquet.parts", cwd=tmp_path)[1]


def test_log_names_one_of_several_sets(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "montessori_core.data")
    _write_rows(tmp_path, pool=3, coding=2, maths=1)
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


def test_step_has_the_rate_of_the_warm_state(tmp_path: Path) -> None:
    assert step_rate(None) == step_rate(tmp_path) == Warmup().learning_rate
    moments = Moments({"weight": torch.ones(2)}, {"weight": torch.ones(2)}, 3, {})
    save_moments(moments, tmp_path, Warmup(learning_rate=3e-5).shared())
    assert step_rate(tmp_path) == 3e-5
    assert moments_recipe(tmp_path) == {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0}
    without_rate = {"adamw": json.dumps({"step": 3, "weights": {}, "recipe": {"beta1": 0.9}})}  # as of earlier versions
    save_file(dict(moments.first), tmp_path / MOMENTS_FILE, metadata=without_rate)
    assert step_rate(tmp_path) == Warmup().learning_rate


def _write_cut(folder: Path) -> None:
    save_moments(Moments({"w": torch.zeros(500)}, {"w": torch.ones(500)}, 1), folder)
    file = folder / MOMENTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def _write_foreign(folder: Path) -> None:
    save_file({"w.first": torch.zeros(2)}, folder / MOMENTS_FILE)


@pytest.mark.parametrize(
    ("write", "reason"), [(_write_cut, r"\d+ bytes instead of \d+"), (_write_foreign, "without step, weights")]
)
def test_damaged_moments_are_refused_before_jobs(
    tiny_llama: Path, tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path)
    message = (
        rf"{MOMENTS_FILE}: not AdamW's moments, or damaged \({reason}\); copy the file again, or leave out --warm-st"
    )
    with pytest.raises(DataError, match=message):
        load_moments(tmp_path)
    (tmp_path / "pool.jsonl").write_text('{"instruction": "Say hello.", "output": "Hello."}')
    pool = DataSource(path=str(tmp_path / "pool.jsonl"))
    student = Student(model=str(tiny_llama), max_length=64)
    measurement = Measurement(student, tmp_path, pool, pool, Influence(), "student", Cluster())
    with pytest.raises(DataError, match=message), opened_inputs(measurement, tmp_path / "measured"):
        pass
    assert not (tmp_path / "measured").exists()

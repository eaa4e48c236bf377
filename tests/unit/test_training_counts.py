"""Rows that a training does not use are reported."""

import json
from pathlib import Path

import pytest

from montessori_core import programs
from montessori_core.config import Warmup, Zero, parse_experiment
from montessori_core.layout import COUNTS_FILE
from tasks import stage
from tasks.run import Model, Run
from tasks.stage import Step


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (
            {"examples": 7, "truncated": 2, "left_out": 3},
            ["3 of 10 rows were left out because they are too long", "2 of 10 rows were cut at max_length"],
        ),
        ({"pairs": 7, "left_out": 3}, ["3 of 10 rows were left out because they are too long"]),
        ({"examples": 7, "truncated": 0, "left_out": 0}, []),
    ],
)
def test_rows_left_out_are_reported(
    counts: dict[str, int], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stage, "warn", lambda label, warning: said.append(warning))
    monkeypatch.setattr(Step, "_compute", lambda *arguments, **options: [Model(str(tmp_path), "0")])
    (tmp_path / COUNTS_FILE).write_text(json.dumps(counts))
    experiment = parse_experiment({"teacher": {"model": "t"}, "student": {"model": "s"}}, "test")
    settings = programs.Sft(
        max_length=8, lora=None, recipe=Warmup().shared(), zero=Zero(stage=0), seed=0, save_moments=False
    )
    rows = [{"instruction": "Add.", "response": "4", "response_finished": True}]
    Step(Run(tmp_path, experiment), tmp_path, "warm-up").train(programs.SFT, settings, rows, {})
    assert [warning.partition(";")[0].partition(":")[0] for warning in said] == expected

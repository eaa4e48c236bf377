"""`montessori influence`: any data, any student, outside a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from montessori_core.schema import INFLUENCE, read_table

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    {"instruction": f"Describe object {i}.", "input": "", "output": f"Object {i} is " + "round " * (1 + i % 4)}
    for i in range(20)
]


def call(folder: Path, model: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "flows.cli", "influence", "--student", str(model), "--examples", "data.jsonl"]
    outcome = subprocess.run(
        [*command, "--reference", "reference.jsonl", "--out", "influence.parquet", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return outcome.returncode, outcome.stdout + outcome.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    (tmp_path / "reference.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES[:3])))
    return tmp_path


def test_any_data_is_measured_once(tiny_llama: Path, folder: Path) -> None:
    code, output = call(folder, tiny_llama, "--learning-rate", "1e-4")
    assert code == 0, output
    for text in ("20 of 20", "share that helps", "noise floor", "influence.parquet"):
        assert text in output
    table = read_table(folder / "influence.parquet", INFLUENCE)
    assert table.num_rows == 20
    # A step on what the student is measured on lowers its loss there.
    assert all(value > 0 for value in table["influence_student"].to_pylist()[:3])
    before = {path: path.stat().st_mtime_ns for path in (folder / "influence.parquet.parts").glob("part-*")}
    content = (folder / "influence.parquet").read_bytes()
    code, output = call(folder, tiny_llama, "--learning-rate", "1e-4")
    assert code == 0, output
    assert {path: path.stat().st_mtime_ns for path in (folder / "influence.parquet.parts").glob("part-*")} == before
    assert (folder / "influence.parquet").read_bytes() == content


def test_bad_options_are_refused_in_a_sentence(tiny_llama: Path, folder: Path) -> None:
    for options, message in (
        (["--estimator", "magic"], "--estimator: Input should be 'exact', 'first_order' or 'screened'"),
        (["--warm-state", str(tiny_llama)], "no adamw.safetensors there"),
        (["--reference", "absent.jsonl"], "absent.jsonl: cannot be read"),
    ):
        code, output = call(folder, tiny_llama, *options)
        assert code == 1
        assert message in " ".join(output.split())
        assert "Traceback" not in output

"""The driver's environment has no torch: all code on a login node runs without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import CONFIGS, ROOT
from support.reports import write_run, write_study
from support.runs import finish_lean
from support.slurm_lab import become_login_node

COMMANDS = """
from support.lean_driver import become_lean
become_lean()
import json, sys
from pathlib import Path
from support.runs import invoke
print(json.dumps([invoke(*command, cwd=Path.cwd()) for command in json.loads(sys.argv[1])]))
"""


def test_login_node_commands_need_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first")
    write_run(tmp_path / "runs" / "second", warmup={"learning_rate": 2e-5})
    write_study(tmp_path / "runs" / "study")
    shown = {
        ("--help",): "montessori run quickstart",
        ("report", "runs/first"): "report.html",
        ("report", "runs/first", "runs/second"): "comparison-of-runs.html",
        ("report", "runs/study"): "comparison.html",
        ("status", "runs/first"): "trial",
        ("export", "runs/first", "--to", "messages"): "training set of iteration 1, 40 rows",
        ("select", "runs/first", "--k", "3", "--output", "best.jsonl"): "3 of 39 scored rows",
    }
    command = [sys.executable, "-c", COMMANDS, json.dumps(list(shown))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for (code, output), text in zip(json.loads(outcome.stdout), shown.values(), strict=True):
        assert code == 0, output
        assert text in output, output
    assert "self_instruct" in finish_lean("methods", cwd=tmp_path)


def test_slurm_run_opens_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The login node checks data, configuration and models; only nodes load a model."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # no tensors
    program = f"""
from support.lean_driver import become_lean
become_lean()
from pathlib import Path
from montessori_core.config import read_experiment
from tasks.run import open_run
changes = ("teacher.model={model}", "student.model={model}", "cluster.profile=slurm", "cluster.slurm.max_array_size=100")
open_run(read_experiment(Path("{CONFIGS}/quickstart.yaml"), changes), Path("run"))
"""
    become_login_node(monkeypatch, tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "run" / "provenance.json").stat().st_size > 0

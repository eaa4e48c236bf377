"""The driver's environment has no torch: whatever runs on a login node does without."""

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT
from support.reports import write_run, write_study
from support.runs import lean


def test_commands_of_a_login_node_need_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first")
    write_run(tmp_path / "runs" / "second", warmup={"learning_rate": 2e-5})
    write_study(tmp_path / "runs" / "study")
    for command, shown in (
        (["--help"], "montessori run configs/quickstart.yaml"),
        (["methods"], "self_instruct"),
        (["report", "runs/first"], "report.html"),
        (["report", "runs/first", "runs/second"], "comparison-of-runs.html"),
        (["report", "runs/study"], "comparison.html"),
        (["status", "runs/first"], "trial"),
    ):
        outcome = lean(*command, cwd=tmp_path)
        output, _ = outcome.communicate(timeout=300)
        assert outcome.returncode == 0, output
        assert shown in output, output


def test_a_run_on_nodes_is_opened_without_torch(tmp_path: Path) -> None:
    """Data, configuration and models are looked at on the login node; only nodes load a model."""
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
open_run(read_experiment(Path("{ROOT}/configs/quickstart.yaml"), changes), Path("run"))
"""
    # sbatch has to be found, but is not called.
    (tmp_path / "sbatch").touch(mode=0o755)
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | paths, check=True)
    assert (tmp_path / "run" / "provenance.json").stat().st_size > 0

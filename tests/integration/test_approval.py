"""Approval of preference pairs, whoever resumes the run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from support import ROOT, wait_until
from support.runs import call, digests, kill_everything

WAITS_FOR_APPROVAL = """
from pathlib import Path
from flows.experiment import montessori
from montessori_core.config import read_experiment
montessori(read_experiment(Path("runs/tiny/config.yaml")), approve=True)
"""
"""A program that resumes a run from Prefect, with approval."""


@pytest.mark.slow
@pytest.mark.guarantee("driver lost while its run waits for approval")
def test_resume_keeps_the_required_approval(finished_run: Path, shared_server: dict[str, str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run / "runs" / "tiny", tmp_path / "runs" / "tiny"))
    folder = run / "iteration-1"
    for done in (folder / "metrics.json", *(folder / "teacher").glob("part-*.manifest.json")):
        done.unlink()
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_APPROVAL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | shared_server,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    paused = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
    api = f"{shared_server['PREFECT_API_URL']}/flow_runs/filter"
    wait_until(lambda: httpx.post(api, json=paused).json(), 120, process=waiting, pause=0.5)
    kill_everything(waiting, signal.SIGKILL)
    for _ in range(2):
        code, output = call("resume", "runs/tiny", cwd=tmp_path, **shared_server)
        assert code == 1, output
        assert "nobody has approved them" in output
        assert f"montessori resume {run} --approve-pairs" in output
        assert not list((folder / "teacher").glob("part-*.manifest.json"))
    assert "update the teacher on these pairs?" in (folder / "approval.md").read_text()
    code, output = call("resume", "runs/tiny", "--approve-pairs", cwd=tmp_path, **shared_server)
    assert code == 0, output
    assert f"approved: {folder / 'preferences.parquet'}" in output
    assert digests(run) == digests(finished_run / "runs" / "tiny")
    code, output = call("resume", "runs/tiny", "--approve-pairs", cwd=tmp_path, **shared_server)
    assert (code, "no preference pairs wait for approval" in output) == (1, True)

"""Ending the jobs that drivers have left."""

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.backends.held import _names_of
from cluster.ledger import Ledger, Submission
from cluster.processes import start_time
from cluster.status import cancel_jobs, read_stage_status
from montessori_core.config import Cluster, HeldJobs, Slurm
from montessori_core.files import read_json, write_json
from support import ROOT, squares, wait_until
from support.row_programs import as_shards
from support.slurm_lab import put_command

CANCELS_ON_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from cluster.backends.base import JobsRemain
from cluster.status import cancel_jobs
from montessori_core.config import Cluster
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # each write fails
try:
    cancel_jobs(Path(sys.argv[1]), Cluster())
except JobsRemain as error:
    print(error)
"""


def leave_jobs(folder: Path, *jobs: "subprocess.Popen[bytes]") -> Path:
    """Write a stage whose ledger has an open submission for each job, the second one of steps; return the ledger's file."""
    stage = squares.stage(folder)
    stage.write(as_shards(*squares.SHARDS))
    ledger = Ledger(stage.folder / "jobs")
    for number, job in enumerate(jobs):
        ids = [f"{job.pid}:{start_time(job.pid)}"]
        entry = Submission(f"jobs-{number}", "w", [[number]], platform.node(), 1, steps=number == 1, ids=ids)
        ledger.submissions.append(entry)
    ledger.save()
    return ledger.folder / "ledger.json"


def test_cancel_on_full_disk_ends_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local jobs, steps, those of a second stage, and held jobs, although no ledger can be written."""
    (tmp_path / "held").mkdir()
    held = f"17|17_0|RUNNING|None|3:00:00|{_names_of(tmp_path)}12345678"
    put_command(tmp_path / "bin" / "squeue", f"echo '{held}'")
    put_command(tmp_path / "bin" / "scancel", f'[ "$*" = "--quiet 17" ] && touch {tmp_path}/cancelled')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    jobs = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    for job in jobs:  # a process that nobody waits for does not end
        threading.Thread(target=job.wait).start()
    try:
        leave_jobs(tmp_path / "one", *jobs[:2])
        leave_jobs(tmp_path / "two", jobs[2])
        command = [sys.executable, "-c", CANCELS_ON_FULL_DISK, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        cancel = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert cancel.stdout.count("File too large") == 2, cancel.stderr
        assert all(job.poll() is not None for job in jobs)
        assert (tmp_path / "cancelled").exists()
    finally:
        for job in jobs:
            job.kill()


def test_slurm_jobs_end_where_none_can_be_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has squeue and scancel, and no sbatch and srun."""
    put_command(tmp_path / "bin" / "squeue", f"[ -e {tmp_path}/ended ] || echo '17|None'")
    put_command(tmp_path / "bin" / "scancel", f": >{tmp_path}/ended")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    stage = squares.stage(tmp_path)
    stage.write(as_shards(*squares.SHARDS))
    ledger = Ledger(stage.folder / "jobs")
    ledger.submissions = [Submission("jobs", "w", [[0]], None, 1, ids=["17"])]
    ledger.save()
    cluster = Cluster(profile="slurm")
    assert read_stage_status(stage.folder, cluster).state == "running"
    assert cancel_jobs(tmp_path, cluster) == 1
    assert read_stage_status(stage.folder, cluster).state == "incomplete"


@pytest.mark.parametrize(
    ("cluster", "as_steps"),
    [
        (Cluster(profile="allocation"), True),
        (Cluster(profile="slurm", slurm=Slurm(hold=HeldJobs())), True),
        (Cluster(), False),
    ],
    ids=["allocation", "held", "local"],
)
def test_jobs_of_earlier_version_end_by_profile(cluster: Cluster, as_steps: bool, tmp_path: Path) -> None:
    """Its ledgers do not say which jobs are steps: a step whose srun is killed, not terminated, continues."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    script = f"trap 'kill $!; touch {ended}; exit' TERM; sleep 600 & touch {started}; wait"
    with subprocess.Popen(["sh", "-c", script]) as job:
        try:
            wait_until(started.exists)
            file = leave_jobs(tmp_path, job)
            [entry] = read_json(file)
            entry.pop("steps")
            write_json([entry], file)
            assert cancel_jobs(tmp_path, cluster) == 1
            assert job.poll() is not None
            assert ended.exists() == as_steps
        finally:
            job.kill()

"""Which jobs the driver holds, by the answers of squeue and sbatch."""

import re
from pathlib import Path

import pytest

from cluster.backends.held import HeldBackend
from montessori_core.config import HeldJobs, Resources, Slurm
from support.slurm_lab import become_login_node, put_command

NONE: frozenset[str] = frozenset()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where sbatch accepts jobs unless both nodes are excluded; squeue shows the file `jobs`."""
    refusal = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    refusing = f'case "$*" in *--exclude=node1,node2*) echo "{refusal}" >&2; exit 1;; esac'
    become_login_node(
        monkeypatch,
        tmp_path,
        squeue=f'case "$*" in *--nodelist*) ;; *) cat {tmp_path}/jobs;; esac',
        sbatch=f'echo "$*" >>{tmp_path}/sbatch; {refusing}; echo "Submitted batch job 9"',
        scancel=f'echo "$*" >>{tmp_path}/scancel',
    )
    for name in ("jobs", "sbatch", "scancel"):
        (tmp_path / name).touch()
    return tmp_path


def backend(folder: Path, parallel_jobs: int = 2) -> HeldBackend:
    resources = Resources(parallel_jobs=parallel_jobs, time_limit_minutes=1)
    return HeldBackend(Slurm(partition="brief"), HeldJobs(minutes=1), resources, None, folder)


def test_refused_copy_of_a_slow_shard_brings_no_node_back(folder: Path) -> None:
    """The stage has excluded node1; a shard is slow on node2. No other node is left for a copy."""
    held, node1 = backend(folder), frozenset({"node1"})
    for _ in range(2):
        assert held.plan_jobs([0], 1, node1, "node2") == []
    assert len((folder / "sbatch").read_text().splitlines()) == 1  # it is not asked in vain again
    assert held.plan_jobs([1, 2], 2, node1) == []
    assert "--exclude=node1 " in (folder / "sbatch").read_text().splitlines()[-1]  # at once, and still without node1


def test_excluded_nodes_are_needed_if_no_other_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.backends.held._REFUSAL_PAUSE", 0.0)
    held = backend(folder)
    for _ in range(2):
        assert held.plan_jobs([0], 1, frozenset({"node1", "node2"})) == []
    assert "--exclude" not in (folder / "sbatch").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "given_back"),
    [
        ("time_limit", ""),
        ("out_of_memory", ""),
        *((kind, "--quiet 7_0\n") for kind in ("lost", "node_failure", "file_system", "preempted")),
    ],
)
def test_held_job_is_kept_without_fault_of_node(folder: Path, kind: str, given_back: str) -> None:
    """The next job of a training, which goes on after its time limit, starts in it at once."""
    held = backend(folder)
    (folder / "jobs").write_text(f"7|7_0|RUNNING|None|4:01:00|{held._name}\n")
    held.note_command("12:3.5", ["srun", "--jobid=7"])
    held.cancel_lost("12:3.5", kind)
    assert (folder / "scancel").read_text() == given_back


def test_held_jobs_beyond_submission_limit_become_fewer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's job stays in the queue, however long this driver waits."""
    monkeypatch.setattr("cluster.backends.held._REFUSAL_PAUSE", 0.0)
    refusal = 'echo "sbatch: error: Job violates accounting/QOS policy (job submit limit)" >&2; exit 1'
    accepting = f'case "$*" in *--array=0-[012]" "*) echo "Submitted batch job 9";; *) {refusal};; esac'
    put_command(folder / "bin" / "sbatch", f'echo "$*" >>{folder}/sbatch; {accepting}')
    held = backend(folder, parallel_jobs=8)
    for _ in range(5):
        held.plan_jobs(list(range(8)), 8, NONE)
    sizes = re.findall(r"--array=0-(\d+)", (folder / "sbatch").read_text())
    assert sizes == ["7", "0", "1", "3", "0"]


def test_jobs_of_an_earlier_driver_that_are_too_long_are_replaced(folder: Path) -> None:
    """It was killed, and had a longer cluster.slurm.hold.minutes."""
    held = backend(folder)
    (folder / "jobs").write_text(f"7|7_0|PENDING|PartitionTimeLimit|4:01:00|{held._name}\n")
    assert held.plan_jobs([0], 1, NONE) == []
    assert (folder / "scancel").read_text() == "--quiet 7_0\n"
    assert "--time=2 " in (folder / "sbatch").read_text()

"""How the answers of squeue and sbatch are read."""

from contextlib import suppress
from pathlib import Path

import pytest

from cluster.backends import open_backend
from cluster.backends.base import SchedulerUnavailable
from cluster.backends.slurm import SlurmBackend
from montessori_core.config import Cluster, HeldJobs, Resources, Slurm
from montessori_core.errors import UserError
from support.slurm_lab import become_login_node


def test_running_jobs_are_unknown_without_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have not ended: shards that they compute keep their times (`cluster.stragglers`)."""
    become_login_node(monkeypatch, tmp_path, squeue=f"[ -e {tmp_path}/up ] && echo '17_0|None'")
    backend = SlurmBackend(Slurm(), Resources(), None)
    assert backend.running("name", ["17_0"]) is None
    (tmp_path / "up").touch()
    assert backend.running("name", ["17_0"]) == {"17_0"}


LIMITED = """
size=$(echo "$*" | sed -n 's/.*--array=0-\\([0-9]*\\).*/\\1/p')
size=$((${size:-0} + 1))
echo $size >>FOLDER/sizes
if [ $size -gt 5 ]; then
  echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)" >&2
  exit 1
fi
echo "Submitted batch job 9"
"""
"""An sbatch that accepts at most five jobs at once."""


@pytest.mark.guarantee("limit on submitted jobs")
def test_arrays_beyond_submission_limit_become_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver that is a job stays in the queue, however long this one waits."""
    become_login_node(
        monkeypatch,
        tmp_path,
        squeue="echo 17",
        scontrol="echo MaxArraySize = 1001",
        sbatch=LIMITED.replace("FOLDER", str(tmp_path)),
    )
    backend = SlurmBackend(Slurm(), Resources(shards_per_job=1), None)
    for _ in range(6):
        tasks = backend.plan_jobs(list(range(40)), 40, frozenset())
        with suppress(SchedulerUnavailable):
            assert len(backend.submit("name", tmp_path / "jobs", tasks, tmp_path, 40, frozenset())) == len(tasks)
    assert (tmp_path / "sizes").read_text().split() == ["40", "1", "2", "4", "8", "1"]


def test_refused_single_job_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless another job of the user may be the cause."""
    become_login_node(
        monkeypatch,
        tmp_path,
        squeue=f"cat {tmp_path}/queue",
        sbatch='echo "Job violates accounting/QOS policy" >&2; exit 1',
    )
    backend = SlurmBackend(Slurm(), Resources(), None)
    for queue, error in (("17\n", SchedulerUnavailable), ("", UserError)):
        (tmp_path / "queue").write_text(queue)
        with pytest.raises(error) as refusal:
            backend.submit("name", tmp_path / "jobs", [[0]], tmp_path, 1, frozenset())
        assert refusal.type is error


@pytest.mark.parametrize(
    ("reason", "alive"),
    [
        ("launch failed requeued held", False),
        ("launch_failed_requeued_held", False),
        ("launch failure limit exceeded requeued held", False),
        ("launch_failure_limit_exceeded_requeued_held", False),
        ("user env retrieval failed requeued held", False),
        ("JobHoldMaxRequeue", False),
        ("job requeued in held state", True),
        ("JobHeldUser", True),
        ("Priority", True),
        ("None", True),
    ],
)
def test_alive_leaves_out_jobs_that_slurm_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, alive: bool
) -> None:
    """The reason differs between versions of Slurm. A job that its owner holds will run."""
    become_login_node(monkeypatch, tmp_path, squeue=f"echo '17_0|{reason}'")
    backend = SlurmBackend(Slurm(), Resources(), None)
    assert backend.alive("name", ["17_0"]) == ({"17_0"} if alive else set())


@pytest.mark.parametrize(
    ("refused", "other_node", "updated"),
    [
        ("*exclude=node9,node1*", False, ""),
        ("*", True, ""),  # for another reason
        ("never", True, "update jobid=17 excnodelist=node9,node1\nupdate jobid=18 excnodelist=node9,node1\n"),
    ],
)
def test_queued_jobs_are_kept_away_from_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, other_node: bool, updated: str
) -> None:
    """Slurm would hold a job for which no node is left, so it is asked first. The node may be used again without asking."""
    become_login_node(
        monkeypatch,
        tmp_path,
        sbatch=f'case "$*" in {refused}) echo "allocation failure: not available" >&2; exit 1;; esac',
        scontrol=f'echo "$*" >>{tmp_path}/updates',
    )
    (tmp_path / "updates").touch()
    backend = SlurmBackend(Slurm(exclude="node9"), Resources(), None)
    node1, ids = frozenset({"node1"}), ["17_0", "17_1", "18"]
    assert backend.can_run_outside(node1) == other_node
    backend.keep_away(ids, node1)
    assert sorted((tmp_path / "updates").read_text().splitlines(True)) == updated.splitlines(True)
    (tmp_path / "updates").write_text("")
    backend.keep_away(ids, frozenset())
    assert sorted((tmp_path / "updates").read_text().split()) == [
        *["excnodelist=node9"] * 2,
        "jobid=17",
        "jobid=18",
        *["update"] * 2,
    ]


@pytest.mark.parametrize("command", ["sbatch", "srun"])
def test_missing_command_of_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    become_login_node(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin" / command).unlink()
    for hold in (None, HeldJobs()):
        cluster = Cluster(profile="slurm", slurm=Slurm(hold=hold))
        with pytest.raises(UserError, match=f"profile is slurm, but there is no {command} here; start on a login node"):
            open_backend(cluster, Resources(), None, driven=tmp_path)

"""The profile `allocation` outside of an allocation, and how it cuts shards into jobs."""

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.backends import backend_at, open_backend
from cluster.backends.allocation import AllocationBackend, _gpus, places_in
from cluster.backends.local import process_of
from cluster.driver_job import DriverStopped
from cluster.fanout import ShardsFailed, fan_out
from cluster.ledger import Ledger, Submission, close_submissions
from cluster.processes import start_time
from cluster.progress import Progress
from cluster.stage import Stage
from cluster.status import cancel_jobs
from cluster.step import environment_of
from montessori_core.config import Cluster, Resources
from montessori_core.errors import UserError
from support import squares, wait_until
from support.row_programs import as_shards
from support.runs import configuration, invoke
from support.slurm_lab import put_command

folder = squares.folder
ALLOCATION = Cluster(profile="allocation", poll_seconds=0.05)


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_profile_allocation_needs_an_allocation() -> None:
    with pytest.raises(UserError, match=r"profile is allocation, but SLURM_JOB_ID is not set.* salloc or sbatch"):
        open_backend(ALLOCATION, Resources(), None)


def test_run_outside_an_allocation_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(configuration(tmp_path, tiny_llama).read_text()) | {"cluster": {"profile": "allocation"}}
    (tmp_path / "allocation.yaml").write_text(yaml.safe_dump(content))
    code, output = invoke("run", str(tmp_path / "allocation.yaml"), cwd=tmp_path)
    assert code == 1
    assert "start inside salloc or sbatch, or set profile: slurm" in output
    assert not (tmp_path / "runs" / "tiny" / "iteration-1").exists()


def test_jobs_take_shrinking_portions_of_shards() -> None:
    backend = AllocationBackend(ALLOCATION.slurm, Resources(parallel_jobs=4, shards_per_job=16), None)
    assert [len(task) for task in backend.plan_jobs(list(range(64)), 4, frozenset())] == [8] * 4
    assert [len(task) for task in backend.plan_jobs(list(range(32)), 1, frozenset())] == [4]
    assert [len(task) for task in backend.plan_jobs(list(range(3)), 4, frozenset())] == [1] * 3
    assert backend.plan_jobs(list(range(3)), 0, frozenset()) == []


@pytest.mark.parametrize(
    ("total", "nodes", "nodes_per_job", "per_node", "places"),
    [
        (8, 2, 1, 2, 4),
        (6, 2, 1, 2, 2),
        (6, 2, 2, 2, 1),
        (12, 3, 2, 2, 3),
        (4, 1, 2, 1, 0),
        (7, 2, 1, 4, 1),
        (6, 2, 1, 4, 0),
    ],
)
def test_places_of_jobs_are_counted_by_node(
    total: int, nodes: int, nodes_per_job: int, per_node: int, places: int
) -> None:
    assert places_in(total, nodes, nodes_per_job, per_node) == places


def test_step_is_a_local_job_of_submitit() -> None:
    step = {"STEP_NUM_TASKS": "8", "STEP_NUM_NODES": "2", "NODEID": "1", "PROCID": "5", "LOCALID": "1"}
    environment = environment_of("77", {f"SLURM_{name}": value for name, value in step.items()})
    assert environment["SUBMITIT_LOCAL_GLOBALID"] == "5"
    assert environment["SUBMITIT_LOCAL_JOB_ID"] == "77"


@pytest.mark.parametrize(
    ("answer", "gpus"),
    [
        ("TresPerNode=gres/gpu:8 NumTasks=1", 16),
        ("TresPerNode=gres/gpu:h100:8", 16),
        ("TresPerNode=gres/gpu:3090:4", 8),
        ("TresPerNode=gres/gpu:a100-sxm4:8", 16),
        ("TresPerJob=gres/gpu=3", 3),
        ("ReqTRES=cpu=4,gres/gpu=6 AllocTRES=cpu=4,gres/gpu=6", 6),
        ("TRES=cpu=4,gres/gpu=5", 5),
        ("TRES=cpu=4", 0),
    ],
)
def test_gpus_of_an_allocation_are_counted(answer: str, gpus: int) -> None:
    assert _gpus(answer, {"NumNodes": 2, "NumTasks": 1}) == gpus


def test_steps_are_ended_as_steps_after_profile_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM to srun, which then ends its step: a step whose srun is killed continues."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    put_command(
        tmp_path / "bin" / "srun", f"trap 'kill $!; touch {ended}; exit' TERM; touch {started}; sleep 600 & wait"
    )
    put_command(tmp_path / "bin" / "scontrol", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stage = Stage("squares", 1, "support.squares_program:open_squares", {}, {}, {}, tmp_path / "stage", ".json")

    def stop_driver(progress: Progress) -> None:
        if started.exists():
            raise DriverStopped

    with pytest.raises(DriverStopped):
        fan_out(stage, as_shards([{"n": 0}]), Resources(parallel_jobs=1), ALLOCATION, stop_driver)
    assert cancel_jobs(stage.folder, Cluster(profile="local")) == 1
    assert ended.exists()


@pytest.mark.guarantee("results seen late")
def test_late_result_of_adopted_step_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver knows no exit status of a step that an earlier driver started."""
    started, finish = tmp_path / "started", tmp_path / "finish"
    put_command(tmp_path / "bin" / "srun", f"touch {started}; while [ ! -e {finish} ]; do sleep 0.05; done")
    put_command(tmp_path / "bin" / "scontrol", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stage = squares.stage(tmp_path)
    drive = partial(fan_out, stage, as_shards([{"n": 3}]), Resources(parallel_jobs=1), ALLOCATION)

    def stop_driver(progress: Progress) -> None:
        if started.exists():
            raise DriverStopped

    with pytest.raises(DriverStopped):
        drive(stop_driver)
    [step] = squares.submissions(tmp_path)[0].ids or []
    turns: list[bool] = []  # of the next driver, after the step has ended

    def show_result_late(progress: Progress) -> None:
        finish.touch()
        if process_of(step) is None:
            turns.append(True)
        if len(turns) == 5:
            with stage.commit_part(0, squares.key_of(stage, [{"n": 3}]), 1, "7") as part:
                part.write_text("[9]")

    assert squares.results(drive(show_result_late)) == [9]
    [submission] = squares.submissions(tmp_path)
    assert submission.lost == {}


@pytest.mark.parametrize(
    ("message", "awaited"), [("", True), ("srun: error: node1: task 0: Exited with exit code 1\n", False)]
)
def test_failed_adopted_step_is_told_by_message(tmp_path: Path, message: str, awaited: bool) -> None:
    step = subprocess.Popen(["sleep", "600"])
    job_id = f"{step.pid}:{start_time(step.pid)}"
    backend = AllocationBackend(ALLOCATION.slurm, Resources(), None)
    backend.note_command(job_id, ["srun", "cluster.step", str(tmp_path)])
    (tmp_path / f"{step.pid}_srun.err").write_text(message)
    step.kill()
    step.wait()
    assert ("COMPLETED" in backend.exit_reason(job_id)) == awaited


@pytest.mark.parametrize("end_steps", [True, False])
def test_exit_at_once_terminates_srun(tmp_path: Path, end_steps: bool) -> None:
    """By SIGTERM after a second Ctrl-C; a driver that its job's end stops leaves steps to the next one."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    put_command(tmp_path / "srun", f"trap 'kill $!; touch {ended}; exit' TERM; sleep 600 & touch {started}; wait")
    code = f"""
import subprocess, time
from pathlib import Path
from flows.cli.interrupt import _exit
step = subprocess.Popen([{str(tmp_path / "srun")!r}], start_new_session=True)
job = subprocess.Popen(["sleep", "600"])
print(step.pid, job.pid, flush=True)
while not Path({str(started)!r}).exists():
    time.sleep(0.01)
_exit(end_steps={end_steps})
"""
    driver = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert driver.returncode == 130, driver.stderr
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in driver.stdout.split()), 10)
    assert ended.exists() == end_steps


def test_steps_of_several_submissions_end_together(tmp_path: Path) -> None:
    """Each step ends only after all were told to: it may take until Slurm's KillWait."""
    ledger = Ledger(tmp_path)
    code = """
import signal, sys, time
from pathlib import Path
def end(*_):
    Path(sys.argv[1]).touch()
    while len(list(Path.cwd().glob("told-*"))) < 3:
        time.sleep(0.01)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print(flush=True)
time.sleep(600)
"""
    steps = [
        subprocess.Popen([sys.executable, "-c", code, f"told-{n}"], cwd=tmp_path, stdout=subprocess.PIPE)
        for n in range(3)
    ]
    for step in steps:
        assert step.stdout is not None
        step.stdout.readline()
        ids = [f"{step.pid}:{start_time(step.pid)}"]
        ledger.submissions.append(Submission(f"s{step.pid}", "w", [[0]], platform.node(), 1, steps=True, ids=ids))
    assert close_submissions(ledger, Cluster(profile="local")) == 3
    assert [step.wait() for step in steps] == [0, 0, 0]
    assert ledger.open_submissions() == []


SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
mkdir "$NODES/node1" 2>/dev/null && node=node1 || node=node2
export SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
SLURMD_NODENAME=$node exec "$@"
"""
"""Runs a step here. The first is on node1, all others on node2."""
SCONTROL = """
case "$*" in
  *hostnames*) printf "node1\\nnode2\\n";;
  *) echo "JobId=17 ReqNodeList=(null) ExcNodeList=(null) NodeList=node[1-2] NumNodes=2 NumCPUs=4";;
esac
"""


@pytest.mark.guarantee("program does not open on one node")
@pytest.mark.parametrize("broken", [("node1",), ("node1", "node2")])
def test_program_must_fail_to_open_on_two_nodes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...]
) -> None:
    """A node without some library fails before other nodes have loaded a model."""
    put_command(folder / "bin" / "srun", SRUN)
    put_command(folder / "bin" / "scontrol", "exit 1")
    for name, value in {"NODES": str(folder), "SLURM_JOB_ID": "17"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    opening = f"""node = os.environ["SLURMD_NODENAME"]
    if node == "node2":
        while not any((folder / "stage" / "failures").iterdir()):
            time.sleep(0.01)
        time.sleep(1)
    if node in {broken!r}:
        raise ImportError("libcudnn.so.9")
    if taken("""
    (folder / "squares_program.py").write_text(squares.PROGRAM.replace("if taken(", opening, 1))
    drive = partial(fan_out, squares.stage(folder), as_shards(*squares.SHARDS), Resources(parallel_jobs=2), ALLOCATION)
    if len(broken) == 1:
        assert squares.results(drive()) == squares.EXPECTED
        return
    with pytest.raises(ShardsFailed, match="6 of 6 shards failed"):
        drive()
    assert len((folder / "opened.txt").read_text().split()) == 2


@pytest.mark.guarantee("program does not open on one node")
def test_broken_node_of_an_allocation_uses_up_no_retries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails fast, so it is always free; node2 computes one job at a time."""
    srun = f"""
node=node1
for option; do case "$option" in --exclude=node1) node=node2;; --exclude=*) exit 1;; esac; done
while [ "${{1#--}}" != "$1" ]; do shift; done
exec 9>{folder}/$node; flock -n 9 || {{ node=node2; exec 9>{folder}/node2; flock 9; }}
echo $node >>{folder}/nodes
export SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
SLURMD_NODENAME=$node exec "$@"
"""
    put_command(folder / "bin" / "srun", srun)
    put_command(folder / "bin" / "scontrol", SCONTROL)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    broken = "    if os.environ['SLURMD_NODENAME'] == 'node1': raise ImportError('libcudnn.so.9')\n    if taken("
    (folder / "squares_program.py").write_text(squares.PROGRAM.replace("    if taken(", broken, 1))
    resources = Resources(parallel_jobs=2, shards_per_job=1, infrastructure_retries=1, exclude_node_after=2)
    parts = fan_out(squares.stage(folder, 0.3), as_shards(*squares.SHARDS), resources, ALLOCATION)
    assert squares.results(parts) == squares.EXPECTED
    assert 1 <= (folder / "nodes").read_text().split().count("node1") <= 2


def test_nodes_of_an_allocation_are_used_again_if_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(tmp_path / "bin" / "scontrol", SCONTROL)
    put_command(tmp_path / "bin" / "srun", f'echo "$*" >>{tmp_path}/steps')
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    backend = open_backend(ALLOCATION, Resources(cpus_per_process=1), None)
    one, both, earlier = frozenset({"node1"}), frozenset({"node1", "node2"}), frozenset({"node7"})
    assert [backend.can_run_outside(nodes) for nodes in (one, both, earlier)] == [True, False, True]
    for number, avoid in enumerate((one, both, earlier)):
        backend.submit(f"s{number}", tmp_path / f"s{number}", [[0]], tmp_path, 1, avoid)
    wait_until(lambda: (tmp_path / "steps").exists() and (tmp_path / "steps").read_text().count("\n") == 3)
    excluded = {line.split("--job-name=")[1][:2]: "--exclude=node1 " in line for line in (tmp_path / "steps").open()}
    assert excluded == {"s0": True, "s1": False, "s2": False}
    assert (tmp_path / "steps").read_text().count("--exclude") == 1


def test_local_jobs_end_after_profile_changed() -> None:
    assert not isinstance(backend_at(platform.node(), False, ALLOCATION), AllocationBackend)

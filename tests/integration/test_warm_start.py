"""Local jobs forked from a warm process behave like jobs of a new interpreter."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.backends.local import LocalBackend
from cluster.fanout import fan_out
from cluster.ledger import Ledger
from cluster.records import Failure, read_record
from cluster.shards import Shards
from cluster.stage import Stage
from cluster.warm_start import Job, warm_process
from montessori_core.config import Cluster, Resources
from support import NO_LIBRARIES, ROOT, wait_until
from support.row_programs import as_shards
from support.runs import call
from support.slurm_lab import put_command

CLUSTER = Cluster(poll_seconds=0.05)
PROGRAM = """
import ctypes, json, os, random, signal, subprocess, sys, time
import psutil
from pathlib import Path

def open_expressions(settings, inputs):
    folder = Path(settings["folder"])
    def first_time(name):
        try:
            (folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
    def compute(rows, output, report):
        values = []
        for row in rows:
            print(row["n"], file=(folder / "computed.txt").open("a"))
            values.append(eval(row["value"], globals() | locals() | {"first_time": first_time, "folder": folder}))
        output.write_text(json.dumps(values))
    return compute
"""

NUMPY, TORCH = "__import__('numpy')", "__import__('torch')"
HANGS = "(folder / 'child.txt').write_text(str(subprocess.Popen(['sleep', '600']).pid)) and time.sleep(600)"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the jobs' path, the same for all tests, so that one warm process serves them all."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "expressions_program.py").write_text(PROGRAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
        patch.setenv("PYTHONSAFEPATH", "1")  # as the backend does, before it starts a warm process
        yield folder


@pytest.fixture
def stage(programs: Path, tmp_path: Path) -> Stage:
    program = "expressions_program:open_expressions"
    return Stage("expressions", 1, program, {"folder": str(tmp_path)}, {}, {}, tmp_path / "stage", ".json")


@pytest.fixture
def quick(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make warm processes import nothing, as imports do not matter here."""
    monkeypatch.setenv("PYTHONPATH", f"{NO_LIBRARIES}{os.pathsep}{os.environ['PYTHONPATH']}")


def shards_of(*values: str) -> Shards:
    """Return shards of one row each: a Python expression that a job evaluates."""
    return as_shards(*([{"n": number, "value": value}] for number, value in enumerate(values)))


def run(stage: Stage, *values: str, **options: Any) -> list[Any]:
    resources = Resources(**{"parallel_jobs": 2, "cpus_per_process": 1} | options)
    parts = fan_out(stage, shards_of(*values), resources, CLUSTER)
    return [value for part in parts for value in json.loads(part.read_text())]


def computed(stage: Stage) -> list[int]:
    file = stage.folder.parent / "computed.txt"
    return sorted(map(int, file.read_text().split())) if file.exists() else []


def job_of(stage: Stage, *values: str, seconds: float = 600.0) -> Job:
    """Start a job for shards, without a fan-out."""
    shards = shards_of(*values)
    stage.write(shards)
    folder = stage.folder / "jobs" / "by-hand"
    folder.mkdir(parents=True)
    return Job(str(folder), str(stage.folder), list(range(len(shards))), 1, 0, 1, seconds, dict(os.environ))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def logs(stage: Stage) -> str:
    return "".join(path.read_text() for path in sorted((stage.folder / "jobs").rglob("*_log.err")))


def test_jobs_start_from_one_warm_process(stage: Stage) -> None:
    pid = warm_process().pid
    parents = run(stage, *["[os.getpid(), psutil.Process(os.getppid()).ppid()]"] * 2)
    assert [parent for _, parent in parents] == [pid, pid]
    assert len({own for own, _ in parents}) == 2
    assert run(stage, "'trl.trainer.dpo_trainer' in sys.modules") == [True]


def test_finished_stage_starts_no_warm_process(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(stage, "1", "2") == [1, 2]
    monkeypatch.setattr("cluster.backends.local.warm_process", lambda: pytest.fail("started"))
    assert run(stage, "1", "2") == [1, 2]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restore SIGINT, which background processes of a shell, and interpreters that they start, ignore."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_job_ends_with_its_own_exit_functions(stage: Stage) -> None:
    """Not with those of the libraries that the warm process has imported."""
    inherited = "sum(f.atexit for f in __import__('weakref').finalize._registry)"
    own = "bool(__import__('weakref').finalize(first_time, (folder / 'ended').touch))"
    assert run(stage, inherited, own) == [0, True]
    assert (stage.folder.parent / "ended").exists()


@pytest.mark.usefixtures("interruptible")
def test_job_starts_like_new_interpreter(stage: Stage) -> None:
    state = (
        "[os.getcwd(), sys.stdin.read(), str(signal.getsignal(signal.SIGINT)), str(signal.getsignal(signal.SIGCHLD)), "
        "os.environ['OMP_NUM_THREADS'], " + TORCH + ".get_num_threads(), "
        "subprocess.run(['sh', '-c', 'exit 3']).returncode, len(os.listdir('/proc/self/fd')) < 20]"
    )
    forked = run(stage, state, cpus_per_process=1)
    parts = fan_out(stage, shards_of(f"{state} "), Resources(cpus_per_process=1), CLUSTER, python=sys.executable)
    [fresh] = json.loads(parts[0].read_text())
    assert forked[0] == fresh


def test_jobs_draw_different_random_numbers(stage: Stage) -> None:
    first, second = run(stage, *[f"[random.random(), {NUMPY}.random.random(), float({TORCH}.rand(()))]"] * 2)
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_two_ranks_train_together(programs: Path, tmp_path: Path) -> None:
    together = Stage("together", 1, "cluster.doctor_jobs:open_all_reduce", {}, {}, {}, tmp_path / "stage", ".json")
    [part] = fan_out(together, as_shards([{"n": 0}]), Resources(processes_per_node=2, cpus_per_process=1), CLUSTER)
    assert json.loads(part.read_text()) == {"processes": 2, "sum": 2.0}
    assert len(list((together.folder / "jobs").rglob("*_1_log.err"))) == 1
    [rendezvous] = (together.folder / "jobs").rglob("rendezvous-*.json")
    assert rendezvous.parent.name.startswith("montessori-stage-")  # not where a job with the same process id looks


@pytest.mark.guarantee("one process of a local job fails")
def test_failed_rank_ends_the_others(stage: Stage) -> None:
    """A rank that waits for the failed one, as in a collective operation, would hang until the job's time limit."""
    rank_1_fails = "os.environ['RANK'] == '1' and 1 / 0 or time.sleep(600)"
    with pytest.raises(Exception, match="code_error.*ZeroDivisionError") as failure:
        run(stage, rank_1_fails, processes_per_node=2)
    [failed] = failure.value.failures  # type: ignore[attr-defined]
    log = Path(failed.log)
    other = log.with_name(log.name.replace("_0_", "_1_"))
    assert f"rank 1 exited with code 1; see {other.name}" in log.read_text()
    assert "ZeroDivisionError" in other.read_text()


@pytest.mark.usefixtures("quick")
def test_job_sees_environment_of_its_submission(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONTESSORI_KEPT", "before")
    monkeypatch.setenv("MONTESSORI_REMOVED", "before")
    pid = warm_process().pid
    monkeypatch.setenv("MONTESSORI_KEPT", "after")
    monkeypatch.delenv("MONTESSORI_REMOVED")
    [seen] = run(stage, "dict(os.environ)")
    assert seen["MONTESSORI_KEPT"] == "after"
    assert "MONTESSORI_REMOVED" not in seen
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert warm_process().pid == pid


@pytest.mark.guarantee("local job crashes")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("crash", "number"),
    [("os.abort()", signal.SIGABRT), pytest.param("ctypes.string_at(0)", signal.SIGSEGV, marks=pytest.mark.slow)],
)
def test_crashing_job_affects_no_other(stage: Stage, crash: str, number: signal.Signals) -> None:
    pid = warm_process().pid
    assert run(stage, f"first_time('crash') and {crash}", "time.sleep(2) or 7") == [False, 7]
    assert computed(stage) == [0, 0, 1]
    assert f"killed by signal {number} " in logs(stage)
    assert warm_process().pid == pid


@pytest.mark.usefixtures("quick")
def test_job_log_has_its_error(stage: Stage) -> None:
    with pytest.raises(Exception, match="ZeroDivisionError") as failure:
        run(stage, "1 / 0")
    [failed] = failure.value.failures  # type: ignore[attr-defined]
    log = Path(failed.log).read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError: division by zero" in log


DRIVER = """
import os, signal, sys
sys.path[:0] = {tests!r}
import test_warm_start as tests
from pathlib import Path
folder = Path({folder!r})
stage = tests.Stage("expressions", 1, "expressions_program:open_expressions", {{"folder": str(folder)}}, {{}}, {{}},
                    folder / "stage", ".json")
{before}
print(tests.run(stage, *{values!r}))
"""


def start_driver(stage: Stage, *values: str, before: str = "") -> subprocess.Popen[str]:
    tests, folder = [str(ROOT / "tests"), str(Path(__file__).parent)], str(stage.folder.parent)
    code = DRIVER.format(tests=tests, folder=folder, values=values, before=before)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def warm_processes_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(driver.pid).children() if "cluster.warm_start" in child.cmdline()]


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_jobs_outlive_killed_driver(stage: Stage) -> None:
    values = ["time.sleep(2.5) or 5", "time.sleep(2.5) or 6"]
    driver = start_driver(stage, *values)
    wait_until(lambda: computed(stage) == [0, 1])
    [warm] = warm_processes_of(driver)
    driver.kill()
    driver.wait()
    wait_until(lambda: not lives(warm.pid), 10)
    assert run(stage, *values) == [5, 6]
    assert computed(stage) == [0, 1]


@pytest.mark.guarantee("process that forks local jobs is killed")
@pytest.mark.usefixtures("quick")
def test_jobs_outlive_killed_warm_process(stage: Stage) -> None:
    driver = start_driver(stage, "time.sleep(2.5) or 5", "time.sleep(2.5) or 6", "7")
    wait_until(lambda: computed(stage) == [0, 1])
    warm_processes_of(driver)[0].kill()
    output, errors = driver.communicate(timeout=60)
    assert output.strip() == "[5, 6, 7]", errors
    assert computed(stage) == [0, 1, 2]


@pytest.mark.guarantee("process that forks local jobs is killed")
@pytest.mark.usefixtures("quick")
def test_next_job_starts_after_warm_process_was_killed(stage: Stage) -> None:
    assert run(stage, "0") == [0]
    before = warm_process()
    os.kill(before.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"ended|Broken pipe|reset"):
        before.start(job_of(stage, "1"))
    assert run(stage, "1", "2") == [1, 2]
    assert warm_process().pid != before.pid


@pytest.mark.usefixtures("quick")
def test_cancel_kills_job_and_its_children(stage: Stage) -> None:
    file = stage.folder.parent / "child.txt"
    job_id = warm_process().start(job_of(stage, HANGS))
    wait_until(lambda: file.exists() and file.read_text())
    backend = LocalBackend(Resources(), None)
    assert backend.alive("", [job_id]) == {job_id}
    ranks = psutil.Process(int(job_id.split(":")[0])).children()
    backend.cancel([job_id])
    assert backend.alive("", [job_id]) == set()
    assert not any(lives(pid) for pid in (ranks[0].pid, int(file.read_text())))


@pytest.mark.usefixtures("quick")
def test_killed_supervisor_ends_its_ranks(stage: Stage) -> None:
    job_id = warm_process().start(job_of(stage, "time.sleep(600)"))
    wait_until(lambda: computed(stage))
    supervisor = psutil.Process(int(job_id.split(":")[0]))
    [rank] = supervisor.children()
    supervisor.kill()
    wait_until(lambda: not lives(rank.pid), 10)


@pytest.mark.usefixtures("quick")
def test_child_of_killed_rank_ends_with_job(stage: Stage) -> None:
    file = stage.folder.parent / "child.txt"
    job_id = warm_process().start(job_of(stage, HANGS))
    wait_until(lambda: file.exists() and file.read_text())
    [rank] = psutil.Process(int(job_id.split(":")[0])).children()
    rank.kill()
    wait_until(lambda: not LocalBackend(Resources(), None).alive("", [job_id]), 10)
    assert not lives(int(file.read_text()))


@pytest.mark.guarantee("local job reaches its time limit without a driver")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("deaf", [pytest.param(False, marks=pytest.mark.slow), True])
def test_time_limit_holds_without_driver(stage: Stage, deaf: bool) -> None:
    """A rank gets SIGUSR2 halfway, as from submitit; a rank that ignores it is killed at the limit."""
    mask = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGINT]) or " if deaf else ""
    job = job_of(stage, f"{mask}{HANGS}", seconds=4.0)
    code = (
        f"from cluster.warm_start import *; print(WarmProcess().start(Job(**{vars(job)!r})), flush=True); os._exit(0)"
    )
    job_id = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    wait_until(lambda: computed(stage))
    assert LocalBackend(Resources(), None).alive("", [job_id])
    wait_until(lambda: not LocalBackend(Resources(), None).alive("", [job_id]), 20)
    failure = read_record(stage.failure_file(0), Failure)
    if deaf:
        assert failure is None
        assert "the time limit of 0.0666667 minutes is over" in logs(stage)
        wait_until(lambda: not lives(int((stage.folder.parent / "child.txt").read_text())))  # killed at the same time
    else:
        assert failure is not None
        assert failure.kind == "time_limit"


@pytest.mark.guarantee("driver killed while it starts local jobs")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("answered", [False, True])
def test_job_starts_after_driver_recorded_its_id(stage: Stage, answered: bool) -> None:
    """The test plays the driver: a job whose id was not recorded never computes."""
    job = job_of(stage, "7")
    ours, theirs = socket.socketpair()
    socket.send_fds(warm_process()._control, [b"+"], [theirs.fileno()])
    theirs.close()
    ours.sendall(json.dumps(vars(job)).encode() + b"\n")
    job_id = ours.makefile().readline().strip()
    backend = LocalBackend(Resources(), None)
    assert backend.find("by-hand", Path(job.folder)) == [job_id]
    ranks = psutil.Process(int(job_id.split(":")[0])).children()
    time.sleep(0.5)
    assert computed(stage) == []
    if answered:
        ours.sendall(b"+")
    ours.close()
    wait_until(lambda: not backend.alive("", [job_id]), 10)
    wait_until(lambda: not lives(ranks[0].pid), 10)
    assert computed(stage) == ([0] if answered else [])


@pytest.mark.guarantee("driver killed while it starts local jobs")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("moment", [pytest.param("asked", marks=pytest.mark.slow), "noted"])
def test_driver_killed_during_submit_starts_nothing_twice(stage: Stage, moment: str) -> None:
    """Before it assigned work to a job, or when all jobs run and the ledger has no ids."""
    values = ["time.sleep(2) or 5", "time.sleep(2) or 6"]
    die = "os.kill(os.getpid(), signal.SIGKILL)"
    before = {
        "asked": f"send = tests.socket.send_fds\ntests.socket.send_fds = lambda *message: (send(*message), {die})",
        "noted": "save = tests.Ledger.save\n"
        f"tests.Ledger.save = lambda ledger: {die} if ledger.submissions[-1].ids else save(ledger)",
    }[moment]
    driver = start_driver(stage, *values, before=before)
    driver.wait(60)
    assert driver.returncode == -signal.SIGKILL
    [submission] = Ledger(stage.folder / "jobs").submissions
    assert submission.ids is None
    folder = stage.folder / "jobs" / submission.name
    found = LocalBackend(Resources(), None).find(submission.name, folder)
    assert len(found) == (2 if moment == "noted" else 0)
    assert run(stage, *values) == [5, 6]
    assert LocalBackend(Resources(), None).alive("", found) == set()
    assert set(computed(stage)) == {0, 1}


@pytest.mark.usefixtures("quick")
def test_gpus_of_forked_jobs_are_reserved(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.backends.local.gpus_of_this_machine", lambda: [2, 5])
    stage.write(shards_of("time.sleep(600)"))
    backend, next_backend = (LocalBackend(Resources(gpus_per_node=1), None) for _ in range(2))
    folder = stage.folder / "jobs" / "gpus"
    folder.parent.mkdir()
    ids = backend.submit("gpus", folder, [[0]], stage.folder, 1, frozenset())
    next_backend.alive("gpus", ids)  # by the next driver
    assert backend._free_gpus() == next_backend._free_gpus() == [5]
    backend.cancel(ids)
    assert backend._free_gpus() == [2, 5]


@pytest.mark.guarantee("broken library")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("library", "forked"),
    [
        ("raise ImportError('broken')", True),
        pytest.param("import os; os._exit(3)", False, marks=pytest.mark.slow),
        (
            "import mmap; file = open(__file__.replace('datasets.py', 'libcuda.so.1'))\n"
            "opened = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)",
            False,
        ),
    ],
    ids=["import error", "crash", "CUDA opened"],
)
def test_broken_library_breaks_no_job(
    stage: Stage, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, forked: bool
) -> None:
    (tmp_path / "datasets.py").write_text(library)
    (tmp_path / "libcuda.so.1").write_text("a library")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    pid = warm_process().pid
    forks = "'cluster.supervisor' in Path(f'/proc/{os.getppid()}/cmdline').read_text()"
    assert run(stage, forks, forks) == [forked, forked]
    assert warm_process().pid == pid  # another one would fail in the same way


@pytest.mark.usefixtures("quick")
def test_unresponsive_warm_process_is_awaited_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.warm_start._PATIENCE", 1.0)
    deaf = warm_process()
    os.kill(deaf.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        deaf.start(job_of(stage, "1"))
    wait_until(lambda: not lives(deaf.pid), 10)


@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME"])
def test_warm_process_follows_variables_read_by_imports(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    before = warm_process().pid
    monkeypatch.setenv(variable, "/somewhere")
    assert warm_process().pid != before


def test_warm_process_ends_with_its_driver() -> None:
    code = "from cluster.warm_start import *; print(warm_process().pid, flush=True)"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not lives(pid)


BUILT_FOR_CUDA = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        execute = found.loader.exec_module
        def exec_module(module):
            execute(module)
            module.backends.cuda.is_built = lambda: True
        found.loader.exec_module = exec_module
        return found
sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize with which torch is built for CUDA, and sees no GPU, as with a driver that is too old for it."""


@pytest.mark.slow
def test_doctor_reports_gpus_that_torch_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BUILT_FOR_CUDA)
    put_command(tmp_path / "bin" / "nvidia-smi", "echo 'GPU 0: H100'")
    (tmp_path / "cluster.yaml").write_text("{profile: local, resources: {training: {gpus_per_node: 1}}}")
    path = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    code, output = call("doctor", "--cluster", "cluster.yaml", cwd=tmp_path, CUDA_VISIBLE_DEVICES="0", **path)
    assert code == 1
    assert "BAD  training job: GPUs: torch sees 0 of 1\n      remedy: install torch's CUDA build" in output
    assert "all-reduce of two processes: 2 processes, sum 2" in output

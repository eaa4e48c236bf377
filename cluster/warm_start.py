"""Start local jobs from a process that has imported what jobs import, which costs each of them seconds otherwise.

The driver starts one such warm process and asks it for jobs over a socket. For each the warm process forks; the fork forks
the job's ranks and becomes their supervisor (`cluster.supervisor`), which reports its id and lets the ranks begin only when
the driver answers. So no job computes that a later driver cannot find: one that has no answer leaves, one that has it shows
the submission's folder in its command line. The warm process ends with the driver, jobs live on.

A job gets the environment that the driver has when it submits. Where the warm process has another working directory, or
other values of variables that are read by imports, a new one takes its place. What differs from a new interpreter: jobs of
one warm process share the seed of `hash`, and see modules as they were when it was started.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.supervisor import redirect_output

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_CUDA_ERROR_NOT_INITIALIZED = 3  # of cuda.h
_PATIENCE = 300.0  # seconds that imports may take
_READ_BY_IMPORTS = (
    "ACCELERATE_", "ATEN_", "CUDA_", "HF_", "HOME", "KMP_", "LD_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON",
    "PYTORCH_", "TORCH", "TRANSFORMERS_", "TRL_", "XDG_CACHE_HOME",
)  # fmt: skip
_PRELOADED = (
    "pyarrow.parquet",
    "montessori_core.influence.jobs",
    "montessori_core.models.load",
    "montessori_core.synthesis.transformers_engine",
    "montessori_core.training.checkpoints",
    "montessori_core.training.moments",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "datasets",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
)


@dataclass(frozen=True)
class Job:
    """What a job is told.

    Attributes:
        folder: of the submission; logs are written there.
        stage_folder: of the stage.
        task: shards.
        threads: of each rank.
        ranks: processes that work on the task together.
        seconds: time limit.
        environment: variables.
    """

    folder: str
    stage_folder: str
    task: list[int]
    threads: int
    ranks: int
    seconds: float
    environment: dict[str, str]


class WarmProcess:
    """A Python of this environment that imports what jobs import, and forks them; it ends with the process that made it."""

    def __init__(self) -> None:
        self._context = _context()
        self._answered = False
        self._control, theirs = socket.socketpair()
        with theirs:
            # What imports have to say, each job would say again into its log; errors, too.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "cluster.warm_start"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    def fits(self) -> bool:
        """Whether no other would do better: one of another context, or in place of one that ended after it had answered."""
        return self._context == _context() and (self._process.poll() is None or not self._answered)

    def start(self, job: Job) -> str:
        """Fork a job; return its id, as `cluster.backends.local.LocalBackend` has it.

        Raises:
            OSError: the warm process has ended or does not answer; the job does not run.
        """
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            ours.settimeout(_PATIENCE)
            ours.sendall(json.dumps(vars(job)).encode() + b"\n")
            try:
                with ours.makefile() as answers:
                    job_id = answers.readline().strip()
            except TimeoutError:
                self._process.kill()  # or every later job would wait as long
                raise
            if not job_id:
                raise ConnectionError(f"process {self.pid} ended, or could not fork")
            ours.sendall(b"+")
        self._answered = True
        return job_id

    def close(self) -> None:
        """End it; its jobs go on."""
        self._control.close()
        self._process.kill()
        self._process.wait()


_warm_process: WarmProcess | None = None
_lock = threading.Lock()


def warm_process() -> WarmProcess:
    """The warm process of this driver. It is started at the first call, so that its imports are over when jobs need it."""
    global _warm_process
    with _lock:
        if _warm_process is None or not _warm_process.fits():
            _close()
            _warm_process = WarmProcess()
        return _warm_process


def _close() -> None:
    if _warm_process is not None:
        _warm_process.close()


atexit.register(_close)


def _context() -> tuple[str, dict[str, str]]:
    return os.getcwd(), {name: value for name, value in os.environ.items() if name.startswith(_READ_BY_IMPORTS)}


def main() -> None:
    """Import what jobs import, then fork a job for each socket that the driver sends, until it is gone."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; whether jobs end is the driver's to say
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # jobs that have ended leave no zombies
    importlib.import_module("cluster.worker").set_library_defaults()
    for name in _PRELOADED:
        with suppress(Exception):  # a job that needs it reports the error
            importlib.import_module(name)
    _refuse_cuda()
    gc.collect()
    gc.freeze()  # collections in jobs would write to, and so copy, what they share
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _become_job(socket.socket(fileno=descriptors[0]))
            return
        os.close(descriptors[0])


def _refuse_cuda() -> None:
    """Leave if CUDA was initialised: it does not work in children of such a process.

    Raises:
        RuntimeError: a library has initialised it.
        OSError, AttributeError: CUDA's library was loaded and cannot be asked.
    """
    if "libcuda.so" not in Path("/proc/self/maps").read_text():
        return
    if ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _CUDA_ERROR_NOT_INITIALIZED:
        raise RuntimeError("a library has initialised CUDA when it was imported")


def _become_job(driver: socket.socket) -> None:
    """Fork the ranks and become their supervisor; returns in a rank, when its work is done."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    from cluster.worker import run_task

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with driver.makefile() as requests:
        request = requests.readline()
    if not request:
        return  # the driver has died
    job = Job(**json.loads(request))
    os.environ.clear()
    os.environ.update(job.environment)
    os.environ.update(  # as submitit's own controller does
        SUBMITIT_EXECUTOR="local",
        SUBMITIT_LOCAL_JOB_ID=str(os.getpid()),
        SUBMITIT_LOCAL_NTASKS=str(job.ranks),
        SUBMITIT_LOCAL_JOB_NUM_NODES="1",
        SUBMITIT_LOCAL_NODEID="0",
    )
    submission = DelayedSubmission(run_task, job.stage_folder, job.task, job.threads)
    submission.set_timeout(job.seconds / 60, 0)
    submission.dump(JobPaths(job.folder, str(os.getpid())).submitted_pickle)
    waiting, gate = os.pipe()
    pids = []
    for rank in range(job.ranks):
        pid = os.fork()
        if pid == 0:
            driver.close()
            os.close(gate)
            _die_with_parent()
            if os.read(waiting, 1):
                _work(job, rank)
            return
        pids.append(pid)
    os.dup2(driver.fileno(), 0)
    os.set_inheritable(gate, True)
    arguments = [job.folder, str(gate), str(job.seconds), *map(str, pids)]
    os.execv(sys.executable, [sys.executable, "-m", "cluster.supervisor", *arguments])


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent is killed: a job whose id is gone computes nothing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(job: Job, rank: int) -> None:
    """Run one rank as submitit does, in what is as good as a new interpreter."""
    from submitit.core.submission import process_job
    from submitit.core.utils import JobPaths

    paths = JobPaths(job.folder, os.environ["SUBMITIT_LOCAL_JOB_ID"], rank)
    redirect_output(paths.stdout, paths.stderr)
    os.environ.update(SUBMITIT_LOCAL_GLOBALID=str(rank), SUBMITIT_LOCAL_LOCALID=str(rank))
    # A new interpreter has these seeded by chance, and torch told by OMP_NUM_THREADS when it is imported.
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()
        torch.set_num_threads(job.threads)
    process_job(job.folder)


if __name__ == "__main__":
    main()

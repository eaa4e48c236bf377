"""Fork local jobs from a warm process that has already imported their libraries; this saves seconds per job.

The driver starts the warm process and requests jobs over a socket. For each job the warm process forks; the fork forks
the job's ranks and becomes their supervisor (`cluster.supervisor`), which reports its id and starts the ranks only when
the driver answers. So a later driver can find every job that computes: a job without an answer exits, and a job with an
answer has the submission's folder in its command line. The warm process ends with the driver; jobs keep running.

A job gets the driver's environment at submission. If the working directory or a variable that imports read has changed, the
driver starts a new warm process. Unlike new interpreters, the jobs of a warm process share the seed of `hash` and the
modules as they were when it started.
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
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.supervisor import redirect_output

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_CUDA_ERROR_NOT_INITIALIZED = 3  # from cuda.h
_PATIENCE = 300.0  # seconds for the imports
_READ_BY_IMPORTS = (
    "ACCELERATE_", "ATEN_", "CUDA_", "GOMP_", "HF_", "HOME", "KMP_", "LD_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON",
    "PYTORCH_", "TORCH", "TRANSFORMERS_", "TRL_", "XDG_CACHE_HOME",
)  # fmt: skip
_PRELOADED = (
    "pyarrow.parquet",
    "montessori_core.influence.jobs",
    "montessori_core.models.load",
    "montessori_core.synthesis.jobs",
    "montessori_core.synthesis.transformers_engine",
    "montessori_core.training.dpo",
    "montessori_core.training.sft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "datasets",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
)


@dataclass(frozen=True)
class Job:
    """Request for a job.

    Attributes:
        folder: folder of the submission and its logs.
        stage_folder: folder of the stage.
        task: shards to compute.
        threads: threads of each rank.
        gpus: number of GPUs of the job, which `environment` names.
        ranks: number of processes of the job.
        seconds: time limit.
        environment: environment variables.
    """

    folder: str
    stage_folder: str
    task: list[int]
    threads: int
    gpus: int
    ranks: int
    seconds: float
    environment: dict[str, str]


class WarmProcess:
    """A process that imports the libraries of jobs and forks jobs; it ends with the process that created it."""

    def __init__(self) -> None:
        self._context = _context()
        self._answered = False
        self._control, child_end = socket.socketpair()
        with child_end:
            # Discard output and errors of imports: a job that imports the module again reports them in its log.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "cluster.warm_start"],
                stdin=child_end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    def fits(self) -> bool:
        """Whether it can be used as it is: the context is unchanged, and it is running or ended before its first answer."""
        return self._context == _context() and (self._process.poll() is None or not self._answered)

    def start(self, job: Job) -> str:
        """Fork a job; return its id in the format of `cluster.backends.local.LocalBackend`.

        Raises:
            OSError: the warm process has ended or does not answer; the job does not run.
        """
        driver_end, child_end = socket.socketpair()
        with driver_end:
            with child_end:
                socket.send_fds(self._control, [b"+"], [child_end.fileno()])
            driver_end.settimeout(_PATIENCE)
            driver_end.sendall(json.dumps(vars(job)).encode() + b"\n")
            try:
                with driver_end.makefile() as answers:
                    job_id = answers.readline().strip()
            except TimeoutError:
                self._process.kill()  # otherwise every later job would wait as long
                raise
            if not job_id:
                raise ConnectionError(f"process {self.pid} ended or could not fork")
            driver_end.sendall(b"+")
        self._answered = True
        return job_id

    def close(self) -> None:
        """End the process; its jobs keep running."""
        self._control.close()
        self._process.kill()
        self._process.wait()


_warm_process: WarmProcess | None = None
_lock = threading.Lock()


def warm_process() -> WarmProcess:
    """Return the warm process of this driver. The first call starts it, so that it imports while the driver prepares jobs."""
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
    """Import the libraries of jobs, then fork a job for each socket that the driver sends, until the driver ends."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the driver ends jobs
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended jobs leave no zombies
    gc.disable()  # what is imported stays; looking for garbage among it takes a quarter of the time
    importlib.import_module("cluster.worker").set_library_defaults()
    for name in _PRELOADED:
        with suppress(Exception):  # a job that needs it reports the error
            importlib.import_module(name)
    with suppress(Exception):
        # The first model that a process loads compiles patterns of weight names of every architecture.
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    with suppress(Exception):
        # Each job asks for the plugins of submitit, which reads the metadata of all installed packages.
        importlib.import_module("submitit.core.plugins").get_job_environments()
    with suppress(Exception):
        if importlib.import_module("torch").version.cuda is None:  # with CUDA, DeepSpeed's import might initialise it
            importlib.import_module("montessori_core.training.engine").import_deepspeed()
    _refuse_cuda()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # there is no public list of them
        finalizer.atexit = False  # those of torch's libraries take a fifth of the time of a small job, at its end
    gc.collect()
    gc.freeze()  # garbage collection in jobs would copy shared memory pages
    gc.enable()
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
    """Fail if CUDA is initialised: it does not work in forked children.

    Raises:
        RuntimeError: an import has initialised CUDA.
        OSError, AttributeError: CUDA's library is loaded, but the check fails.
    """
    if "libcuda.so" not in Path("/proc/self/maps").read_text():
        return
    if ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _CUDA_ERROR_NOT_INITIALIZED:
        raise RuntimeError("importing a library initialised CUDA")


def _become_job(driver: socket.socket) -> None:
    """Fork the ranks and become their supervisor; only a rank returns, after its work."""
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
    submission = DelayedSubmission(run_task, job.stage_folder, job.task, job.threads, job.gpus)
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
                _run_rank(job, rank)
            return
        pids.append(pid)
    os.dup2(driver.fileno(), 0)
    os.set_inheritable(gate, True)
    arguments = [job.folder, str(gate), str(job.seconds), *map(str, pids)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "cluster.supervisor", *arguments])


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent is killed: no rank computes without its supervisor."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run_rank(job: Job, rank: int) -> None:
    """Run one rank as submitit does, with random seeds and threads as in a new interpreter."""
    from submitit.core.submission import process_job
    from submitit.core.utils import JobPaths

    paths = JobPaths(job.folder, os.environ["SUBMITIT_LOCAL_JOB_ID"], rank)
    redirect_output(paths.stdout, paths.stderr)
    os.environ.update(SUBMITIT_LOCAL_GLOBALID=str(rank), SUBMITIT_LOCAL_LOCALID=str(rank))
    # A new interpreter seeds these at random, and torch reads OMP_NUM_THREADS at import.
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()
        torch.set_num_threads(job.threads)
    process_job(job.folder)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # The interpreter's own end would free the libraries object by object, after copying the pages that it shares.
    os._exit(0)


if __name__ == "__main__":
    main()

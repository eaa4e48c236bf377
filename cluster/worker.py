"""A job on its node: opens the stage's program once, then computes and commits its shards in order.

It runs under submitit, as one process or as several that train together, and knows neither Prefect nor the driver.
"""

import logging
import os
import platform
import shutil
import sys
import time
import traceback
from pathlib import Path
from subprocess import CalledProcessError, TimeoutExpired
from typing import Any

import submitit

from cluster.file_systems import is_full, may_pass, node_is_full
from cluster.memory import keep_freed_memory
from cluster.partial_commits import compute_rows, remove_partial_files
from cluster.processes import seconds_since, start_time
from cluster.records import Failure, read_record
from cluster.rendezvous import join_processes
from cluster.retry import gpu_memory_remedy
from cluster.stage import RowClock, Stage
from cluster.tempdirs import private_folders
from montessori_core.environment import set_process_defaults
from montessori_core.files import write_json
from montessori_core.program import Compute, NotOpened, ProcessLost, Row, RowProgram, open_program

log = logging.getLogger(__name__)

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "'EngineCore': -9",  # vLLM's, killed while it loads
)
_BROKEN_GPU = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "CUDA-capable devices are busy or unavailable",
    "CUDA unknown error",
    "No CUDA GPUs are available",
    "Found no NVIDIA driver",
    "system not yet initialized",
)
"""Errors that tell of a node's GPU or driver. An error of a kernel, such as a device-side assert, tells of the code."""
_FULL_GPU = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_FULL_HOST = "DefaultCPUAllocator: can't allocate memory"  # torch has no type for it
_SPINS = "1000"
"""How often a waiting thread of torch looks for the others before it sleeps. By libgomp's default, 300,000, threads spin for
milliseconds, which slows a job down where other processes use the cores, too; see benchmarks/busy_machine.py."""


def run_task(folder: str, indices: list[int], threads: int, gpus: int = 0) -> None:
    """Compute those of the shards `indices` of the stage in `folder` that are not done.

    An error is recorded with its traceback and ends the task; the driver submits the remaining shards again.

    Args:
        folder: folder of the stage.
        indices: shards of the task.
        threads: threads of this process.
        gpus: GPUs for which the job asked on each of its nodes; jobs that an earlier version queued do not say it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Before torch is imported, so that its thread pools get the same size.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    set_library_defaults()
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):  # a job on GPUs returns memory: others on its node may need it
        keep_freed_memory()
    stage = Stage.read(Path(folder))
    environment = submitit.JobEnvironment()
    stage.record_start(environment.job_id, _node(), int(_attempt()))
    with private_folders(f"{environment.job_id}-{environment.global_rank}"):
        join_processes(environment)
        _compute_shards(stage, indices, gpus, environment)


def set_library_defaults() -> None:
    """Set environment variables that libraries read, unless the user has set them."""
    set_process_defaults()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _compute_shards(stage: Stage, indices: list[int], gpus: int, environment: submitit.JobEnvironment) -> None:
    opened: Compute[Any] | RowProgram[Any] | None = None
    begun = time.monotonic() - _seconds_alive()
    for index in indices:
        opening = 0.0
        try:
            rows = stage.read_rows(index)
            key = stage.key(rows)
            if stage.is_done(index, key):
                continue
            log.info("%s: shard %d, %d rows, on %s", stage.name, index, len(rows), platform.node())
            if opened is None:
                inputs = {**stage.inputs, "shared": stage.shared_folder}
                program = open_program(stage.entry, stage.settings_type, stage.settings, inputs)
                if gpus and "torch" in sys.modules and stage.check_gpus:
                    from montessori_core.models.device import check_gpus  # drivers never import torch

                    check_gpus(gpus)
                opened = program
                opening = time.monotonic() - begun
            _compute_shard(stage, index, key, rows.to_pylist(), opened, environment, opening)
        except Exception as error:
            on_node = is_full(error) and node_is_full(stage.folder)
            kind = "lost" if on_node else classify_error(error)
            remedy = gpu_memory_remedy(stage.kind) if kind == "gpu_out_of_memory" else ""
            failure = {
                "job_id": environment.job_id,
                "attempt": _attempt(),
                "class": kind,
                "opening": opened is None or isinstance(error, NotOpened),
                "loading": isinstance(error, NotOpened),
                "node": _node(),
                "error": f"{type(error).__name__}: {error}{remedy}",
                "traceback": traceback.format_exc(),
            }
            # Of several processes, the first failure is the cause: the others only lose their connection.
            recorded = read_record(stage.failure_file(index), Failure)
            if recorded is None or (recorded.job_id, recorded.attempt) != (failure["job_id"], failure["attempt"]):
                write_json(failure, stage.failure_file(index))
            raise


def _seconds_alive() -> float:
    """Return the age of this process: a job's cost includes the interpreter's start and imports."""
    return max(0.0, seconds_since(start_time(os.getpid())))


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _attempt() -> str:
    """Return how often Slurm has requeued this job, whose id stays the same."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def classify_error(error: BaseException) -> str:
    """Return the class of a failure that the job itself caught."""
    if isinstance(error, NotOpened) and error.__cause__ is not None:
        return classify_error(error.__cause__)
    text, at_runtime = str(error), isinstance(error, RuntimeError)
    if type(error).__name__ == "OutOfMemoryError" or (at_runtime and any(sign in text for sign in _FULL_GPU)):
        return "gpu_out_of_memory"
    if isinstance(error, MemoryError) or (at_runtime and _FULL_HOST in text):
        return "out_of_memory"
    if is_full(error):
        return "disk_full"
    if may_pass(error):
        return "file_system"
    if type(error).__name__ == "UncompletedJobError" or _is_requeue_failure(error):
        return "time_limit"  # submitit raises it when a job was requeued too often
    peer_lost = type(error).__name__ in ("DistBackendError", "DistNetworkError", "EngineDeadError")
    lost_or_broken = at_runtime and any(sign in text for sign in _LOST_PEER + _BROKEN_GPU)
    if isinstance(error, ProcessLost) or peer_lost or lost_or_broken:
        return "lost"  # another process of the job died without an error of its own, or the node cannot compute
    return "code_error"


def _is_requeue_failure(error: BaseException) -> bool:
    """Return whether submitit could not requeue this job at its time limit, in the middle of its computation.

    A container may have no scontrol, and a controller may be down.
    """
    if isinstance(error, OSError):
        return str(error.filename) == "scontrol"
    command = error.cmd if isinstance(error, CalledProcessError | TimeoutExpired) else None
    return isinstance(command, list) and command[:2] == ["scontrol", "requeue"]


def _compute_shard(
    stage: Stage,
    index: int,
    key: str,
    rows: list[Row],
    opened: Compute[Any] | RowProgram[Any],
    environment: submitit.JobEnvironment,
    opening: float,
) -> None:
    first, processes, job = environment.global_rank == 0, environment.num_tasks, environment.job_id
    clock = RowClock(stage.progress_file(index), job)
    if isinstance(opened, RowProgram):
        if first:  # processes do not split rows among themselves
            with stage.commit_part(index, key, len(rows), job, clock, 1, opening) as temporary:
                compute_rows(opened, rows, stage.partial_folder, index, key, temporary, clock)
            remove_partial_files(stage.partial_folder, index)
    elif first:
        with stage.commit_part(index, key, len(rows), job, clock, processes, opening) as temporary:
            opened(rows, temporary, clock)
    else:
        scratch = stage.folder / f".rank-{environment.global_rank}-of-{index:05d}.tmp"
        try:
            opened(rows, scratch, lambda done: None)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

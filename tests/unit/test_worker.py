"""Classes of the failures that a job catches itself."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import submitit
import torch
from submitit.slurm.slurm import SlurmJobEnvironment

from cluster.backends.slurm import _Restartable
from cluster.step import run_step
from cluster.worker import classify_error
from montessori_core.errors import UserError
from montessori_core.program import NotOpened, ProcessLost
from support import ROOT, squares
from support.row_programs import as_shards
from support.slurm_lab import put_command

folder = squares.folder


@pytest.mark.parametrize("fault", ["exit 1", "exec /bin/sleep 60", None])
def test_classify_error_counts_failed_requeueing_as_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    """The controller is down, or does not answer; or there is no scontrol, as in a container."""
    if fault is not None:
        put_command(tmp_path / "bin" / "scontrol", fault)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    call = subprocess.check_call
    monkeypatch.setattr("subprocess.check_call", lambda command, timeout: call(command, timeout=timeout / 120))
    with pytest.raises((OSError, subprocess.SubprocessError)) as failure:
        SlurmJobEnvironment()._requeue(1)
    assert classify_error(failure.value) == "time_limit"


def test_classify_error_keeps_failed_commands_as_code_errors() -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        subprocess.check_call(["false"])
    assert classify_error(failure.value) == "code_error"
    assert classify_error(FileNotFoundError(2, "No such file or directory", "rows.jsonl")) == "code_error"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA error: uncorrectable ECC error encountered", "lost"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "lost"),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", "lost"),
        ("No CUDA GPUs are available", "lost"),
        ("Found no NVIDIA driver on your system.", "lost"),
        ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", "lost"),
        ("CUDA error: device-side assert triggered", "code_error"),
        ("CUDA error: an illegal memory access was encountered", "code_error"),
        ("CUDA error: out of memory", "gpu_out_of_memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "gpu_out_of_memory"),
        ("a copy of the model failed: OutOfMemoryError: CUDA out of memory. Tried to allocate", "gpu_out_of_memory"),
        ("Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}", "lost"),
        (
            "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
            "code_error",
        ),
    ],
)
def test_classify_error_tells_broken_gpu_from_broken_code(message: str, kind: str) -> None:
    assert classify_error(RuntimeError(message)) == kind


def test_classify_error_tells_host_from_gpu_memory() -> None:
    assert (
        classify_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")) == "gpu_out_of_memory"
    )
    assert classify_error(MemoryError()) == "out_of_memory"
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert classify_error(failure.value) == "out_of_memory"


def test_classify_error_of_late_loading_is_that_of_its_cause() -> None:
    failure = NotOpened("vLLM did not load the model")
    assert classify_error(failure) == "code_error"
    for cause, kind in (
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "lost"),
        (ProcessLost("a copy of the model ended without an error"), "lost"),
        (type("EngineDeadError", (Exception,), {})("EngineCore encountered an issue"), "lost"),  # as vLLM's
        (OSError(errno.ESTALE, "Stale file handle"), "file_system"),
        (UserError("vLLM has no such option"), "code_error"),
    ):
        failure.__cause__ = cause
        assert classify_error(failure) == kind


@pytest.mark.parametrize(
    ("own", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_waiting_threads_of_jobs_soon_sleep(own: dict[str, str], spins: str) -> None:
    """Asked of the library that torch has loaded, since it reads the variable only once."""
    code = "from cluster.worker import set_library_defaults; set_library_defaults(); import torch"
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = kept | own | {"OMP_DISPLAY_ENV": "verbose"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", shown.stderr) == [spins]


def test_jobs_queued_by_earlier_version_run(folder: Path) -> None:
    """Their pickles do not say how many GPUs they asked for."""
    stage = squares.stage(folder)
    stage.write(as_shards(*squares.SHARDS))
    executor = submitit.LocalExecutor(stage.folder / "jobs" / "earlier")
    jobs = [executor.submit(task, str(stage.folder), [i], 1) for i, task in enumerate((_Restartable(), run_step))]
    for index, job in enumerate(jobs):
        job.result()
        assert stage.is_done(index)

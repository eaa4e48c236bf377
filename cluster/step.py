"""A process of a job that is an srun step: it runs as submitit's local jobs do, and commits before its step ends."""

import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from submitit.core.submission import process_job

from cluster.worker import run_task

_WARNING_SECONDS = 30.0  # between SIGUSR2 and the time limit, as for local jobs


def run_step(folder: str, indices: list[int], threads: int, gpus: int = 0) -> None:
    """Run a task; SIGTERM, which Slurm sends at the end of the allocation, asks it to commit and exit."""
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGUSR2))
    run_task(folder, indices, threads, gpus)


def main(folder: Path, seconds: float, job_id: str) -> None:
    """Run this rank of a job.

    Args:
        folder: folder of the submission, with the job's pickle.
        seconds: time limit.
        job_id: id of the srun process.
    """
    os.environ.update(environment_of(job_id, os.environ))
    warning = min(_WARNING_SECONDS, seconds / 2)
    limit = threading.Timer(seconds - warning, os.kill, [os.getpid(), signal.SIGUSR2])
    limit.daemon = True
    limit.start()
    process_job(folder)


def environment_of(job_id: str, step: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of submitit's local jobs from those of a Slurm step."""
    return {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": job_id,
        "SUBMITIT_LOCAL_NTASKS": step["SLURM_STEP_NUM_TASKS"],
        "SUBMITIT_LOCAL_JOB_NUM_NODES": step["SLURM_STEP_NUM_NODES"],
        "SUBMITIT_LOCAL_NODEID": step["SLURM_NODEID"],
        "SUBMITIT_LOCAL_GLOBALID": step["SLURM_PROCID"],
        "SUBMITIT_LOCAL_LOCALID": step["SLURM_LOCALID"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])

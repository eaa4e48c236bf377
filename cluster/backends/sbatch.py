"""Submission with the options of the configuration alone, whatever the driver's environment holds."""

import copy
import logging
import os
import shlex
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths

from cluster.backends.base import SchedulerUnavailable

log = logging.getLogger(__name__)

DRIVER_JOB = "MONTESSORI_DRIVER_JOB"
"""Environment variable: in a driver's job, its unique name."""

CONTROLLER_DOWN = ("Unable to contact slurm controller", "Socket timed out", "Zero Bytes were transmitted")
SBATCH_PATIENCE = 120.0
"""Seconds that sbatch may take to answer."""
_OF_A_JOB = ("SLURM", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
"""Prefixes of variables that Slurm sets in a job; sbatch reads them as options, or passes them to the new job."""
_OF_A_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS"}
_NEVER = {
    "SBATCH_ARRAY_INX",
    "SBATCH_WAIT",
    DRIVER_JOB,
    "PYTHONSAFEPATH",  # ours for local processes; scripts of cluster.slurm.setup may import modules beside them
}


class SbatchExecutor(submitit.SlurmExecutor):
    """submitit's executor, but options are on sbatch's command line, where no variable such as SBATCH_PARTITION overrides
    them, and a driver inside a job passes on nothing of that job."""

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return sbatch_command(submission_file_path, os.environ)

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
        """Submit several tasks as one array. submitit's own method would submit it by an executor of submitit's class."""
        if len(delayed_submissions) == 1:
            return list(super()._internal_process_submissions(delayed_submissions))
        folder = JobPaths.get_first_id_independent_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        pickles = [folder / f"{uuid.uuid4().hex}.pkl" for _ in delayed_submissions]
        for delayed, path in zip(delayed_submissions, pickles, strict=True):
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            delayed.dump(path)
        array = copy.copy(self)
        array.parameters = {**self.parameters, "map_count": len(pickles)}
        first = array._submit_command(self._submitit_command_str)
        processes = list(range(first.num_tasks))
        jobs = [self.job_class(self.folder, f"{first.job_id}_{task}", processes) for task in range(len(pickles))]
        for job, path in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(path, "submitted_pickle")
        return jobs


def sbatch_command(script: Path, environment: Mapping[str, str]) -> list[str]:
    """Return the command that submits a script: its options, without variables that change or break the submission.

    Variables that a user sets outside of a job, such as SBATCH_ACCOUNT, remain the defaults of options that are not set.
    """
    options = [word for line in options_of(script.read_text()) for word in shlex.split(line)]
    removed = _NEVER & environment.keys()
    if "SLURM_JOB_ID" in environment:
        _report_surrounding_job(environment["SLURM_JOB_ID"])
        removed |= _names_of_job(environment)
    return ["env", *(f"--unset={name}" for name in sorted(removed)), "sbatch", *options, str(script)]


def options_of(text: str) -> list[str]:
    """Return the options in a batch script's text, as they are written: those that follow `#SBATCH`."""
    prefix = "#SBATCH "
    return [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]


def call_sbatch(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Call sbatch for a script, with further options; return its answer.

    Raises:
        SchedulerUnavailable: sbatch does not answer; it may have accepted the job.
    """
    *command, file = sbatch_command(script, os.environ)
    try:
        return subprocess.run(
            [*command, *options, file], capture_output=True, text=True, timeout=SBATCH_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SchedulerUnavailable(f"sbatch did not answer within {SBATCH_PATIENCE:.0f} s") from error


def check_script(text: str) -> str | None:
    """Ask Slurm whether it would accept a batch script, without submitting it; return why not, None if it would.

    Raises:
        SchedulerUnavailable: sbatch does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.sh"
        script.write_text(text, encoding="utf-8")
        answer = call_sbatch(script, "--test-only")
    if any(sign in answer.stderr for sign in CONTROLLER_DOWN):
        raise SchedulerUnavailable(f"sbatch: {answer.stderr.strip()}")
    lines = answer.stderr.strip().splitlines() or [f"sbatch exited with code {answer.returncode}"]
    return None if answer.returncode == 0 else "; ".join(lines)


def environment_outside_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables without those of the surrounding job, which srun and sbatch read as options."""
    removed = _NEVER | _names_of_job(environment)
    return {name: value for name, value in environment.items() if name not in removed}


def _names_of_job(environment: Mapping[str, str]) -> set[str]:
    return {name for name in environment if name.startswith(_OF_A_JOB)} - _OF_A_CLUSTER


@cache
def _report_surrounding_job(job_id: str) -> None:
    log.info("the driver runs inside Slurm job %s: its SLURM_* variables are not passed to sbatch", job_id)

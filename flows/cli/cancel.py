"""The command cancel."""

from cluster.lock import end_driver, refuse_other_owner
from cluster.status import cancel_jobs
from flows.cli.console import console
from flows.cli.options import DrivenFolder
from tasks.resume import resume_command
from tasks.studies import reopen


def cancel(run_dir: DrivenFolder) -> None:
    """Cancel a run, a study or an evaluation: end its driver and all its jobs. Finished work is kept."""
    run = reopen(run_dir)
    refuse_other_owner(run.folder)
    ended = end_driver(run.folder)
    jobs = cancel_jobs(run.folder, run.experiment.cluster)
    if not ended and not jobs:
        console.print("nothing of this run is running")
        return
    console.print(f"cancelled; finished work is kept. Resume with: {resume_command(run.folder)}", soft_wrap=True)

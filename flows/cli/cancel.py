"""The command cancel."""

from cluster.lock import end_driver, refuse_other_owner
from cluster.status import cancel_jobs, stages_of
from flows.cli.console import console
from flows.cli.options import RunFolder
from tasks.run import reopen_run
from tasks.studies import in_study


def cancel(run_dir: RunFolder) -> None:
    """Cancel a run: end its driver and all its jobs. Finished work is kept."""
    run = reopen_run(run_dir)
    refuse_other_owner(run.folder)
    ended = end_driver(run.folder)
    jobs = sum(cancel_jobs(folder, run.experiment.cluster) for folder in stages_of(run.folder))
    if not ended and not jobs:
        console.print("nothing of this run is running")
        return
    command = "montessori compare, and the study's file" if in_study(run.folder) else f"montessori resume {run.folder}"
    console.print(f"cancelled; finished work is kept. Resume with: {command}", soft_wrap=True)

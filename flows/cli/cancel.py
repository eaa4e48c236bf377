"""The command cancel."""

from cluster.lock import end_driver
from cluster.status import cancel_jobs, stages_of
from flows.cli.console import console
from flows.cli.options import RunFolder
from tasks.run import reopen_run
from tasks.studies import in_study


def cancel(run_dir: RunFolder) -> None:
    """End a run: its driver and all of its jobs, and nothing else. What is done is kept."""
    run = reopen_run(run_dir)
    ended = end_driver(run.folder)
    jobs = sum(cancel_jobs(folder, run.experiment.cluster) for folder in stages_of(run.folder))
    if not ended and not jobs:
        console.print("nothing of this run is at work")
        return
    again = "montessori compare, and the study's file" if in_study(run.folder) else f"montessori resume {run.folder}"
    console.print(f"cancelled; what is done is kept. Go on with: {again}", soft_wrap=True)

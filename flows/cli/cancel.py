"""The command cancel."""

from rich.console import Console

from cluster.lock import end_driver
from cluster.status import cancel_jobs, stages_of
from flows.cli.console import console
from flows.cli.options import RunFolder
from tasks.run import Run
from tasks.studies import in_study


def cancel(run_dir: RunFolder) -> None:
    """End a run: its driver and all of its jobs, and nothing else. What is done is kept."""
    from flows.cli.cancel import cancel_run
    from tasks.run import reopen_run

    cancel_run(reopen_run(run_dir), console)


def cancel_run(run: Run, console: Console) -> None:
    """End a run's driver and all of its jobs, and nothing else."""
    ended = end_driver(run.folder)
    jobs = sum(cancel_jobs(folder, run.experiment.cluster) for folder in stages_of(run.folder))
    if ended or jobs:
        again = (
            "montessori compare, and the study's file" if in_study(run.folder) else f"montessori resume {run.folder}"
        )
        console.print(f"cancelled; what is done is kept. Go on with: {again}", soft_wrap=True)
    else:
        console.print("nothing of this run is at work")

"""Reaching into a run from outside its driver: logs, cancelling, single shards again."""

from pathlib import Path

from rich.console import Console

from cluster.status import cancel_jobs, forget, log_of, stages_of
from montessori_core.errors import UserError
from tasks.run import Run, end_driver
from tasks.studies import in_study


def stage_folder(run: Run, name: str | None) -> Path:
    """The folder of a run's stage; without a name, of the last that began.

    Raises:
        UserError: there is none of that name.
    """
    folders = stages_of(run.folder)
    if not folders:
        raise UserError(f"{run.folder}: no stage has begun")
    if name is None:
        return folders[-1]
    known = [str(folder.relative_to(run.folder)) for folder in folders]
    if name not in known:
        raise UserError(f"{run.folder}: no stage {name!r}; there are {', '.join(known)}")
    return run.folder / name


def show_log(run: Run, stage: str | None, shard: int, lines: int | None, console: Console) -> None:
    """Print the log of a shard's last job, or the end of it."""
    path = log_of(stage_folder(run, stage), shard)
    text = path.read_text(errors="replace").splitlines()
    for line in text if lines is None else text[-lines:]:
        console.print(line, soft_wrap=True)
    console.print(f"log: {path}", soft_wrap=True)


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


def forget_shard(run: Run, stage: str | None, shard: int) -> None:
    """Have one shard computed again by the next driver."""
    forget(stage_folder(run, stage), shard)

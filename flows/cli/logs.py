"""The command logs."""

from typing import Annotated

import typer

from cluster.driver_job import log_of_driver
from cluster.status import log_of
from flows.cli.console import console
from flows.cli.options import DrivenFolder, StageName, stage_folder
from montessori_core.errors import UserError
from tasks.studies import reopen


def logs(
    run_dir: DrivenFolder,
    shard: Annotated[int | None, typer.Option(help="The shard, counted from 0.")] = None,
    stage: StageName = None,
    driver: Annotated[
        bool, typer.Option("--driver", help="The driver's log instead, if it runs as a Slurm job.")
    ] = False,
    lines: Annotated[
        int | None, typer.Option(min=1, help="Number of lines to print, from the end; by default all.")
    ] = None,
) -> None:
    """Print the log of a shard's last job, or of the driver."""
    if driver == (shard is not None):
        raise UserError("name one log: --shard K, or --driver")
    run = reopen(run_dir)
    path = log_of_driver(run.folder) if shard is None else log_of(stage_folder(run, stage), shard)
    if not path.exists():
        raise UserError(f"{path}: missing; the driver writes it if it runs as a Slurm job, once the job has started")
    text = path.read_text(errors="replace").splitlines()
    for line in text if lines is None else text[-lines:]:
        console.print(line, soft_wrap=True)
    console.print(f"log: {path}", soft_wrap=True)

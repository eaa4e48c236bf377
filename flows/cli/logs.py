"""The command logs."""

from typing import Annotated

import typer
from rich.console import Console

from cluster.status import log_of
from flows.cli.console import console
from flows.cli.options import RunFolder, stage_folder
from tasks.run import Run


def logs(
    run_dir: RunFolder,
    shard: Annotated[int, typer.Option(help="The shard, counted from 0.")],
    stage: Annotated[
        str | None, typer.Option(help="The stage, as status names it; by default the last that began.")
    ] = None,
    lines: Annotated[int | None, typer.Option(min=1, help="Only so many lines from its end.")] = None,
) -> None:
    """Print the log of the last job that worked on a shard."""
    from flows.cli.logs import show_log
    from tasks.run import reopen_run

    show_log(reopen_run(run_dir), stage, shard, lines, console)


def show_log(run: Run, stage: str | None, shard: int, lines: int | None, console: Console) -> None:
    """Print the log of a shard's last job, or the end of it."""
    path = log_of(stage_folder(run, stage), shard)
    text = path.read_text(errors="replace").splitlines()
    for line in text if lines is None else text[-lines:]:
        console.print(line, soft_wrap=True)
    console.print(f"log: {path}", soft_wrap=True)

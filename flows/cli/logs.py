"""The command logs."""

from typing import Annotated

import typer

from cluster.status import log_of
from flows.cli.console import console
from flows.cli.options import RunFolder, StageName, stage_folder
from tasks.run import reopen_run


def logs(
    run_dir: RunFolder,
    shard: Annotated[int, typer.Option(help="The shard, counted from 0.")],
    stage: StageName = None,
    lines: Annotated[
        int | None, typer.Option(min=1, help="Number of lines to print, from the end; by default all.")
    ] = None,
) -> None:
    """Print the log of a shard's last job."""
    path = log_of(stage_folder(reopen_run(run_dir), stage), shard)
    text = path.read_text(errors="replace").splitlines()
    for line in text if lines is None else text[-lines:]:
        console.print(line, soft_wrap=True)
    console.print(f"log: {path}", soft_wrap=True)

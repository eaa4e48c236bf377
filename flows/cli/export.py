"""The command export: write data of a run for other trainers."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from flows.cli.options import RunFolder, warn
from montessori_core import layout
from montessori_core.errors import UserError


def export(
    run_dir: RunFolder,
    to: Annotated[str, typer.Option(help="Format: messages, sharegpt, alpaca, trl or parquet.")],
    what: Annotated[
        str,
        typer.Option(help="training (set of the student), preferences (pairs of the teacher) or scored (influence)."),
    ] = "training",
    output: Annotated[
        Path | None, typer.Option(help="New folder; by default RUN_DIR/exports/WHAT-FORMAT. Nothing is overwritten.")
    ] = None,
    iteration: Annotated[
        int | None, typer.Option(min=1, help="Iteration; by default the last that has the set.")
    ] = None,
    finished_only: Annotated[
        bool, typer.Option("--finished-only", help="Leave out responses that were cut at the token limit.")
    ] = False,
) -> None:
    """Export data of a run in the format of other trainers, with a data card.

    The folder has a README.md with the header of the Hugging Face hub; datasets.load_dataset reads it.
    """
    from montessori_core.export.sets import SETS, open_set
    from montessori_core.export.write import format_named, write_export

    if what not in SETS:
        raise UserError(f"--what {what}: no such set; give one of {', '.join(SETS)}")
    data = open_set(run_dir.resolve(), what, iteration)
    form = format_named(to, data)
    folder = output or run_dir / layout.EXPORTS / f"{what}-{to}"
    exported = write_export(data, form, folder, finished_only)
    if exported.unfinished:
        warn(
            [
                f"{exported.unfinished:,} of {exported.rows:,} responses were cut at the token limit (response_finished is "
                "false): other trainers teach the student to stop there; leave them out with --finished-only"
            ]
        )
    left_out = f", {exported.left_out:,} unfinished left out" if exported.left_out else ""
    console.print(
        f"{data.title} of iteration {data.iteration}, {exported.rows:,} rows{left_out}: {folder}", soft_wrap=True
    )

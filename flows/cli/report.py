"""The command report."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from montessori_core import layout
from montessori_core.errors import UserError
from tasks.resume import STUDY
from tasks.run import reopen_run
from tasks.studies import PAGE, read_comparison


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folder of a run or study, or of several runs to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page to write, .html; by default in the run folder, or in the current folder for several runs."
        ),
    ] = None,
) -> None:
    """Write the report of a run or a study, or a page that compares several runs.

    The report of a run is report.html in its folder; that of a study is comparison.html.
    Several runs give comparison-of-runs.html in the current folder.
    The data of each figure is written next to the page as CSV.
    """
    from montessori_core.config import read_study
    from montessori_report.compare_page import render_runs
    from montessori_report.html import is_page
    from montessori_report.run_page import render_report
    from montessori_report.study_page import study_page

    if out is not None and out.suffix != ".html":
        raise UserError(f"--out {out}: the page is HTML; its name must end in .html")
    if out is not None and out.is_file() and not is_page(out):
        raise UserError(
            f"--out {out}: exists and is not a Montessori report; nothing is overwritten: name another file"
        )
    resolved = [run.resolve() for run in runs]
    if twice := [run for run in runs if resolved.count(run.resolve()) > 1]:
        raise UserError(f"{twice[-1]}: given twice; name each run once")
    if len(runs) == 1 and (runs[0] / STUDY).exists():
        page = study_page(read_study(runs[0] / STUDY), read_comparison(runs[0]), runs[0])
        path = out or runs[0] / PAGE
    elif len(runs) == 1:
        folder = reopen_run(runs[0]).folder
        page, path = render_report(folder), out or folder / layout.REPORT
    else:
        page = render_runs([reopen_run(folder).folder for folder in runs])
        path = out or Path("comparison-of-runs.html")
    try:
        page.write(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from error
    console.print(f"report: {path}", soft_wrap=True)
    console.print(f"data of the figures: {path.with_name(f'{path.stem}-data')}", soft_wrap=True)

"""The command export: write data of a run for other trainers, to a folder or to a hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import console
from flows.cli.options import RunFolder, warn
from montessori_core import layout
from montessori_core.errors import UserError
from montessori_core.files import commit, refuse_existing

if TYPE_CHECKING:
    from montessori_core.export.hub import HubSet
    from montessori_core.export.sets import RunSet
    from montessori_core.export.write import Exported

_HUB = "hub"


def export(
    run_dir: RunFolder,
    to: Annotated[str, typer.Option(help="Format: messages, sharegpt, alpaca, trl or parquet; or hub, with --repo.")],
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
    repo: Annotated[str | None, typer.Option(help="With --to hub: id of the data set, OWNER/NAME.")] = None,
    format: Annotated[
        str | None, typer.Option(help="With --to hub: format of the rows; by default messages, trl for preferences.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --to hub: create it as a private data set.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="With --to hub: replace other contents of the data set.")
    ] = False,
) -> None:
    """Export data of a run in the format of other trainers, with a data card.

    The folder has a README.md with the header of the Hugging Face hub; datasets.load_dataset reads it. With --to hub it is
    pushed there; the token is HF_TOKEN, or that of hf auth login.
    """
    from montessori_core.export.hub import HubSet
    from montessori_core.export.sets import SETS, open_set

    if what not in SETS:
        raise UserError(f"--what {what}: no such set; give one of {', '.join(SETS)}")
    if (to == _HUB) != (repo is not None) or (to != _HUB and (format or private or replace)):
        raise UserError("--to hub needs --repo OWNER/NAME; --repo, --format, --private and --replace need --to hub")
    data = open_set(run_dir.resolve(), what, iteration)
    if repo is not None:
        form = format or ("trl" if what == "preferences" else "messages")
        _push(data, form, output, finished_only, HubSet(repo, private, replace))
    else:
        folder = output or run_dir / layout.EXPORTS / f"{what}-{to}"
        exported = _write(data, to, folder, finished_only)
        console.print(f"{_describe(data, exported)}: {folder}", soft_wrap=True)


def _write(data: "RunSet", form: str, folder: Path, finished_only: bool) -> "Exported":
    from montessori_core.export.write import format_named, write_export

    exported = write_export(data, format_named(form, data), folder, finished_only)
    if exported.unfinished:
        warn(
            [
                f"{exported.unfinished:,} of {exported.rows:,} responses were cut at the token limit (response_finished is "
                "false): other trainers teach the student to stop there; leave them out with --finished-only"
            ]
        )
    return exported


def _describe(data: "RunSet", exported: "Exported") -> str:
    left_out = f", {exported.left_out:,} unfinished left out" if exported.left_out else ""
    return f"{data.title} of iteration {data.iteration}, {exported.rows:,} rows{left_out}"


def _push(data: "RunSet", form: str, output: Path | None, finished_only: bool, target: "HubSet") -> None:
    from montessori_core.export.hub import check_hub, push

    check_hub(target, "--repo")
    with tempfile.TemporaryDirectory() as temporary:
        kept = output or Path(temporary) / f"{data.name}-{form}"
        refuse_existing(kept, "folder")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with commit(kept) as folder:  # after the push, so that a refused one can be repeated
            exported = _write(data, form, folder, finished_only)
            address, pushed = push(
                folder, target, f"{data.title} of iteration {data.iteration}, {exported.rows:,} rows"
            )
            refuse_existing(kept, "folder")
    console.print(f"{_describe(data, exported)}{f': {output}' if output else ''}", soft_wrap=True)
    console.print(f"{'pushed to' if pushed else 'already there, nothing pushed:'} {address}", soft_wrap=True)

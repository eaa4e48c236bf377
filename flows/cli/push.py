"""The command push: copy what a finished run made to a remote folder or a hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from flows.cli.console import console
from flows.cli.options import RunFolder
from montessori_core import layout
from montessori_core.config.secrets import hide_logins
from montessori_core.errors import UserError

if TYPE_CHECKING:
    from montessori_core.export.hub import HubSet

_HUB = "hf://"


def push(
    run_dir: RunFolder,
    to: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="fsspec path, such as s3://BUCKET/FOLDER, gs://..., file:///...; or hf://datasets/OWNER/NAME, a data set "
            "of the Hugging Face hub.",
        ),
    ],
    models: Annotated[bool, typer.Option(help="Also the last student and teacher.")] = True,
    merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA adapters into their base models.")] = False,
    private: Annotated[bool, typer.Option("--private", help="With hf://: create it as a private data set.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what another push sent there.")] = False,
) -> None:
    """Copy a run's tables, models and report to a remote folder or a hub, with a data card.

    Finished iterations are copied. The same command continues an interrupted copy, and does nothing when all is there.
    datasets.load_dataset reads the folder. A file system needs its package (s3fs, gcsfs, ...) and takes its login from the
    environment.
    """
    from montessori_core.export.run_folder import finished_sets, gather
    from montessori_report.run_page import render_published_report

    if private and not to.startswith(_HUB):
        raise UserError("--private needs --to hf://datasets/OWNER/NAME")
    if "://" not in to:
        raise UserError(f"--to {to}: write a URL such as s3://BUCKET/FOLDER, or file://{Path(to).absolute()}")
    target = _hub_set(to, private, replace) if to.startswith(_HUB) else None
    sets = finished_sets(run_dir)
    exports = run_dir / layout.EXPORTS
    exports.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="push-", dir=exports) as temporary:
        gather(sets, Path(temporary), models, merge)
        report = render_published_report(run_dir, sets[-1].experiment)
        (Path(temporary) / layout.REPORT).write_text(report.html, encoding="utf-8")
        if target is None:
            _copy(Path(temporary), to, replace)
        else:
            _push_to_hub(Path(temporary), target, f"run {run_dir.resolve().name}")


def _hub_set(to: str, private: bool, replace: bool) -> "HubSet":
    from montessori_core.export.hub import HubSet, check_hub

    kind, _, name = to.removeprefix(_HUB).partition("/")
    if kind != "datasets":
        raise UserError(f"--to {to}: write hf://datasets/OWNER/NAME")
    target = HubSet(name, private, replace)
    check_hub(target, "--to hf://datasets/")
    return target


def _push_to_hub(folder: Path, target: "HubSet", message: str) -> None:
    from montessori_core.export import hub

    address, pushed = hub.push(folder, target, message)
    console.print(f"{'pushed to' if pushed else 'already there, nothing pushed:'} {address}", soft_wrap=True)


def _copy(folder: Path, to: str, replace: bool) -> None:
    from montessori_core.export.remote import copy_folder

    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True, desc="copied") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        sent = copy_folder(folder, to, replace, show)
    there = hide_logins(to)
    console.print(
        f"{sent} files copied to {there}" if sent else f"already there, nothing copied: {there}", soft_wrap=True
    )

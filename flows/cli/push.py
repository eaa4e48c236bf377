"""The command push: copy what a finished run made to a remote folder or a hub."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from flows.cli.console import console
from flows.cli.options import RunFolder
from montessori_core import layout
from montessori_core.errors import UserError

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
    private: Annotated[bool, typer.Option("--private", help="With hf://: create it as a private data set.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what another push sent there.")] = False,
) -> None:
    """Copy a run's tables, models and report to a remote folder or a hub, with a data card.

    Finished iterations are copied. The same command continues an interrupted copy, and does nothing when all is there.
    datasets.load_dataset reads the folder. A file system needs its package (s3fs, gcsfs, ...) and takes its login from the
    environment.
    """
    from montessori_core.export.run_folder import finished_sets, gather

    if private and not to.startswith(_HUB):
        raise UserError("--private needs --to hf://datasets/OWNER/NAME")
    finished_sets(run_dir)
    if "://" not in to:
        raise UserError(f"--to {to}: write a URL such as s3://BUCKET/FOLDER, or file://{Path(to).absolute()}")
    exports = run_dir / layout.EXPORTS
    exports.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="push-", dir=exports) as temporary:
        folder = Path(temporary)
        if to.startswith(_HUB):
            _push_to_hub(run_dir, folder, models, to, private, replace)
        else:
            gather(run_dir, folder, models)
            _copy(folder, to, replace)


def _push_to_hub(run: Path, folder: Path, models: bool, to: str, private: bool, replace: bool) -> None:
    from montessori_core.export import hub
    from montessori_core.export.run_folder import gather

    kind, _, name = to.removeprefix(_HUB).partition("/")
    if kind != "datasets":
        raise UserError(f"--to {to}: write hf://datasets/OWNER/NAME")
    target = hub.HubSet(name, private, replace)
    hub.check_hub(target, "--to hf://datasets/")
    gather(run, folder, models)
    address, pushed = hub.push(folder, target, f"run {run.resolve().name}")
    console.print(f"{'pushed to' if pushed else 'already there, nothing pushed:'} {address}", soft_wrap=True)


def _copy(folder: Path, to: str, replace: bool) -> None:
    from montessori_core.export.remote import copy_folder

    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True, desc="copied") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        sent = copy_folder(folder, to, replace, show)
    console.print(f"{sent} files copied to {to}" if sent else f"already there, nothing copied: {to}", soft_wrap=True)

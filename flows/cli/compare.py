"""The commands of studies: compare, methods."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from flows.cli.interrupt import interruptible
from flows.cli.options import warn
from flows.cli.tables import print_comparison


def compare(
    study: Annotated[Path, typer.Argument(help="Study: a YAML file or a preset, e.g. quickstart.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one field, e.g. experiment.training.examples=100."),
    ] = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds runs and studies.")] = Path("runs"),
) -> None:
    """Compare methods of making training data on equal terms. To resume after an interruption, run the same command again."""
    from flows.study import compare_opened, open_study
    from montessori_core.config import read_study

    settings = read_study(study, tuple(set_ or []))
    folder = run_root / settings.name
    seeded, warnings = open_study(settings, folder)
    warn(warnings)
    command = ["montessori", "compare", str(study), "--run-root", str(run_root)]
    command += [part for override in set_ or [] for part in ("--set", override)]
    interruptible(lambda: compare_opened(settings, folder, seeded), shlex.join(command))
    print_comparison(folder)


def methods() -> None:
    """List the methods that a study can compare."""
    from flows.methods import REGISTRY

    width = max(map(len, REGISTRY))
    for method in REGISTRY.values():
        console.print(f"{method.name:<{width}}", style="bold", end=" ")
        console.print(method.description)

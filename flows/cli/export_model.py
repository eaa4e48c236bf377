"""The command model export: copy a trained model of a run, with a model card."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from flows.cli.options import RunFolder
from montessori_core.errors import UserError


def export_model(
    run_dir: RunFolder,
    role: Annotated[str, typer.Argument(help="student or teacher.")],
    output: Annotated[Path, typer.Option(help="New folder. Nothing is overwritten.")],
    iteration: Annotated[
        int | None, typer.Option(min=1, help="Iteration; by default the last that has the model.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into its base model (float32).")] = False,
) -> None:
    """Copy a trained student or teacher of a run to a folder, with a model card."""
    from montessori_core.export import models
    from tasks.run import reopen_run

    roles: dict[str, models.Role] = {name: name for name in models.ROLES}
    if role not in roles:
        raise UserError(f"{role}: no such model; give one of {', '.join(roles)}")
    copied = models.export_model(reopen_run(run_dir).folder, roles[role], output, iteration, merge)
    console.print(f"{copied}: {output}", soft_wrap=True)

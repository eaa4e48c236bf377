"""The command model prune."""

import re
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from montessori_core.errors import UserError
from montessori_core.models.fetch import fetch_model

ModelName = Annotated[str, typer.Argument(help="Folder, Hugging Face id or embedded name, e.g. smollm2-135m.")]
LayerRanges = Annotated[
    str,
    typer.Option(metavar="RANGES", help="Layers to remove, counted from 0: 12-19 or 3,7,12-19, both ends included."),
]
NewFolder = Annotated[Path, typer.Option(help="Folder to write; it must not exist.")]


def prune(model: ModelName, out: NewFolder, layers: LayerRanges = "") -> None:
    """Remove transformer layers from a causal language model, to get a student that training can heal.

    A pruned model is cheaper, and it has much to learn again: an instruct model gains little from what a teacher of
    its own kind writes. Remove adjacent layers, and keep the first and the last ones (Gromov et al., arXiv:2403.17887).

    The folder has config.json, safetensors of the model's dtype and the tokenizer, like any other model:

      montessori model prune smollm2-135m --layers 12-19 --out pruned
      montessori run quickstart --name healed --set student.model=./pruned

    smollm2-135m-pruned is the embedded name of this one: a configuration can use it without the first command.
    """
    from montessori_core.models.prune import prune_model

    removed = parse_layers(layers)
    parameters = prune_model(fetch_model(model), removed, out)
    console.print(f"{out}: {parameters:,} parameters remain", soft_wrap=True)


def parse_layers(ranges: str) -> set[int]:
    """Return the numbers in ranges such as 3,7,12-19.

    Raises:
        UserError: a part is neither a number nor a rising range.
    """
    layers: set[int] = set()
    for part in filter(None, ranges.split(",")):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--layers: {part.strip()!r} is neither a number nor a range; write 12-19, or 3,7,12-19")
        layers |= set(range(first, last + 1))
    return layers

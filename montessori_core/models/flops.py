"""Floating-point operations of this process: two for each weight and token forward, twice as many backward.

Weights are those that tokens are multiplied with: a table of embeddings is only looked up. Left out are attention's own
products, which grow with length, and what is computed twice to save memory.

Appendix E.3 counts otherwise: it charges the forward pass of a whole input of 128 tokens, 1.92e12 operations at 8B, for every
token, about 110 times as many as there are. Its totals do not compare with these.
"""

import math
from pathlib import Path
from typing import Any

from montessori_core.models.fingerprints import weight_shapes

FORWARD, BACKWARD = 2, 4
_spent = _told = 0


def read_and_reset() -> int:
    """Operations since this was last asked, or since the process began."""
    global _told
    fresh, _told = _spent - _told, _spent
    return fresh


def record_operations(weights: int, tokens: int, backward: bool = False) -> None:
    """Count so many tokens through so many weights, and back if they will be trained on."""
    global _spent
    _spent += (FORWARD + backward * BACKWARD) * weights * tokens


def count(model: Any) -> Any:
    """Have a causal language model count what it does; returns the model."""
    import torch

    layers, head = model.base_model, model.get_output_embeddings()
    looked_up = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    weights = sum(_size(parameter) for parameter in layers.parameters() if id(parameter) not in looked_up)

    def through_layers(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        if ids is None:
            ids = named["inputs_embeds"][..., 0]
        record_operations(weights, ids.numel(), torch.is_grad_enabled())

    def through_head(module: Any, arguments: Any) -> None:
        record_operations(_size(head.weight), arguments[0].numel() // arguments[0].shape[-1], torch.is_grad_enabled())

    layers.register_forward_pre_hook(through_layers, with_kwargs=True)
    head.register_forward_pre_hook(through_head)
    return model


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # of a partitioned weight, the whole


def weights_of(folder: Path) -> int:
    """The same weights of a model that is not loaded here, from the headers of its safetensors files."""
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(folder).items()}
    tied = not any(name.endswith("lm_head.weight") for name in sizes)
    return sum(size for name, size in sizes.items() if tied or not name.endswith("embed_tokens.weight"))

"""Count the floating-point operations of this process: two per weight and token forward, four backward.

A frozen weight, such as those under a LoRA adapter, takes two backward: it passes gradients on, and has none itself.
Weights are those that tokens are multiplied with; an embedding table is only looked up. Not counted: the products within
attention, which grow with length, and recomputation that saves memory.

Appendix E.3 counts differently: it charges the forward pass of a whole input of 128 tokens, 1.92e12 operations at 8B, for
every token, about 110 times too many. Its totals are not comparable with these.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from montessori_core.models.fetch import full_model
from montessori_core.models.fingerprints import weight_shapes

FORWARD, BACKWARD, FROZEN_BACKWARD = 2, 4, 2
_total = _reported = 0


def read_and_reset() -> int:
    """Return the operations since the last call, or since the process started."""
    global _reported
    operations, _reported = _total - _reported, _total
    return operations


def record_operations(weights: int, tokens: int) -> None:
    """Add the operations of `tokens` tokens through `weights` weights, forward."""
    global _total
    _total += FORWARD * weights * tokens


def record_pass(parameters: Iterable[Any], tokens: int) -> None:
    """Add the operations of `tokens` tokens through parameters: forward, and backward if gradients are enabled."""
    import torch

    global _total
    for parameter in parameters:
        backward = BACKWARD if parameter.requires_grad else FROZEN_BACKWARD
        _total += (FORWARD + torch.is_grad_enabled() * backward) * _size(parameter) * tokens


def count(model: Any) -> Any:
    """Make a causal language model count its operations; return the model."""
    layers, head = model.base_model, model.get_output_embeddings()
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    weights = [parameter for parameter in layers.parameters() if id(parameter) not in embeddings]

    def count_layers(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        if ids is None:
            ids = named["inputs_embeds"][..., 0]
        record_pass(weights, ids.numel())

    def count_head(module: Any, arguments: Any) -> None:
        record_pass([head.weight], arguments[0].numel() // arguments[0].shape[-1])

    layers.register_forward_pre_hook(count_layers, with_kwargs=True)
    head.register_forward_pre_hook(count_head)
    return model


def _size(parameter: Any) -> int:
    if (quantized := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(quantized.shape)  # a weight in 4 bits is stored two to a byte
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ds_numel: full size of a ZeRO-partitioned weight


def weights_of(folder: Path) -> int:
    """Count the same weights of a model on disk, or of an adapter's base model, from the headers of safetensors files."""
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(full_model(folder)).items()}
    tied = not any(name.endswith("lm_head.weight") for name in sizes)
    return sum(size for name, size in sizes.items() if tied or not name.endswith("embed_tokens.weight"))

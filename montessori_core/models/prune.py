"""Remove transformer layers from a causal language model.

A pruned model is a cheaper student with much to learn: training on synthetic data heals it.

Tensors are copied file by file as they are stored, so dtype and tied embeddings stay, and memory holds one file at a time.
"""

import re
import shutil
from collections.abc import Collection, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from montessori_core.errors import UserError
from montessori_core.files import commit, write_json
from montessori_core.layout import COUNTS_FILE, LOG_FILE
from montessori_core.models.fingerprints import (
    ADAPTER,
    FINGERPRINT,
    WEIGHTS_INDEX,
    weight_files,
    weight_shapes,
    write_fingerprint,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")
_NOT_COPIED = {"config.json", WEIGHTS_INDEX, FINGERPRINT, LOG_FILE, COUNTS_FILE, "trainer_state.json"}
_LAYER_NUMBER = re.compile(r"(layer|block)_?(idx|id|index|number)")


def prune_model(model: Path, layers: Collection[int], folder: Path) -> int:
    """Write the model of a folder without some of its layers, and return how many parameters remain.

    Args:
        model: folder with config.json, safetensors and tokenizer.
        layers: numbers of the layers to remove; the first layer is 0.
        folder: the folder to write, which must not exist.

    Raises:
        UserError: `layers` does not fit the model, its layers cannot be found or depend on their number, or `folder`
            exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder")
    if (model / ADAPTER).exists():
        raise UserError(f"{model} holds a LoRA adapter, which has no layers of its own; merge it into its model first")
    config = _load_config(model)
    kept = _kept_layers(int(config.num_hidden_layers), layers)
    pruned_config = _prune_config(config, kept)
    original, pruned = _without_weights(config), _without_weights(pruned_config)
    path = _find_layers(original, config.num_hidden_layers)
    _check_roles(original.get_submodule(path), pruned.get_submodule(path), kept)
    prefix = _stored_prefix(model, path, config.num_hidden_layers)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with commit(folder) as temporary:
        pruned_config.save_pretrained(temporary)
        _copy_weights(model, temporary, prefix, kept)
        for file in {file for pattern in _COPIED for file in model.glob(pattern)}:
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, temporary / file.name)
        write_fingerprint(temporary)
    return sum(parameter.numel() for parameter in pruned.parameters())


def _load_config(model: Path) -> "PretrainedConfig":
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UserError(f"pruning needs the 'train' extra ({error}); pip install 'montessori[train]'") from error
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of {model} cannot be loaded: {error}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(f"{model} is quantised; prune the model that it was quantised from")
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UserError(f"cannot find the layers of {model}: its configuration has no num_hidden_layers")
    return config


def _kept_layers(total: int, layers: Collection[int]) -> list[int]:
    """Return the numbers of the layers that stay, in order."""
    numbered = f"the model has {total} layers, 0 to {total - 1}"
    if not layers:
        raise UserError(f"no layers to remove; name them, for example 12-19 ({numbered})")
    if out_of_range := sorted(layer for layer in layers if not 0 <= layer < total):
        raise UserError(f"there is no layer {out_of_range[0]}: {numbered}")
    if not (kept := [layer for layer in range(total) if layer not in layers]):
        raise UserError(f"all layers would be removed; keep at least one ({numbered})")
    return kept


def _prune_config(config: "PretrainedConfig", kept: Sequence[int]) -> "PretrainedConfig":
    """Return the configuration of the kept layers: lists with an entry per layer keep theirs, e.g. `layer_types`."""
    total = config.num_hidden_layers
    values: dict[str, Any] = {
        name: [value[layer] for layer in kept]
        for name, value in config.to_dict().items()
        if re.search("layer|block", name) and isinstance(value, list) and len(value) == total
    }
    for name in ("max_window_layers", "first_k_dense_replace"):  # the role of the first layers, as a count of them
        if isinstance(first := getattr(config, name, None), int):
            values[name] = sum(layer < first for layer in kept)
    pruned = deepcopy(config)
    pruned.update({"num_hidden_layers": len(kept), **values})
    return pruned


def _without_weights(config: "PretrainedConfig") -> "PreTrainedModel":
    """Return the model of a configuration on the meta device: modules and shapes, no numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config))
            return model
    except ValueError as error:
        raise UserError(f"{config.model_type} is no causal language model that can be pruned: {error}") from error


def _find_layers(model: "PreTrainedModel", total: int) -> str:
    """Return the name of the module that lists the layers, e.g. model.layers."""
    from torch import nn

    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    outer: list[str] = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise UserError(
            f"cannot find the layers of this {model.config.model_type} model: {len(outer)} of its modules are lists of "
            f"{total}, expected one; only decoders with one stack of layers can be pruned"
        )
    return outer[0]


def _check_roles(layers: "nn.Module", pruned: "nn.Module", kept: Sequence[int]) -> None:
    """Check that each kept layer does in the pruned model what it did in the original one.

    Some architectures derive a layer's role from its number: every fourth layer without positions, experts in every
    second. Where no list of the configuration fixes the role, it would change with the number.
    """
    for number, layer in enumerate(kept):
        before, after = (_traits(stack.get_submodule(str(n))) for stack, n in ((layers, layer), (pruned, number)))
        if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
            raise UserError(
                f"layer {layer} would become layer {number}, and this architecture then gives it another role "
                f"({changed[0]} changes from {before.get(changed[0])} to {after.get(changed[0])}); remove other layers"
            )


def _traits(layer: "nn.Module") -> dict[str, Any]:
    """Return the shapes of a layer's parameters and the plain attributes of its modules, except its number."""
    traits: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for name, module in layer.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and not _LAYER_NUMBER.fullmatch(attribute):
                traits[f"{name}.{attribute}".lstrip(".")] = value
    return traits


def _stored_prefix(model: Path, path: str, total: int) -> str:
    """Return what the stored names of the layers' tensors begin with: the module's name, or that of the bare decoder."""
    names = weight_shapes(model)
    for prefix in (path, path.partition(".")[2]):
        numbers = {int(match[1]) for name in names if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
        if numbers == set(range(total)):
            return prefix
    raise UserError(f"{model}: the weights do not hold {path}.0 to {path}.{total - 1}, as the configuration says")


def _copy_weights(model: Path, folder: Path, prefix: str, kept: Sequence[int]) -> None:
    """Copy each file of weights without the removed layers, and the kept ones under their new numbers."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    layer = re.compile(rf"({re.escape(prefix)}\.)(\d+)(\..*)")
    new_number = {old: new for new, old in enumerate(kept)}
    weight_map: dict[str, str] = {}
    size = 0
    for file in weight_files(model):
        tensors = {}
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                match = layer.fullmatch(name)
                if match is None:
                    tensors[name] = stored.get_tensor(name)
                elif (number := new_number.get(int(match[2]))) is not None:
                    tensors[f"{match[1]}{number}{match[3]}"] = stored.get_tensor(name)
        if tensors:
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if (model / WEIGHTS_INDEX).exists():
        write_json({"metadata": {"total_size": size}, "weight_map": weight_map}, folder / WEIGHTS_INDEX)

"""Check that a model's files have the weights of the model: transformers draws missing weights at random.

`check_weight_files` finds what the files alone reveal, for the driver, which has no torch; `check_loaded` finds the rest.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.formatting import first_names
from montessori_core.models.adapters import is_adapter
from montessori_core.models.fingerprints import WEIGHTS, WEIGHTS_INDEX, weight_files, weight_shapes

_WRAPPERS = {
    r"^module\.": "DDP",
    r"(^|\.)_orig_mod\.": "torch.compile",
    r"(^|\.)_fsdp_wrapped_module\.": "FSDP",
    r"(^|\.)_checkpoint_wrapped_module\.": "activation checkpointing",
    r"^_forward_module\.": "DeepSpeed",
    r"^base_model\.model\.|\.base_layer\.|\.lora_[AB]\.": "PEFT",
}
_LAYER = re.compile(r"^(.*\b(?:layers|h|blocks))\.(\d+)\.")


def check_weight_files(folder: Path) -> None:
    """Check names in the headers and the index of a model's files; the folder of an adapter passes.

    Raises:
        UserError: a file is missing, a training wrapper has renamed weights, or layers are missing.
    """
    if is_adapter(folder):
        return
    if absent := [file.name for file in weight_files(folder) if not file.exists()]:
        raise UserError(
            f"{folder}: {first_names(absent)} of {WEIGHTS_INDEX} are missing; download or copy the model again"
        )
    names = weight_shapes(folder).keys()
    if not (folder / WEIGHTS).exists():
        listed = (read_json(folder / WEIGHTS_INDEX) or {})["weight_map"].keys()
        if different := listed ^ names:
            raise UserError(
                f"{folder}: {len(different)} weights are in {WEIGHTS_INDEX} or in the files it lists, but not in both: "
                f"{first_names(different)}; download or copy the model again"
            )
    for pattern, wrapper in _WRAPPERS.items():
        if renamed := [name for name in names if re.search(pattern, name)]:
            raise UserError(
                f"{folder}: {len(renamed)} of {len(names)} weights have names that {wrapper} gives them: "
                f"{first_names(renamed)}; they would be replaced by random weights. Save the model without the wrapper"
            )
    _check_layers(folder, names)


def _check_layers(folder: Path, names: Collection[str]) -> None:
    config = read_json(folder / "config.json")
    count = (config.get("text_config") or config).get("num_hidden_layers") if isinstance(config, dict) else None
    numbers = defaultdict[str, set[int]](set)
    for name in names:
        if match := _LAYER.match(name):
            numbers[match[1]].add(int(match[2]))
    # Of several stacks, such as a text and a vision model, it is unknown which has `count` layers.
    if len(numbers) != 1 or not isinstance(count, int):
        return
    [(stack, layers)] = numbers.items()
    if missing := sorted(set(range(count)) - layers):
        raise UserError(
            f"{folder}: config.json has {count} layers, and {len(missing)} of them have no weights: "
            f"{first_names([f'{stack}.{number}' for number in missing])}; they would be random. Copy the model again"
        )


def check_loaded(model: str, total: int, info: Mapping[str, Any]) -> None:
    """Check that each weight of a loaded model was read from its files, and that each weight in the files was used.

    Known exceptions (tied weights, weights that an architecture ignores) are those of transformers.

    Args:
        model: name of the model.
        total: number of the model's weights.
        info: the loading information of transformers.

    Raises:
        UserError: weights are missing, unused, or of another shape; the message counts and names them.
    """
    problems = []
    if missing := info["missing_keys"]:
        problems.append(f"{len(missing)} of {total} weights are not in its files: {first_names(missing)}")
    if unused := info["unexpected_keys"]:
        problems.append(f"{len(unused)} weights in its files are not in the model: {first_names(unused)}")
    if mismatched := info["mismatched_keys"]:
        name, stored, expected = sorted(mismatched)[0]
        problems.append(
            f"{len(mismatched)} of {total} weights have another shape in its files, such as {name}: {list(stored)} instead "
            f"of {list(expected)}"
        )
    problems += info["error_msgs"]
    if problems:
        raise UserError(
            f"model {model!r} cannot be loaded: {'; '.join(problems)}. Weights would be random or lost; save the model with "
            "save_pretrained, from the class that config.json names"
        )

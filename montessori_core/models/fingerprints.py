"""The hash that identifies the model in a folder: its tensors, tokenizer and settings.

A key must not depend on the environment or on library versions. So tensors are hashed one by one, in whichever file they
are, and JSON files by content without the fields in `_TRACES`. In doubt a field is included: an extra field costs a
computation, a missing one gives a wrong result. Works without torch and safetensors, for the driver.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from montessori_core.errors import DataError
from montessori_core.files import hash_json, hash_path, write_json
from montessori_core.formatting import first_names
from montessori_core.layout import COUNTS_FILE, LOG_FILE, MOMENTS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FINGERPRINT = "fingerprint.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

ENVIRONMENT_FIELDS = {"local_files_only", "is_local"}
"""Fields of tokenizer_config.json that record how the tokenizer was loaded before it was saved."""
_TRACES = ENVIRONMENT_FIELDS | {
    # The library that wrote the file, and the model's origin.
    *("transformers_version", "peft_version", "auto_mapping", "backend", "tokenizer_file", "_commit_hash"),
    *("_name_or_path", "name_or_path", "_model_name_or_path", "_from_model_config"),
    # The base model of an adapter, which has a separate fingerprint.
    *("base_model_name_or_path", "revision"),
    # Runtime options, which are set at loading.
    *("use_cache", "inference_mode", "_attn_implementation", "_attn_implementation_autoset"),
    *("output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate"),
}
_RENAMED = {"torch_dtype": "dtype"}
_OBJECTS = {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS_INDEX, ADAPTER}
"""JSON files that are read as objects; others, such as modules.json of sentence-transformers, may be lists."""
_NO_SETTINGS = {FINGERPRINT, WEIGHTS_INDEX, LOG_FILE, COUNTS_FILE, "trainer_state.json"}
_TOKENIZER_FILES = ("*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_BUFFER = 1 << 20


def hash_model(folder: Path) -> str:
    """Return the SHA-256 of the model in a folder, or of the adapter without its base model.

    Raises:
        DataError: a file is damaged.
    """
    tensors = sorted(tensor for file in weight_files(folder) for tensor in hash_tensors(file))
    settings = {file.name: _settings(file) for file in folder.glob("*.json") if file.name not in _NO_SETTINGS}
    # Older libraries keep the template in tokenizer_config.json; chat_template.jinja takes precedence.
    template = settings.get("tokenizer_config.json", {}).pop("chat_template", None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    files = {file.name: hash_path(file) for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    return hash_json([tensors, settings, template, files])


def hash_tensors(file: Path) -> list[tuple[str, str, list[int], str]]:
    """Return name, dtype, shape and SHA-256 of each tensor of a safetensors file, read once through a small buffer.

    Raises:
        DataError: the file is damaged.
    """
    header, _, start = _read_header(file)
    try:
        ranges = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        with file.open("rb") as stream:
            hashes = {name: _hash_stream(stream, start + begin, end - begin) for begin, end, name in ranges}
        return [(name, entry["dtype"], entry["shape"], hashes[name]) for name, entry in header.items()]
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(file, error) from error


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor of the model in a folder, from the headers of its files.

    Raises:
        DataError: a file is damaged.
    """
    headers = [_read_header(file)[0] for file in weight_files(folder)]
    return {name: entry["shape"] for header in headers for name, entry in header.items()}


def count_weights(folder: Path) -> int:
    """Return the number of weights of the model in a folder.

    Raises:
        DataError: a file is damaged.
    """
    return sum(math.prod(shape) for shape in weight_shapes(folder).values())


def _read_header(file: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the header entry of each tensor in a safetensors file, the metadata, and the offset of the data."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            if not 2 <= size <= file.stat().st_size:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
            metadata = header.pop("__metadata__", {})
        except (ValueError, AttributeError) as error:
            raise _damaged(file, error) from error
    return header, metadata, 8 + size


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: not a safetensors file, or damaged ({error}); download or write it again")


def _hash_stream(stream: BinaryIO, begin: int, count: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    stream.seek(begin)
    while count:
        read = stream.readinto(buffer[: min(count, _BUFFER)])  # type: ignore[attr-defined]
        if not read:
            raise ValueError("it ends too early")
        digest.update(buffer[:read])
        count -= read
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would load."""
    if (folder / ADAPTER).exists():
        return [folder / ADAPTER_WEIGHTS]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    try:
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not an index of weights; download or write it again") from error


def _settings(file: Path) -> Any:
    """Return the content of a JSON file, normalized so that it is equal for equal models."""
    content = _read_json(file)
    if file.name == "tokenizer.json":
        model = content.get("model", {})
        if "merges" in model:  # older libraries write a pair as one string
            model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    elif file.name == ADAPTER:
        # Sets, such as the adapted layers, are written in any order.
        content = {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in content.items()}
    return _without_traces(content) if file.name.endswith("config.json") else content


def _without_traces(content: Any) -> Any:
    if isinstance(content, list):
        return [_without_traces(value) for value in content]
    if not isinstance(content, dict):
        return content
    kept = {name: value for name, value in content.items() if name not in _TRACES}
    return {_RENAMED.get(name, name): _without_traces(value) for name, value in kept.items()}


def _read_json(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name in _OBJECTS and not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where an object belongs")
    except ValueError as error:
        raise DataError(f"{file}: not a model's JSON file, or damaged ({error}); download or write it again") from error
    return content


def write_fingerprint(folder: Path, base: str | None = None) -> None:
    """Write the hash of a model, and of its AdamW moments if present, into its folder, so that it is computed once.

    Args:
        folder: folder of a model or an adapter.
        base: hash of the model that an adapter was trained on.
    """
    moments = folder / MOMENTS_FILE
    recorded = {"sha256": hash_model(folder)} | ({"moments": hash_path(moments)} if moments.exists() else {})
    recorded |= {"base": base} if base else {}
    write_json(recorded, folder / FINGERPRINT)


def moments_fingerprint(folder: Path) -> str:
    """Return the hash of the AdamW moments in the folder of a model that this project trained."""
    return str(json.loads((folder / FINGERPRINT).read_text())["moments"])


def moments_state(folder: Path) -> dict[str, Any]:
    """Return what the file of AdamW's moments in a folder says of them, see `save_moments`; no tensor is read.

    Raises:
        DataError: the file has no moments, or is damaged.
    """
    file = folder / MOMENTS_FILE
    header, metadata, start = _read_header(file)
    try:
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"{file.stat().st_size} bytes instead of {end}")
        state: dict[str, Any] = json.loads(metadata.get("adamw", "{}"))
        if missing := {"step", "weights"} - state.keys():
            raise ValueError(f"without {first_names(missing)}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not AdamW's moments, or damaged ({error}); copy the file again, or leave out --warm-state"
        ) from error
    return state


def moments_recipe(folder: Path) -> dict[str, float]:
    """Return AdamW's betas, epsilon and weight decay of the steps that left the moments in a folder.

    Empty if the file does not say.

    Raises:
        DataError: the file has no moments, or is damaged.
    """
    return {name: value for name, value in _recipe(folder).items() if name != "learning_rate"}


def moments_rate(folder: Path) -> float | None:
    """Return the peak learning rate of the training that left the moments in a folder; None if the file does not say.

    Raises:
        DataError: the file has no moments, or is damaged.
    """
    return _recipe(folder).get("learning_rate")


def _recipe(folder: Path) -> dict[str, float]:
    recipe: dict[str, float] = moments_state(folder).get("recipe") or {}
    return recipe


def without_environment(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Remove the fields that record how the tokenizer was loaded, so that they are not saved."""
    for field in ENVIRONMENT_FIELDS:
        tokenizer.init_kwargs.pop(field, None)
    return tokenizer

"""The hash that says which model a folder holds: its tensors, tokenizer and settings, whatever wrote the files.

Neither the environment nor the version of a library may change a key. So tensors are hashed one by one, whatever file they
lie in, and JSON files by their content, without the fields of `_TRACES`. In doubt a field counts: one too many costs a
computation, one too few gives a wrong result. Needs neither torch nor safetensors: the driver has none.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from montessori_core.errors import DataError
from montessori_core.files import hash_json, hash_path, write_json
from montessori_core.layout import COUNTS_FILE, LOG_FILE, MOMENTS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FINGERPRINT = "fingerprint.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

ENVIRONMENT_FIELDS = {"local_files_only", "is_local"}
"""Fields of tokenizer_config.json that say how the tokenizer was loaded before it was saved."""
_TRACES = ENVIRONMENT_FIELDS | {
    # Which library wrote the file, and from where.
    *("transformers_version", "peft_version", "auto_mapping", "backend", "tokenizer_file", "_commit_hash"),
    *("_name_or_path", "name_or_path", "_model_name_or_path", "_from_model_config"),
    # Which model an adapter adapts: that one has a fingerprint of its own.
    *("base_model_name_or_path", "revision"),
    # How a model runs, or what it returns beside its result: decided where it is loaded.
    *("use_cache", "inference_mode", "_attn_implementation", "_attn_implementation_autoset"),
    *("output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate"),
}
_RENAMED = {"torch_dtype": "dtype"}
_NO_SETTINGS = {FINGERPRINT, WEIGHTS_INDEX, LOG_FILE, COUNTS_FILE, "trainer_state.json"}
_TOKENIZER_FILES = ("*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_BUFFER = 1 << 20


def hash_model(folder: Path) -> str:
    """Return the SHA-256 of the model, or of the adapter alone, that a folder holds.

    Raises:
        DataError: a file is damaged.
    """
    tensors = sorted(tensor for file in weight_files(folder) for tensor in hash_tensors(file))
    settings = {file.name: _settings(file) for file in folder.glob("*.json") if file.name not in _NO_SETTINGS}
    # Older libraries keep the template in tokenizer_config.json; where there is a file, it counts.
    template = settings.get("tokenizer_config.json", {}).pop("chat_template", None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    files = {file.name: _hash_bytes(file) for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    return hash_json([tensors, settings, template, files])


def hash_tensors(file: Path) -> list[tuple[str, str, list[int], str]]:
    """Return name, dtype, shape and SHA-256 of each tensor of a safetensors file, which is read once, a piece at a time.

    Raises:
        DataError: the file is damaged.
    """
    header, start = _read_header(file)
    try:
        places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        with file.open("rb") as stream:
            hashes = {name: _hash_stream(stream, start + begin, end - begin) for begin, end, name in places}
        return [(name, entry["dtype"], entry["shape"], hashes[name]) for name, entry in header.items()]
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(file, error) from error


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor of the model that a folder holds; only the headers of its files are read.

    Raises:
        DataError: a file is damaged.
    """
    headers = [_read_header(file)[0] for file in weight_files(folder)]
    return {name: entry["shape"] for header in headers for name, entry in header.items()}


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The description of each tensor in a safetensors file, and where their bytes start."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            if not 2 <= size <= file.stat().st_size:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError) as error:
            raise _damaged(file, error) from error
    return header, 8 + size


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: no safetensors file, or a damaged one ({error}); fetch or write it again")


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


def _hash_bytes(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that are loaded, in the order in which transformers looks for them."""
    if (folder / ADAPTER).exists():
        return [folder / ADAPTER_WEIGHTS]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    try:
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: no index of weights; fetch or write it again") from error


def _settings(file: Path) -> dict[str, Any]:
    """The content of a JSON file as equal models have it alike."""
    content = _read_json(file)
    if file.name == "tokenizer.json":
        model = content.get("model", {})
        if "merges" in model:  # older libraries write a pair as one string
            model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    elif file.name == ADAPTER:
        # Sets, such as the layers that are adapted, are written in any order.
        content = {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in content.items()}
    settings: dict[str, Any] = _without_traces(content) if file.name.endswith("config.json") else content
    return settings


def _without_traces(content: Any) -> Any:
    if isinstance(content, list):
        return [_without_traces(value) for value in content]
    if not isinstance(content, dict):
        return content
    kept = {name: value for name, value in content.items() if name not in _TRACES}
    return {_RENAMED.get(name, name): _without_traces(value) for name, value in kept.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where an object belongs")
    except ValueError as error:
        raise DataError(f"{file}: no JSON of a model, or damaged ({error}); fetch or write it again") from error
    return content


def write_fingerprint(folder: Path) -> None:
    """Write the hash of a model, and of AdamW's moments beside it, into its folder: nobody has to read them for it again."""
    moments = folder / MOMENTS_FILE
    recorded = {"sha256": hash_model(folder)} | ({"moments": hash_path(moments)} if moments.exists() else {})
    write_json(recorded, folder / FINGERPRINT)


def moments_fingerprint(folder: Path) -> str:
    """Return the hash of the moments that a training of ours left beside a model."""
    return str(json.loads((folder / FINGERPRINT).read_text())["moments"])


def without_environment(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Keep how the tokenizer was loaded out of what it saves."""
    for field in ENVIRONMENT_FIELDS:
        tokenizer.init_kwargs.pop(field, None)
    return tokenizer

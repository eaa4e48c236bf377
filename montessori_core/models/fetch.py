"""Find the folder of a model: a local folder, a model on the Hugging Face hub, or an embedded one."""

import functools
import os
from pathlib import Path

from montessori_core.errors import UserError
from montessori_core.files import hash_json, read_json
from montessori_core.formatting import closest_name
from montessori_core.models.adapters import adapted_model, is_adapter
from montessori_core.models.embedded import EMBEDDED, find_embedded
from montessori_core.models.fingerprints import ADAPTER_WEIGHTS, FINGERPRINT, WEIGHTS, WEIGHTS_INDEX, hash_model

_WEIGHTS = (WEIGHTS, WEIGHTS_INDEX)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


def local_path(model: str) -> str:
    """Return what to load for a configured model: an embedded model's folder, a local folder, or the id itself.

    Raises:
        UserError: an embedded model is not downloaded yet, or a local folder has no weights.
    """
    if model in EMBEDDED:
        return str(find_embedded(model))
    path = Path(os.path.expanduser(model))
    if not os.path.exists(path):
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UserError(f"model {model!r}: no such folder; give an existing folder or a Hugging Face id")
        return model
    if is_adapter(path):
        if not (path / ADAPTER_WEIGHTS).exists():
            raise UserError(f"model {model!r}: the adapter has no {ADAPTER_WEIGHTS}; only safetensors are loaded")
        return str(path.resolve())
    if not (path / "config.json").exists():
        raise UserError(f"model {model!r}: the folder has no config.json; is it a Hugging Face model folder?")
    if not any((path / name).exists() for name in _WEIGHTS):
        raise UserError(
            f"model {model!r}: the folder has no weights ({' or '.join(_WEIGHTS)}); only safetensors are loaded, "
            "convert other formats first"
        )
    return str(path.resolve())


def fetch_model(model: str, revision: str | None = None) -> Path:
    """Return the folder of a configured model; a model on the hub is downloaded first, as safetensors only.

    The driver calls this, so that workers read from the hub's cache ($HF_HOME) and neither need the hub nor see each
    other's incomplete downloads.

    Raises:
        UserError: the model cannot be loaded.
    """
    path = Path(local_path(model))
    return path if path.is_dir() else Path(local_path(str(_download(model, revision))))


@functools.cache
def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns="*/*"))
    except GatedRepoError as error:
        raise UserError(
            f"model {model!r} is gated: accept its licence on the hub, then set HF_TOKEN or run hf auth login"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"model {model!r}{closest_name(model, EMBEDDED)}, revision {revision or 'main'}, cannot be downloaded from the "
            f"hub: {reason}\nCheck id, revision and network; on a machine without network give the path of a folder, or fill "
            "$HF_HOME beforehand"
        ) from error


def cached_model(model: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model on the hub, if it was downloaded; nothing is."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (ValueError, OSError):  # no id of the hub; not in the cache
        return None


def full_model(folder: Path) -> Path:
    """Return the folder of a full model: that of its base model for an adapter.

    Raises:
        UserError: there is no such base model.
    """
    return fetch_model(adapted_model(folder)) if is_adapter(folder) else folder


def commit_of(folder: Path) -> str | None:
    """Return the commit of a model in the hub's cache; None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache else None


def fingerprint(folder: Path) -> str:
    """Return the hash that identifies a model: of its content, see `fingerprints`, or of its name and commit on the hub.

    Folders written by this project hold their hash; other folders are read and hashed once. The hash of an adapter includes
    its base model's.

    Raises:
        UserError: there is no such model, one of its files is damaged, or an adapter was trained on another base model.
    """
    path = Path(local_path(str(folder)))
    if commit_of(path) is not None:
        return hash_json([path.parent.parent.name, path.name])
    recorded = read_json(path / FINGERPRINT)
    sha256 = str(recorded["sha256"]) if recorded else _hash_once(path, _signature(path))
    if not is_adapter(path):
        return sha256
    model = adapted_model(path)
    base = fingerprint(fetch_model(model))
    if recorded and recorded.get("base", base) != base:
        raise UserError(
            f"the adapter in {path} was trained on another model than {model!r} is now; restore that model. If it is the "
            f"same in another format, delete 'base' from {path / FINGERPRINT}"
        )
    return hash_json([sha256, base])


@functools.cache
def _hash_once(folder: Path, signature: tuple[tuple[str, int, int], ...]) -> str:
    """Return the hash of a model, cached while its `signature` is unchanged: weights can be many GB."""
    return hash_model(folder)


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file())

"""The folder of a LoRA adapter: its base model and its settings. Works without torch, for the driver."""

from pathlib import Path
from typing import Any

from montessori_core import layout
from montessori_core.config import Lora
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.models.fingerprints import ADAPTER


def is_adapter(folder: Path) -> bool:
    """Return whether a folder has a LoRA adapter instead of a model."""
    return (folder / ADAPTER).exists()


def adapted_model(folder: Path) -> str:
    """Return the base model of the adapter in a folder.

    One in the folder of models of a run is that of the adapter's run, which may have been copied or moved.
    """
    model = base_of(folder)
    path = Path(model)
    if path.is_absolute() and path.parent.name == layout.MODELS:
        for parent in (folder / ADAPTER).resolve().parents:
            base = parent / layout.MODELS / path.name
            if (parent / layout.CONFIG).exists() and base.exists():
                return str(base)
    return model


def base_of(folder: Path) -> str:
    """Return the base model of the adapter in a folder as the adapter's settings name it."""
    return str(_settings(folder)["base_model_name_or_path"])


def adapter_rank(folder: Path) -> int:
    """Return the rank of the adapter in a folder."""
    return int(_settings(folder)["r"])


def check_adapter(folder: Path, lora: Lora | None, setting: str) -> None:
    """Check that a training with `lora` continues the adapter in a folder; a folder of a full model passes.

    Args:
        folder: the model that the training starts from.
        lora: settings of the training; None continues any adapter.
        setting: name of these settings in the configuration.

    Raises:
        UserError: the adapter has another rank or scale.
    """
    if lora is None or not is_adapter(folder):
        return
    existing = _settings(folder)
    if (existing["r"], existing["lora_alpha"]) != (lora.rank, lora.alpha):
        raise UserError(
            f"{setting}: rank {lora.rank}, alpha {lora.alpha}, but training continues the adapter in {folder}, which has "
            f"rank {existing['r']}, alpha {existing['lora_alpha']}; set {setting} to these, or to null"
        )


def _settings(folder: Path) -> dict[str, Any]:
    content = read_json(folder / ADAPTER)
    if not isinstance(content, dict) or not {"base_model_name_or_path", "r", "lora_alpha"} <= content.keys():
        raise UserError(f"{folder / ADAPTER}: not the settings of a LoRA adapter, or damaged; copy the adapter again")
    return content

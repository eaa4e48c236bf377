"""The positions of a model: the length of the longest sequence it was made for. Works without torch, for the driver."""

from pathlib import Path

from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.models.fetch import full_model

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")  # the latter two in GPT-2, GPT-J, CodeGen and MPT


def positions_of(folder: Path) -> int | None:
    """Return the number of a model's positions; None if its config.json names none, as for state-space models."""
    config = read_json(full_model(folder) / "config.json")
    if not isinstance(config, dict):
        return None
    config = config.get("text_config") or config
    counts = (config.get(name) for name in _NAMES)
    return next((count for count in counts if isinstance(count, int) and count > 0), None)


def check_positions(folder: Path, length: int, setting: str) -> None:
    """Check that a model has positions for sequences of a length.

    Args:
        folder: the model.
        length: tokens of the longest sequence.
        setting: name of the length in the configuration.

    Raises:
        UserError: it has fewer. Models with learned positions fail on longer sequences, others were not trained on them.
    """
    positions = positions_of(folder)
    if positions is not None and length > positions:
        raise UserError(
            f"{setting}={length}, but max_position_embeddings={positions} in {folder}: the model has no positions for longer "
            f"sequences; set {setting}={positions} or less"
        )

"""Reward margins of a teacher's checkpoints (Figures 3a and 3b)."""

import json
from pathlib import Path

import pytest

from montessori_core import layout
from tasks.run import Model
from tasks.teachers import reward_margins


@pytest.mark.parametrize(
    ("checkpoints", "margins"),
    [((2, 4), {2: 0.5, 4: 3.0, 5: 3.0}), ((), {5: 2.0}), ((5,), {5: 2.0})],
    ids=["two kept", "none kept", "last step kept"],
)
def test_margin_is_mean_since_last_checkpoint(
    checkpoints: tuple[int, ...], margins: dict[int, float], tmp_path: Path
) -> None:
    log: list[dict[str, float]] = [
        {"step": step, "rewards/margins": margin} for step, margin in enumerate((0.0, 1.0, 4.0, 2.0, 3.0), 1)
    ]
    (tmp_path / layout.LOG_FILE).write_text(json.dumps([*log, {"step": 5, "train_loss": 0.5}]))
    assert reward_margins(Model(str(tmp_path), "sha"), checkpoints) == margins

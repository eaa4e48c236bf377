"""Who may read the weights of a run."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from montessori_core.files import commit


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_committed_weights_are_readable_as_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors writes files that only their owner reads, so that others of a group could not copy a run."""
    before = os.umask(umask)
    try:
        with commit(tmp_path / "part") as part:
            (part / "teacher").mkdir(parents=True)
            save_file({"weight": torch.ones(2)}, part / "teacher" / "model.safetensors")
        with commit(tmp_path / "adamw.safetensors") as file:
            save_file({"weight": torch.ones(2)}, file)
    finally:
        os.umask(before)
    for path in (tmp_path / "part" / "teacher" / "model.safetensors", tmp_path / "adamw.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_weights_behind_a_link_keep_their_mode(tmp_path: Path) -> None:
    """They may be another user's."""
    original = tmp_path / "model.safetensors"
    original.touch(mode=0o600)
    with commit(tmp_path / "models") as folder:
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(original)
    assert stat.S_IMODE(original.stat().st_mode) == 0o600

"""Shipped configurations: experiments, and in subfolders studies and cluster files."""

import os
from pathlib import Path

from montessori_core.errors import ConfigError

PRESETS = Path(__file__).parent


def find_configuration(name: Path, kind: str = "", folder: Path = Path()) -> Path:
    """Return the path of a configuration, given its path or the name of a preset.

    Args:
        name: path of a file, relative to `folder`, or name of a preset; a file takes precedence.
        kind: "studies", "clusters", or "" for experiments.
        folder: base of relative paths.

    Raises:
        ConfigError: there is neither a file nor a preset of this name.
    """
    path = folder / name
    if len(name.parts) != 1 or (os.path.exists(path) and not os.path.isdir(path)):
        return path
    preset = PRESETS / kind / f"{name}.yaml"
    if os.path.exists(preset):
        return preset
    if name.suffix:
        return path  # reading it raises an error with the reason
    presets = ", ".join(sorted(file.stem for file in (PRESETS / kind).glob("*.yaml")))
    raise ConfigError(
        f"{path}: no such file, and no preset of this name; give the path of a configuration file, or a preset: {presets} "
        f"(files in {PRESETS / kind})"
    )

"""What a job runs: a *program*, opened once with its settings, then applied to one shard after another.

A program is named `module:function`. The function loads what every shard needs (a resident model) and returns the
compute function. Programs get plain data and know neither the scheduler nor the driver.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Report = Callable[[int], None]
"""Told how many of the shard's rows (or steps) are done."""

Compute = Callable[[list[Row], Path, Report], None]
"""Computes a shard's rows and writes the result to a path that does not exist yet: a file or a folder."""

Program = Callable[[Mapping[str, Any], Mapping[str, Path]], Compute]
"""Opens a stage from its settings and its input paths."""


def load_program(name: str) -> Program:
    """Import the function that `module:function` names."""
    module, _, function = name.partition(":")
    program: Program = getattr(importlib.import_module(module), function)
    return program

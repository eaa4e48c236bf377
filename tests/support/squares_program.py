"""Entry of the stage of squares: the program that a test wrote into its folder, whose module path is always the same.

So jobs of all tests start from one warm process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def open_squares(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Any:
    """Open `squares_program.py` of the folder in the settings."""
    program = Path(settings["folder"], "squares_program.py")
    names: dict[str, Any] = {}
    exec(compile(program.read_text(), str(program), "exec"), names)
    return names["open_squares"](settings, inputs)

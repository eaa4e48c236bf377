"""The command line in the driver's environment, without the libraries that only workers need.

`python tests/support/lean_driver.py ARGUMENTS` is `montessori ARGUMENTS`. Local jobs are separate processes, which
have all libraries.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ABSENT = ("torch", "transformers", "trl", "accelerate", "deepspeed", "safetensors", "peft", "openai", "lm_eval", "vllm")


class Lean(PathFinder):
    """Python's finder without the worker's libraries."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None for an absent library, as for any module that is not installed."""
        return None if fullname.partition(".")[0] in ABSENT else super().find_spec(fullname, path, target)


def become_lean() -> None:
    """Make the worker's libraries unavailable in this process."""
    sys.meta_path = [Lean if finder is PathFinder else finder for finder in sys.meta_path]
    for name in ABSENT:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} can be imported all the same")


if __name__ == "__main__":
    become_lean()
    from flows.cli import main

    main()

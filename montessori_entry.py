"""Entry points of the program: its command, and its flows for Prefect.

They import the packages beside this file, even if a folder on PYTHONPATH has a module with a name as common as `flows`.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

FLOWS = {
    "montessori": "flows.experiment",
    "tailor": "flows.tailor",
    "compare": "flows.study",
    "evaluate": "flows.evaluation",
}
"""The flows of deployments, and their modules."""


def _import_flows() -> None:
    """Import the package `flows` from this folder; it imports its neighbours likewise."""
    spec = PathFinder.find_spec("flows", [str(Path(__file__).parent)])
    if "flows" not in sys.modules and spec is not None and spec.loader is not None:
        sys.modules["flows"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["flows"])


_import_flows()


def main() -> None:
    """Run the command line."""
    import_module("flows.cli").main()


def __getattr__(name: str) -> Any:
    """Return a flow that Prefect executes; import it when it is used, since commands do not need Prefect."""
    if name not in FLOWS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("flows.outages").continue_without_slot()
    return getattr(import_module(FLOWS[name]), name)

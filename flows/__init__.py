"""Prefect flows, their deployments and the command line."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _import_neighbours() -> None:
    """Import the other packages of this program from the folder of this one.

    Their names are common: a module `tasks` in the working directory or on PYTHONPATH may come first on the import path.
    """
    for name in ("montessori_core", "montessori_report", "cluster", "tasks"):
        spec = PathFinder.find_spec(name, [str(Path(__file__).parent.parent)])
        if name not in sys.modules and spec is not None and spec.loader is not None:
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


_import_neighbours()

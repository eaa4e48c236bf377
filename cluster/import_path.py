"""Check that jobs import the packages of this program."""

import os
import re
import site
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from montessori_core.errors import UserError

_SETS_PATH = re.compile(r"""\s*(?:export\s+)?PYTHONPATH=["']?([^"';]*)""")


def check_import_path(setup: Sequence[str] = ()) -> None:
    """Check that no folder that Python searches before this program's hides a package that jobs import.

    `setup`: commands of the shell that run before a job; one may set PYTHONPATH.

    Raises:
        UserError: a folder has a module of the same name.
    """
    root = Path(__file__).resolve().parent.parent
    path = os.environ.get("PYTHONPATH", "")
    for command in setup:
        if match := _SETS_PATH.match(command):
            path = os.path.expandvars(match[1].replace("$PYTHONPATH", path).replace("${PYTHONPATH}", path))
    folders = path.split(os.pathsep) if path else []
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    for package in ("cluster", "montessori_core"):
        # An empty entry is the working directory. A folder without __init__.py (no origin) hides nothing.
        specs = (PathFinder.find_spec(package, [os.path.abspath(folder)]) for folder in folders)
        origin = next((Path(spec.origin).resolve() for spec in specs if spec is not None and spec.origin), None)
        if origin is not None and origin != root / package / "__init__.py":
            raise UserError(
                f"jobs would import {origin} in place of Montessori's package {package}, because its folder is on "
                "PYTHONPATH (an empty entry is the working directory) or is the folder of user packages (pip --user); "
                "rename it, or remove the folder from PYTHONPATH"
            )

"""Imports: layers go one way, and each kind of environment has only its libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT
from support.reports import write_run

LAYERS = ["montessori_core", "montessori_report", "cluster", "tasks", "flows"]  # each may import the earlier ones
FORBIDDEN = {
    "montessori_core": {"prefect", "submitit"},
    "montessori_report": {"prefect", "submitit"},
    "cluster": {"prefect", "montessori_report"},
}


def imported(path: Path, depth: int = 1) -> set[str]:
    """Return top-level names of the modules that a file imports; with a depth of 2, the packages of the core."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    if depth == 1:
        return {module.split(".")[0] for module in modules}
    return {module.split(".")[1] for module in modules if module.startswith("montessori_core.")}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer: str) -> None:
    later = set(LAYERS[LAYERS.index(layer) + 1 :]) | FORBIDDEN.get(layer, set())
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := imported(path) & later)}
    assert not wrong


def cyclic(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the modules in import cycles, and those that import them, with their imports among these."""
    left = dict(imports)
    while removable := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in removable:
            del left[module]
    return {module: needed & left.keys() for module, needed in left.items()}


def test_core_packages_import_one_way() -> None:
    """Packages of the core have no import cycle."""
    rooms: dict[str, set[str]] = {}
    for path in (ROOT / "montessori_core").rglob("*.py"):
        room = path.relative_to(ROOT / "montessori_core").parts[0].removesuffix(".py")
        rooms.setdefault(room, set()).update(imported(path, depth=2) - {room})
    assert not cyclic(rooms)


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a tree without those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from run_nodes(child)


def test_modules_have_no_import_cycle() -> None:
    """Imports inside functions count: they hide a cycle from Python, not from a reader."""
    paths = {path.relative_to(ROOT): path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    modules = {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in paths.items()}
    imports: dict[str, set[str]] = {}
    for module, path in modules.items():
        needed = imports[module] = set[str]()
        for node in run_nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                needed |= {name if name in modules else node.module for name in names}
    assert imports["montessori_core.synthesis.generation"] > {"montessori_core.synthesis.vllm_engine"}
    assert not cyclic(imports)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "flows.cli, flows.experiment, montessori_report.run_page",
            ("torch", "transformers", "deepspeed", "vllm"),
        ),
        ("cluster.worker, montessori_core.influence.jobs, montessori_core.synthesis.jobs", ("prefect",)),
    ],
    ids=["the driver needs no torch", "a job needs no prefect"],
)
def test_environment_stays_light(modules: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print([name for name in {absent!r} if name in sys.modules])"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert outcome.stdout.strip() == "[]"


def test_read_only_commands_import_no_slow_libraries(tmp_path: Path) -> None:
    """`status`, `logs`, `report` and `cancel` start fast."""
    folder = str(write_run(tmp_path / "run"))
    commands = [["status", folder], ["logs", folder, "--shard", "0"], ["cancel", folder], ["report", folder]]
    code = f"""
import sys
from contextlib import suppress
from flows.cli import main
for command in {commands!r}:
    sys.argv = ["montessori", *command]
    with suppress(SystemExit):
        main()
print([name for name in ("prefect", "torch", "transformers", "simpy", "httpx") if name in sys.modules])
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    said, _, imported = outcome.stdout.strip().rpartition("\n")
    assert "nothing of this run is running" in said
    assert "report.html" in said
    assert imported == "[]"

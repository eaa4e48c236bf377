"""A finished run of the tiny Llama, computed once per session, and a Prefect server for further runs."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="session")
def finished_run(talking_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.yaml`, `runs/tiny`, `output.txt` and Prefect's home; tests that change it make a copy."""
    from support.runs import configuration, finish_lean

    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "finished-run"
    folder.mkdir(exist_ok=True)
    output = folder / "output.txt"
    with (folder.parent / ".finished-run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            config = configuration(folder, talking_llama)
            content = yaml.safe_load(config.read_text())
            content["comparison"]["teacher_checkpoints"] = 1  # changes no table
            config.write_text(yaml.safe_dump(content))
            output.write_text(finish_lean("run", str(config), cwd=folder, PREFECT_HOME=str(folder / "prefect")))
    return folder


@pytest.fixture(scope="module")
def shared_server(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables of a Prefect server that drivers share instead of each starting one."""
    from support.prefect_server import prefect_server

    home = shutil.copytree(finished_run / "prefect", tmp_path_factory.mktemp("server") / "prefect")
    with prefect_server(home) as variables:
        yield variables

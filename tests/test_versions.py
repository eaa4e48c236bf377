"""Versions: what the package declares is what environments are held to, and what the lock files pin."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster.probes import open_look_around
from montessori_core.versions import declared

ROOT = Path(__file__).parent.parent
LOCKED = re.compile(
    r"^([a-z0-9.-]+)==([^ ;]+)(?: ;[^\\]*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def pretend(folder: Path, name: str, version: str) -> Path:
    """A folder that, on Python's path, has another version of a package seem installed."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("name", "profile", "refused"),
    [("prefect", "slurm", True), ("torch", "local", True), ("torch", "slurm", False)],
    ids=["the driver's own", "of a local job", "of a job on nodes"],
)
def test_a_version_that_does_not_fit_is_refused_before_anything_is_written(
    name: str, profile: str, refused: bool, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": f"{pretend(tmp_path / 'packages', name, '1.0')}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "flows.cli", "run", str(ROOT / "configs" / "quickstart.yaml"), "--name", "mine"]
    command += ["--set", "teacher.model=absent", "--set", f"cluster.profile={profile}", "--run-root", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert outcome.returncode == 1
    assert (f"{name} 1.0 is installed, {name}" in outcome.stdout) is refused
    assert ("pip install 'montessori" in outcome.stdout) is refused
    assert not (tmp_path / "mine").exists()


def test_an_extra_holds_what_the_extras_in_it_declare() -> None:
    assert declared().items() < declared(["train"]).items() < declared(["benchmarks"]).items()


def test_a_node_names_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(pretend(tmp_path, "pyarrow", "1.0"))
    look_around = open_look_around({"packages": {"pyarrow": ">=21", "numpy": ">=2"}}, {"token": tmp_path / "token"})
    look_around([], tmp_path / "found.json", lambda *_: None)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == {"pyarrow": "pyarrow 1.0 is installed, pyarrow>=21 is needed"}


@pytest.mark.parametrize(
    ("lock", "extras"), [("driver", []), ("worker", ["train", "benchmarks"]), ("generation", None)]
)
def test_locks_hold_what_is_declared(lock: str, extras: list[str] | None) -> None:
    """Each version fits the declared range, has hashes, and says nothing of where it was found; the driver has no torch."""
    text = (ROOT / "docker" / f"{lock}.lock").read_text()
    entries = LOCKED.findall(text)
    pins = {(name, version) for name, version, _ in entries}
    assert LOCKED.sub("", text).splitlines() == text.splitlines()[:2]  # all but the heading is pins with hashes
    assert "/" not in text
    assert {"torch", "transformers"} & dict(pins).keys() == (set() if lock == "driver" else {"torch", "transformers"})
    if extras is None:
        names = (ROOT / "docker" / "generation-job.in").read_text().splitlines()[1:]
        wanted = [*names, "vllm==0.32.0"]
    else:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = [
            *project["dependencies"],
            *(line for extra in extras for line in project["optional-dependencies"][extra]),
        ]
    for requirement in map(Requirement, wanted):
        versions = [version for name, version in pins if name == requirement.name]
        assert requirement.name == "montessori" or versions, requirement
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_table_of_versions_is_what_the_locks_hold() -> None:
    page = (ROOT / "docs" / "containers.md").read_text()
    rows = re.findall(r"^\| ([a-z-]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert rows[0] == ("package", "driver", "worker", "generation (vLLM)")
    for name, *versions in rows[1:]:
        for lock, version in zip(("driver", "worker", "generation"), versions, strict=True):
            text = (ROOT / "docker" / f"{lock}.lock").read_text()
            assert version.strip() == "" or f"\n{name}=={version.strip()} " in text, (name, lock)

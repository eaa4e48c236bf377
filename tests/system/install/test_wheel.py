"""The wheel, installed in an empty environment and used without a clone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from support import ROOT
from support.reports import write_run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that .dockerignore allows, built outside the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *command, str(source)], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Executables of an environment with the wheel; its dependencies come from the tests' environment."""
    environment = wheel.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # without its .pth files
    return python.parent


def montessori(installed: Path, folder: Path, *arguments: str) -> tuple[int, str]:
    """Run a command in a folder without a clone; return exit status and output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run(
        [installed / "montessori", *arguments],
        cwd=folder,
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return outcome.returncode, outcome.stdout + outcome.stderr


def test_wheel_has_every_file_of_its_packages(wheel: Path) -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    files = [path for name in find["include"] for path in (ROOT / name.rstrip("*")).rglob("*") if path.is_file()]
    shipped = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    assert {"flows/prefect.yaml", "montessori_core/presets/quickstart.yaml"} <= shipped
    assert shipped <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_runs_presets_without_a_clone(installed: Path, tmp_path: Path) -> None:
    code, output = montessori(installed, tmp_path, "--help")
    assert code == 0, output
    assert "montessori run quickstart" in output
    code, output = montessori(installed, tmp_path, "run", "quickstart", "--set", "zero.stage=9")
    assert code == 1
    assert re.search(rf"{installed.parent}\S+/presets/quickstart.yaml: the configuration is not valid", output), output
    assert "zero.stage: " in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_wheel_has_command_dependencies(installed: Path, tmp_path: Path) -> None:
    code, output = montessori(installed, tmp_path, "methods")
    assert code == 0, output
    assert "self_instruct" in output
    code, output = montessori(installed, tmp_path, "compare", "quickstart", "--set", "experiment.zero.stage=9")
    assert code == 1
    assert "presets/studies/quickstart.yaml: the study is not valid" in output
    write_run(tmp_path / "runs" / "first")
    code, output = montessori(installed, tmp_path, "report", "runs/first")
    assert code == 0, output


@pytest.mark.slow
def test_wheel_has_deployments(installed: Path, tmp_path: Path) -> None:
    code = "import flows.prefect_yaml as p; print([d['name'] for d in p.read_deployments(p.find_deployments())])"
    command = [installed / "python", "-I", "-c", code]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "['tailor', 'quickstart', 'paper-1b', 'paper-8b', 'evaluate', 'compare']"

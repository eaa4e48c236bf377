"""The GPU benchmark: it refuses to run without a GPU; its programs run, and its checks pass and can fail, on the CPU."""

import importlib
import math
import os
import subprocess
import sys
import time
import weakref
from argparse import Namespace
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from montessori_core.errors import UserError
from montessori_core.influence import ResidentStudent
from montessori_core.models.shape import Shape
from support import ROOT

CPU = torch.device("cpu")
SMALL = ("--allow-cpu", "--shapes", "tiny", "--references", "4")


def benchmark(*options: str) -> "subprocess.CompletedProcess[str]":
    """Run the whole program, as a user does."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONSAFEPATH", None)  # set by commands that other tests call in this process
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_benchmark_without_gpu_prints_one_sentence() -> None:
    outcome = benchmark()
    assert outcome.returncode == 1
    assert "start it on a machine with CUDA" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.slow
def test_benchmark_runs_all_steps(tiny_llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    outcome = benchmark(*SMALL, "--student", str(tiny_llama), "--out", str(page))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    section = page.read_text()
    assert section == outcome.stdout
    titles = [line.removeprefix("### ") for line in section.splitlines() if line.startswith("### ")]
    assert titles == [
        "Machine",
        "Students with random weights: tiny in mixed",
        "Checks",
        "Generation",
        "Students with random weights: tiny in bfloat16, float32",
        "Beside the published procedure, fp32",
    ]
    assert f"torch {version('torch')}" in section
    assert section.count("| tiny | ") == 9
    assert "tokens per second" in section
    assert section.count("| yes |") == 10
    assert "| naive | " in section


@pytest.mark.slow
def test_failed_step_ends_only_itself(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    outcome = benchmark(*SMALL, "--student", str(tmp_path), "--dtypes", "float32", "--out", str(page))
    assert outcome.returncode == 1
    section = page.read_text()
    assert section.count("| tiny | ") == 3
    failed = section.partition("### Failed\n\n")[2].splitlines()
    assert failed == [
        "* Checks: gpu_checks.py ended with code 1",
        "* Generation: generation_speed.py ended with code 1",
        "* Beside the published procedure, fp32: influence.py ended with code 1",
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    return program("gpu", monkeypatch)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    return program("gpu_checks", monkeypatch)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Any:
    return program("influence_shapes", monkeypatch)


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name)


def test_generation_speed_leaves_gpu_to_vllm(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM forks, after which CUDA does not work if this process has initialised it, and takes the memory of the GPU."""
    speed, asked = program("generation_speed", monkeypatch), list[bool]()
    monkeypatch.setattr(sys, "argv", ["generation_speed", "--student", str(tiny_llama), "--rows", "2", "--tokens", "2"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(True))  # it initialises the driver
    open_engine = speed.open_engine

    def check_and_open(*arguments: Any) -> Any:
        assert not asked
        return open_engine(*arguments)

    monkeypatch.setattr(speed, "open_engine", check_and_open)
    monkeypatch.setattr(program("machine", monkeypatch), "timed", None)  # no copies in this process
    speed.main()


def test_most_wanted_students_come_first(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--estimators", "exact", "--references", "8"])
    steps = gpu.steps(gpu.parse_arguments())
    students = [step for step in steps if step.script == "influence_shapes.py"]
    assert [step.title.partition(": ")[2] for step in students] == [
        "8b in mixed",
        "1b, 135m in mixed",
        "8b in bfloat16, float32",
        "1b in bfloat16, float32",
        "135m in bfloat16, float32",
    ]
    assert steps.index(students[0]) == 1
    assert all(step.options[-4:] == ("--estimators", "exact", "--references", "8") for step in students)


def test_step_is_stopped_at_deadline(gpu: Any, tmp_path: Path) -> None:
    """What it printed until then is kept, it removes its files, and the next step does not begin."""
    script, lines = tmp_path / "step.py", list[str]()
    script.write_text(
        "import sys, time\nprint('measured')\ntry:\n    time.sleep(600)\nfinally:\n    open(sys.argv[1], 'w').close()\n"
    )
    step = gpu.Step("", str(script), (str(tmp_path / "removed"),))
    deadline = time.monotonic() + 10
    gpu.run_step(step, None, deadline, lines.append)
    assert 10 <= time.monotonic() - (deadline - 10) < 60
    assert lines == ["measured", "\nstopped: no time left"]
    assert (tmp_path / "removed").exists()
    gpu.run_step(step, None, deadline, lines.append)
    assert lines[2:] == ["skipped: no time left"]


def test_missing_model_is_reported(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the network, too, the other steps run."""
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    gpu.embedded_student.cache_clear()
    lines = list[str]()
    gpu.run_step(gpu.Step("", "gpu_checks.py", on_student=True), None, math.inf, lines.append)
    gpu.embedded_student.cache_clear()
    assert [line.partition(":")[0] for line in lines] == ["not checked"]


HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.partition(".")[0] in ABSENT else find(name, *rest))
"""


def test_programs_start_with_few_packages() -> None:
    """A machine that is lent for an hour may have none of these; what does not use them is measured."""
    absent = ["deepspeed", "trl", "accelerate", "peft", "datasets", "vllm", "submitit", "prefect"]
    programs = "gpu, gpu_checks, influence, influence_shapes, generation_speed, machine"
    code = f"ABSENT = {absent}{HIDE}import {programs}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT)))}
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_versions_omit_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = program("machine", monkeypatch)
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package"))
    assert machine.describe_gpus().endswith(f"torch {version('torch')}")


def test_agreement_compares_values_and_ranks(checks: Any) -> None:
    values = [0.0, 1.0, 2.0, 3.0]
    assert checks.agreement("", [v + 0.01 for v in values], values, 3.0, 0.01).good
    assert not checks.agreement("", [v + 0.1 for v in values], values, 3.0, 0.01).good
    assert not checks.agreement("", [0.0, 2.0, 1.0, 3.0], values, 3.0, 0.5).good


def test_unrestored_student_fails_checks(checks: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = checks.warm_up(tiny_llama, CPU, steps=2, references=3, probing=3)
    monkeypatch.setattr(ResidentStudent, "restore", lambda self: None)
    assert next(iter(checks.check_influence(warm, CPU))).good is False
    *_, exact, _ = checks.check_repeats(warm, CPU)
    assert (exact.good, exact.required) == (False, False)


def test_mixed_floor_has_reference_passes_in_fp32(shapes: Any) -> None:
    """As `ReferenceSet.evaluate` has, which runs outside autocast."""
    shape = Shape(
        parameters=10,
        trained=10,
        largest=1,
        layers=1,
        hidden=1,
        intermediate=1,
        vocabulary=1,
        looked_up=0,
        linear=10,
        token_rows=0,
    )
    fast, slow = shapes.Speed(100.0, 1e12), shapes.Speed(2.0, 1e12)
    arguments = Namespace(tokens=5, references=2)
    seconds = shapes.floor_seconds(shape, "exact", arguments, 1, (4, 4), fast, slow)
    assert seconds == pytest.approx(6 * 10 * 5 / 100 + 2 * 10 * 135 * 2 / 2)


def test_random_moments_are_made_when_read(shapes: Any) -> None:
    """So that the device never has all of them: the student moves each to its home before it reads the next."""
    model = shapes.random_model("tiny", torch.bfloat16, CPU)
    moments = shapes.random_moments(model)
    assert set(moments.first) == set(moments.second) == {name for name, _ in model.named_parameters()}
    second = moments.second["lm_head.weight"]
    assert second.shape == model.lm_head.weight.shape
    assert second.dtype == torch.bfloat16
    assert second.min() > 0
    alive = weakref.ref(second)
    del second
    assert alive() is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("influence_shapes", ["--shapes", "tiny", "--estimators", "exact", "--dtypes", "float32", "--references", "1"]),
        ("influence", ["--student", "missing"]),
        ("gpu_checks", ["--student", "missing"]),
    ],
)
def test_programs_compute_as_jobs_do(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They call `compute_device`, whose other settings show on a GPU alone."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(sys, "argv", [name, *options])
    with suppress(OSError, UserError):
        program(name, monkeypatch).main()
    assert not torch.backends.cudnn.allow_tf32

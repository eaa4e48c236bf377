"""Trainings and runs report to trackers: each step once, whatever is killed, and no result depends on it."""

import json
import os
from pathlib import Path

import pytest

from montessori_core import programs
from montessori_core.config import TeacherUpdate, Warmup, Zero
from montessori_core.layout import LOG_FILE
from montessori_core.program import Program, SettingsT
from montessori_core.tracking.runs import ITERATIONS, TrackedRun, new_problems, prepare_tracking
from support import ROOT, killed_jobs
from support.killed_jobs import kill_jobs_once
from support.preference_pairs import PAIRS
from support.row_programs import logged, run_in_job
from support.runs import call, configuration
from support.tracked import INSTALLED, READABLE, offline, points, trackio_folder, values_of

__all__ = ["offline", "trackio_folder"]
pytestmark = pytest.mark.skipif(not INSTALLED, reason="no tracker is installed: pip install 'montessori[tracking]'")
KEYS = {"WANDB_API_KEY": "0123456789" * 4, "MLFLOW_TRACKING_TOKEN": "token-of-mlflow"}


@pytest.fixture(autouse=True)
def environment(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def train(
    folder: Path,
    program: Program[SettingsT],
    settings: SettingsT,
    model: Path,
    rows: list[dict[str, object]],
    *file: Path,
) -> Path:
    trackers = dict(zip(["tracking"], file, strict=False))
    return run_in_job(folder, program, settings, {"student": model, "teacher": model, **trackers}, rows)


def tracked(file: Path) -> TrackedRun:
    """Return the only tracked training of a run."""
    (state,) = (file.parent / "state").iterdir()
    return TrackedRun.of(file, state.stem.replace("--", "/"))


def has_no_key(folder: Path) -> bool:
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return not any(key.encode() in text for key in KEYS.values() for text in texts)


def test_killed_training_logs_no_step_twice(tiny_llama: Path, offline: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": f"Describe object {n}.", "response": f"Object {n} is round.", "response_finished": True}
        for n in range(160)
    ]
    recipe = Warmup(learning_rate=1e-3, batch_size=4, micro_batch_size=4).shared()
    settings = programs.Sft(max_length=64, lora=None, recipe=recipe, zero=Zero(stage=0), seed=0, save_moments=False)
    run, stage = offline / "run", offline / "run" / "iteration-1" / "student"
    file = prepare_tracking(run, "mine", INSTALLED)
    watcher = kill_jobs_once(stage, beyond=10)
    part = train(stage, killed_jobs.SFT, settings, tiny_llama, rows, file)
    watcher.join()
    logs = "".join(path.read_text() for path in (stage / "jobs").rglob("*_log.err"))
    assert "resuming from checkpoint-" in logs
    assert new_problems(file) == {}
    steps = json.loads((part / LOG_FILE).read_text())
    assert len(steps) == 40
    training = tracked(file)
    assert training.part.startswith("iteration-1/student-")
    expected = [entry["loss"] for entry in steps]
    for tracker in READABLE:
        losses = values_of(points(tracker, training), "loss")
        # A step is noted before it is logged: that of the kill may be missing, none is logged twice. Trackio sends twice a
        # second, so that a killed job has not sent its last steps.
        assert len(losses) >= (21 if tracker == "trackio" else 39), tracker
        nearest = [min(range(40), key=lambda step, loss=loss: abs(expected[step] - loss)) for loss in losses]  # type: ignore[misc]
        assert nearest == sorted(set(nearest)), tracker
        assert losses == pytest.approx([expected[step] for step in nearest]), tracker
    if "wandb" in INSTALLED:
        assert list((run / "tracking" / "wandb").glob(f"offline-run-*-{training.id}/*.wandb"))
    assert has_no_key(run)


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="mlflow is not installed")
def test_unreachable_server_ends_no_training(tiny_llama: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And turning trackers off or on computes nothing again."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recipe = TeacherUpdate(learning_rate=1e-4, batch_size=2, micro_batch_size=2, max_length=256)
    settings = programs.Dpo(prompt_style="completion", recipe=recipe, zero=Zero(stage=0), seed=0)
    run, stage = offline / "run", offline / "run" / "iteration-1" / "teacher"
    file = prepare_tracking(run, "mine", READABLE)
    part = train(stage, programs.DPO, settings, tiny_llama, PAIRS, file)
    assert list(new_problems(file)) == ["mlflow"]
    losses = logged(part, "loss")
    for tracker in READABLE:
        if tracker != "mlflow":
            assert values_of(points(tracker, tracked(file)), "loss") == pytest.approx(losses), tracker
    written = (part / "model.safetensors").stat().st_mtime_ns
    train(stage, programs.DPO, settings, tiny_llama, PAIRS)
    train(stage, programs.DPO, settings, tiny_llama, PAIRS, prepare_tracking(run, "mine", ["mlflow"]))
    assert (part / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
def test_run_is_tracked_and_resumes_its_runs(talking_llama: Path, tmp_path: Path) -> None:
    tracking = ("--set", "tracking=[tensorboard]")
    config = str(configuration(tmp_path, talking_llama))
    code, output = call("run", config, *tracking, cwd=tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "tiny"
    file = run / "tracking" / "tracking.json"
    found = points("tensorboard", TrackedRun.of(file, ITERATIONS))
    assert {"seconds/influence", "synthesis/probing/kept", "held_out_loss/student"} <= set(found)
    assert {"held_out_gain/student_over_unmodified", "preferences/pairs"} <= set(found)
    assert all(len(values) == 1 for values in found.values())
    parts = {path.stem.rpartition("-")[0] for path in (file.parent / "state").iterdir()} - {""}
    assert parts == {"iteration-1--warmup", "iteration-1--teacher", "iteration-1--student", "unmodified--student"}
    models = {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")}
    code, output = call("run", config, *tracking, cwd=tmp_path)
    assert code == 0, output
    assert points("tensorboard", TrackedRun.of(file, ITERATIONS)) == found
    code, output = call("run", config, cwd=tmp_path)
    assert code == 0, output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")} == models

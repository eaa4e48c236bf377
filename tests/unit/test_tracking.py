"""Experiment trackers: the setting, names, secrets, and the numbers of iterations."""

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.study import _numbers
from flows.study_result import Cost
from montessori_core.config import parse_experiment, read_experiment
from montessori_core.data.tables import REFERENCE_LOSS, table_from_rows, write_table
from montessori_core.errors import ConfigError, UserError
from montessori_core.files import read_json, write_json
from montessori_core.tracking.numbers import log_numbers, numbers_of
from montessori_core.tracking.runs import ITERATIONS, TrackedRun, describe, new_problems, prepare_tracking
from montessori_core.tracking.trackers import check_trackers
from support.reports import write_run
from support.tracked import INSTALLED, READABLE, offline, points, trackio_folder
from tasks.benchmarks import BenchmarkResult
from tasks.evaluation import StudentEvaluation
from tasks.tracking import start_tracking, track_iteration, tracking_input

__all__ = ["offline", "trackio_folder"]
MODELS = {"teacher": {"model": "t"}, "student": {"model": "s"}}


def test_setting_is_off_and_decides_no_result() -> None:
    plain = parse_experiment(MODELS, "test")
    assert plain.tracking == ()
    tracked = parse_experiment({**MODELS, "tracking": ["tensorboard", "mlflow"]}, "test")
    assert tracked.identity() == plain.identity()
    with pytest.raises(ConfigError, match=r"tracking.0: Input should be 'tensorboard', 'wandb', 'trackio' or 'mlflow'"):
        parse_experiment({**MODELS, "tracking": ["comet"]}, "test")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow, trackio are not installed; run pip install 'montessori\[tracking\]'"):
        check_trackers(("mlflow", "trackio"))
    check_trackers(())


@pytest.mark.skipif("wandb" not in INSTALLED, reason="wandb is not installed")
def test_wandb_without_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline"):
        check_trackers(("wandb",))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(("wandb",))
    import wandb

    wandb.teardown()  # it has read the environment


def test_id_and_name_stay_the_same(tmp_path: Path) -> None:
    file = prepare_tracking(tmp_path, "mine", ["tensorboard"])
    first = TrackedRun.of(file, "iteration-1/student-1a2b3c4d")
    again = TrackedRun.of(prepare_tracking(tmp_path, "renamed", ["mlflow"]), first.part)
    assert (again.id, again.name, again.trackers) == (first.id, first.name, ("mlflow",))
    assert first.name.startswith("mine-")
    assert TrackedRun.of(file, ITERATIONS).id != first.id
    assert prepare_tracking(tmp_path / "other", "mine", []).read_text() != file.read_text()


def test_copy_of_run_has_an_id_of_its_own(tmp_path: Path) -> None:
    """A moved run keeps its id, also one of an earlier version, whose file does not name its folder."""
    run, file = tmp_path / "run", Path("tracking", "tracking.json")
    original = TrackedRun.of(prepare_tracking(run, "mine", ["mlflow"]), ITERATIONS)
    original.update_state("mlflow", run="17")
    copied = TrackedRun.of(prepare_tracking(shutil.copytree(run, tmp_path / "copy"), "mine", ["mlflow"]), ITERATIONS)
    assert (copied.id == original.id, copied.group == original.group, copied.read_state("mlflow")) == (False, False, {})
    assert TrackedRun.of(prepare_tracking(tmp_path / "copy", "mine", ["mlflow"]), ITERATIONS) == copied
    moved = run.rename(tmp_path / "moved")
    kept = TrackedRun.of(prepare_tracking(moved, "mine", ["mlflow"]), ITERATIONS)
    assert (kept.id, kept.read_state("mlflow")) == (original.id, {"run": "17"})
    content = read_json(moved / file)
    del content["folder"]
    write_json(content, moved / file)
    assert TrackedRun.of(prepare_tracking(moved, "mine", ["mlflow"]), ITERATIONS).id == original.id
    copy = shutil.copytree(moved, tmp_path / "copy-2")
    assert TrackedRun.of(prepare_tracking(copy, "mine", ["mlflow"]), ITERATIONS).id != original.id


def test_errors_are_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    text = describe(ValueError("key 0123456789\nat https://me:pass@host/x"))
    assert text == "ValueError: key *** at https://host/x"


METRICS: dict[str, Any] = {
    "iteration": 2,
    "stages": [
        {"stage": "iteration-2/influence", "seconds": 12.5, "shards": 4},
        {"stage": "unmodified/student", "seconds": 3.0, "shards": 1},
    ],
    "synthesis": {"probing": {"candidates": 20, "kept": 16}},
    "influence": {"probing": {"measured": 16, "mean": float("nan"), "unit": "nats"}},
    "preferences": {"pairs": 7, "prompts": 4},
    "held_out_loss": {"student": {"mean": 2.5, "standard_error": 0.1}},
    "held_out_gain": {"student_over_previous": {"mean": 0.25, "standard_error": 0.1}},
    "scores": [{"model": "student", "benchmark": "arc", "metric": "acc", "mean": 0.5, "standard_error": None}],
    "contamination": [
        {"benchmark": "evaluation set", "data": data, "n": 8, "items": 10, "overlapping": overlapping}
        for data, overlapping in (("training set", 0), ("unmodified teacher's training set", 2))
    ],
}


def test_iteration_becomes_numbers() -> None:
    assert numbers_of(METRICS) == {
        "seconds/influence": 12.5,
        "synthesis/probing/candidates": 20.0,
        "synthesis/probing/kept": 16.0,
        "influence/probing/measured": 16.0,
        "preferences/pairs": 7.0,
        "preferences/prompts": 4.0,
        "held_out_loss/student": 2.5,
        "held_out_gain/student_over_previous": 0.25,
        "scores/student/arc/acc": 0.5,
        "contamination/evaluation set/8_words": 0.0,
    }
    assert numbers_of(METRICS | {"iteration": 1})["seconds/unmodified/student"] == 3.0


def test_diverged_method_has_no_loss(tmp_path: Path) -> None:
    """NaN never equals itself: it would be logged again at every resume."""
    row = {"example_id": "a", "loss": math.nan, "response_tokens": 3}
    write_table(table_from_rows([row], REFERENCE_LOSS), tmp_path / "losses.parquet", REFERENCE_LOSS)
    scores = [{"benchmark": "arc", "metric": name, "mean": mean} for name, mean in (("acc", 0.5), ("win", None))]
    evaluated = StudentEvaluation(tmp_path / "losses.parquet", BenchmarkResult(scores, None))
    assert _numbers(evaluated, Cost(3.0, 1)) == {"seconds": 3.0, "arc/acc": 0.5}


@pytest.mark.skipif(not INSTALLED, reason="no tracker is installed")
def test_numbers_are_logged_once(offline: Path) -> None:
    file = prepare_tracking(offline / "run", "mine", INSTALLED)
    run = TrackedRun.of(file, ITERATIONS)
    for _ in range(2):
        log_numbers(file, {"held_out_loss/student": 2.5, "synthesis/probing/kept (all)": 3.0}, 1)
    log_numbers(file, {"held_out_loss/student": 2.25}, 2)
    assert new_problems(file) == {}
    for tracker in READABLE:
        found = points(tracker, run)
        assert found["held_out_loss/student"] == [(1, 2.5), (2, 2.25)], tracker
        assert [values for name, values in found.items() if name.startswith("synthesis")] == [[(1, 3.0)]], tracker
    if "wandb" in INSTALLED:
        assert len(list((offline / "run" / "tracking").glob(f"wandb/offline-run-*-{run.id}/*.wandb"))) == 2


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="mlflow is not installed")
def test_unreachable_server_is_reported_once(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = prepare_tracking(offline / "run", "mine", ["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret-password@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for step in (1, 2):
        log_numbers(file, {"loss": 1.0 / step}, step)
    [(tracker, problem)] = new_problems(file).items()
    assert tracker == "mlflow"
    assert "127.0.0.1" in problem
    assert new_problems(file) == {}
    assert "secret-password" not in json.dumps([path.read_text() for path in file.parent.rglob("*.json")])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for step in (1, 2):
        log_numbers(file, {"loss": 1.0 / step}, step)
    assert points("mlflow", TrackedRun.of(file, ITERATIONS)) == {"loss": [(1, 1.0), (2, 0.5)]}


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="tensorboard is not installed")
def test_finished_iteration_is_tracked_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tracking=["tensorboard"])
    experiment = read_experiment(folder / "config.yaml")
    start_tracking(folder, experiment)
    for _ in range(2):
        track_iteration(folder, experiment, 1)
    (file,) = tracking_input(folder, experiment).values()
    found = points("tensorboard", TrackedRun.of(file, ITERATIONS))
    assert found["held_out_loss/student"][0][0] == 1
    assert all(len(values) == 1 for values in found.values())
    assert tracking_input(folder, experiment.model_copy(update={"tracking": ()})) == {}

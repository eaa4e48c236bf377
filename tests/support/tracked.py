"""Read back what trackers got."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from montessori_core.tracking.runs import TrackedRun
from montessori_core.tracking.trackers import PROJECT, mlflow_server

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
INSTALLED = tuple(tracker for tracker in TRACKERS if importlib.util.find_spec(tracker))
"""Trackers of this environment: the extra `tracking` is not in the test environment."""
READABLE = tuple(tracker for tracker in INSTALLED if tracker != "wandb")
"""Those whose numbers are read back: the files of wandb's offline mode have a format of its own."""

Points = dict[str, list[tuple[int, float]]]
"""(Step, value) pairs in the order in which they were logged, by name."""


@pytest.fixture(scope="session")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trackio's folder, which its library reads from the environment when it is imported."""
    return tmp_path_factory.mktemp("trackio")


@pytest.fixture
def offline(tmp_path: Path, trackio_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which trackers need no server."""
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(trackio_folder))
    return tmp_path


def points(tracker: str, run: TrackedRun) -> Points:
    """Return all that a tracker got of a run."""
    return {"tensorboard": _of_tensorboard, "trackio": _of_trackio, "mlflow": _of_mlflow}[tracker](run)


def _of_tensorboard(run: TrackedRun) -> Points:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: Points = {}
    for file in sorted((run.folder / "tensorboard" / run.part).glob("events*"), key=lambda path: path.stat().st_mtime):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def _of_trackio(run: TrackedRun) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    found: Points = {}
    for row in SQLiteStorage.get_logs(PROJECT, run.name):
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "train/global_step"):
                found.setdefault(name, []).append((int(row.get("train/global_step", row["step"])), value))
    return found


def _of_mlflow(run: TrackedRun) -> Points:
    from mlflow import MlflowClient

    client, id = MlflowClient(mlflow_server(run)), run.read_state("mlflow")["run"]
    names = client.get_run(id).data.metrics
    return {name: [(one.step, one.value) for one in client.get_metric_history(id, name)] for name in names}


def values_of(found: Points, name: str) -> list[Any]:
    """Return the values of a number of a training: the names of two trackers have a prefix."""
    return [value for _, value in found.get(f"train/{name}", found.get(name, []))]

"""Open a run in a tracker and log numbers to it. The libraries are imported when they are used.

Each tracker takes its server and key from the environment, as its documentation says: `WANDB_API_KEY`, `WANDB_MODE`,
`MLFLOW_TRACKING_URI`, `TRACKIO_SERVER_URL`, `TRACKIO_SPACE_ID` and others. Without a server, MLflow's database is in the
folder of the run.
"""

import contextvars
import importlib.util
import io
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from montessori_core.errors import UserError
from montessori_core.tracking.runs import TrackedRun

PROJECT = "montessori"
"""Project of all runs, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another."""
_PATIENCE = 60.0  # seconds that a tracker has to send the rest
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own defaults would wait for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_INIT_TIMEOUT": "30",
}


class Tracker(Protocol):
    """A run in a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of a step."""
        ...

    def close(self) -> None:
        """Send what is left, and end the run; it can be opened again."""
        ...


def check_trackers(trackers: Sequence[str]) -> None:
    """Check that the packages of trackers are installed here, and that there is a key where one is needed.

    Raises:
        UserError: they are not, or there is none.
    """
    missing = [tracker for tracker in trackers if importlib.util.find_spec(tracker) is None]
    if missing:
        raise UserError(
            f"tracking: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; run pip install "
            "'montessori[tracking]', or remove the name from tracking"
        )
    if "wandb" in trackers and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        import wandb

        if not wandb.login(prompt=False):
            raise UserError(
                "tracking: wandb has no API key; set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline"
            )


def set_tracker_defaults() -> None:
    """Bound the time that trackers wait for a server, unless the environment does."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def open_tracker(tracker: str, run: TrackedRun) -> Tracker:
    """Open a run in a tracker for the numbers of iterations; the run is continued if it exists."""
    set_tracker_defaults()
    return _TRACKERS[tracker](run)


def tensorboard_folder(run: TrackedRun) -> Path:
    """Return the folder of a run's event files."""
    return run.folder / "tensorboard" / run.part


def start_wandb(run: TrackedRun) -> Any:
    """Start or continue a run of Weights & Biases, which is then the process's run."""
    import wandb

    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run.id,
        name=run.name,
        group=os.environ.get("WANDB_RUN_GROUP", run.group),
        dir=os.environ.get("WANDB_DIR", str(run.folder)),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )


def mlflow_server(run: TrackedRun) -> str:
    """Return the address of MLflow's server, or of the database in the run's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.folder / 'mlflow.db').absolute()}"


def mlflow_run(run: TrackedRun) -> str:
    """Return the id of a run on MLflow's server, which is created once."""
    from mlflow import MlflowClient

    run_id: str | None = run.read_state("mlflow").get("run")
    if run_id is not None:
        return run_id
    client = MlflowClient(mlflow_server(run))
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else client.create_experiment(name)
    created: str = client.create_run(number, run_name=run.name, tags={"montessori.run": run.group}).info.run_id
    run.update_state("mlflow", run=created)
    return created


def wait_for(close: Callable[[], object]) -> None:
    """Call a function that may wait for a server forever; leave it alone after a minute.

    Raises:
        TimeoutError: it has not returned by then.
        Exception: that it raised.
    """
    errors: list[Exception] = []

    def call() -> None:
        try:
            close()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(call,), daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TimeoutError(f"no answer from the server within {_PATIENCE:.0f} s")


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(tensorboard_folder(run)))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        self._run = start_wandb(run)
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "iteration": step})

    def close(self) -> None:
        wait_for(self._run.finish)


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        with redirect_stdout(io.StringIO()):  # it prints how to open its page
            trackio.init(
                project=PROJECT,
                name=run.name,
                group=run.group,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            wait_for(self._trackio.finish)


class _Mlflow:
    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client, self._run = MlflowClient(mlflow_server(run)), mlflow_run(run)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow accepts no other characters in names.
        values = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self._run)


_TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}

"""Report a training to trackers, through transformers' own integrations."""

import copy
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from montessori_core.tracking.runs import TrackedRun, describe, record_problem
from montessori_core.tracking.trackers import (
    PROJECT,
    mlflow_run,
    mlflow_server,
    set_tracker_defaults,
    start_wandb,
    tensorboard_folder,
    wait_for,
)

log = logging.getLogger(__name__)


def tracking_callbacks(inputs: Mapping[str, Path], checkpoints: Path) -> list[TrainerCallback]:
    """Return the callback that reports to the trackers; none if the run has no trackers.

    Args:
        inputs: of the program; `tracking` is the run's `tracking.json`.
        checkpoints: checkpoint folder of the training, whose name is a hash of what decides its result.
    """
    file = inputs.get("tracking")
    if file is None:
        return []
    try:
        stage = checkpoints.parent.parent.resolve().relative_to(file.parent.parent.resolve())
        run = TrackedRun.of(file, f"{stage.as_posix()}-{checkpoints.name[:8]}")
    except Exception as error:  # such as a file that was removed
        log.warning("tracking: %s; the training continues without it", describe(error))
        return []
    return [TrackingCallback(file, run)]


class TrackingCallback(TrainerCallback):
    """Forward a training's log to transformers' integrations.

    * A restarted training continues its runs. The steps since its checkpoint have the same numbers again, and are not logged
      twice: the last logged step is recorded before a step is logged.
    * A tracker that fails is dropped, with a warning and an entry in the run's problems; the training continues.
    """

    def __init__(self, file: Path, run: TrackedRun) -> None:
        """Report to `run`, whose `tracking.json` is `file`."""
        self._file, self._run = file, run
        self._integrations: dict[str, TrainerCallback] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start or continue the runs."""
        if not state.is_world_process_zero:
            return
        set_tracker_defaults()
        named = _named(args, self._run)
        for tracker in self._run.trackers:
            integration = self._guarded(tracker, partial(_OPEN[tracker], self._run))
            if integration is not None:
                self._integrations[tracker] = integration
        for tracker, integration in list(self._integrations.items()):
            # TensorBoard would write the arguments as text once more.
            if tracker != "tensorboard" or not self._run.read_state(tracker):
                self._guarded(tracker, partial(integration.on_train_begin, named, state, control, **kwargs))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a step, or the summary after the last one, unless it is logged already."""
        place = state.global_step if "loss" in (logs or {}) else state.global_step + 0.5
        for tracker, integration in list(self._integrations.items()):
            if place <= self._run.read_state(tracker).get("place", 0):
                continue
            self._guarded(tracker, partial(self._run.update_state, tracker, place=place))
            if tracker not in self._integrations:
                continue
            named = _named(args, self._run)
            self._guarded(tracker, partial(integration.on_log, named, state, control, logs=dict(logs or {}), **kwargs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send what is left, and end the runs."""
        for tracker, integration in list(self._integrations.items()):
            self._guarded(tracker, partial(integration.on_train_end, args, state, control, **kwargs))
            self._guarded(tracker, _CLOSE[tracker])

    def _guarded(self, tracker: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # of any kind: a tracker never ends a training
            log.warning("tracking: %s: %s; the training continues without it", tracker, describe(error))
            record_problem(self._file, tracker, error)
            self._integrations.pop(tracker, None)
            return None


def _named(args: TrainingArguments, run: TrackedRun) -> TrainingArguments:
    """Return the arguments with the names that Trackio's integration reads."""
    named = copy.copy(args)
    named.run_name, named.project = run.name, PROJECT
    return named


def _open_tensorboard(run: TrackedRun) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(tensorboard_folder(run))))


def _open_wandb(run: TrackedRun) -> TrainerCallback:
    from transformers.integrations import WandbCallback

    start_wandb(run)
    return WandbCallback()


def _open_trackio(run: TrackedRun) -> TrainerCallback:
    from transformers.integrations import TrackioCallback

    return TrackioCallback()


def _open_mlflow(run: TrackedRun) -> TrainerCallback:
    import mlflow
    from transformers.integrations import MLflowCallback

    class SynchronousMlflow(MLflowCallback):  # type: ignore[misc]
        def setup(self, *args: Any, **kwargs: Any) -> None:
            super().setup(*args, **kwargs)
            self._async_log = False  # otherwise errors are lost, and so are the last steps of a killed job

    for name in ("MLFLOW_RUN_ID", "MLFLOW_NESTED_RUN"):  # of a job that the driver runs in
        os.environ.pop(name, None)
    if "place" in run.read_state("mlflow"):
        os.environ["MLFLOW_MAX_LOG_PARAMS"] = "0"  # they are there, and must not change
    mlflow.set_tracking_uri(mlflow_server(run))
    mlflow.start_run(run_id=mlflow_run(run))
    return SynchronousMlflow()


def _end_wandb() -> None:
    import wandb

    wait_for(wandb.finish)


def _end_mlflow() -> None:
    import mlflow

    mlflow.end_run()


_OPEN: dict[str, Callable[[TrackedRun], TrainerCallback]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
    "mlflow": _open_mlflow,
}
_CLOSE: dict[str, Callable[[], None]] = {
    "tensorboard": lambda: None,
    "wandb": _end_wandb,
    "trackio": lambda: None,  # its integration does
    "mlflow": _end_mlflow,
}

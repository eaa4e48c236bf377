"""Checkpoints of a training: when they are saved, and which are complete.

Checkpoints are saved by the clock, the more rarely the longer saving takes, and before the scheduler ends the job.
"""

import logging
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from montessori_core.config.section import Section
from montessori_core.files import hash_json, make_folder_of_pickles
from montessori_core.layout import CHECKPOINT_FOLDER
from montessori_core.models.fetch import fingerprint
from montessori_core.training.schedule import CHECKPOINT_SECONDS

log = logging.getLogger(__name__)

_TIME_SHARE = 0.05
"""Share of the training time that saving may take."""
_GRACE = 60.0
"""Seconds that a job has at least between the scheduler's signal and its end; submitit asks Slurm for 90."""
_COMPLETE = "whole"
"""File that marks a complete checkpoint."""


def checkpoint_folder(output: Path, settings: Section, model: str, rows: Sequence[object]) -> Path:
    """Create the checkpoint folder of a training, next to its result; its name is a hash of everything that decides it.

    As in a stage's key, a new option that is off changes nothing: a training resumes after an upgrade.
    The driver removes it once the stage is done: until then, a killed job resumes from its last checkpoint.
    """
    inputs = [
        settings.model_dump(mode="json", exclude_none=True),
        fingerprint(Path(model)),
        rows,
        os.environ["WORLD_SIZE"],
    ]
    folder = output.parent / CHECKPOINT_FOLDER / hash_json(inputs)[:16]
    make_folder_of_pickles(folder)
    return folder


def last_complete_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint to resume from."""
    complete = [path.parent for path in checkpoints.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_other_checkpoints(checkpoints: Path) -> None:
    """Remove all checkpoints but the last complete one, from which a training resumes."""
    last = last_complete_checkpoint(checkpoints)
    for path in checkpoints.glob("checkpoint-*"):
        if path != last:
            shutil.rmtree(path, ignore_errors=True)


class CheckpointCallback(TrainerCallback):
    """Mark complete checkpoints; save one when enough time has passed or the scheduler is about to end the job.

    An all-reduce after each step lets all processes save after the same step.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._last_save = time.monotonic()
        self._step_end = 0.0
        self._longest_save = 0.0
        # submitit's handler requeues the job at once, even in the middle of a step.
        self._previous_handler = signal.signal(signal.SIGUSR2, self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if self._longest_save > _GRACE:
            log.warning(
                "the scheduler ends this job, and a checkpoint takes %.0f s: exiting without one", self._longest_save
            )
            self._exit()

    def _exit(self) -> None:
        if callable(self._previous_handler):
            self._previous_handler(signal.SIGUSR2, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint if one is due."""
        interval = max(CHECKPOINT_SECONDS, self._longest_save / _TIME_SHARE)
        due = torch.tensor(self._signalled or time.monotonic() - self._last_save > interval, dtype=torch.int32)
        due = due.to(args.device)
        torch.distributed.all_reduce(due, torch.distributed.ReduceOp.MAX)
        control.should_save |= bool(due) and state.global_step < state.max_steps
        self._step_end = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as complete and remove the one before it; exit if the scheduler ends the job."""
        torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoints = Path(args.output_dir)
            (checkpoints / f"checkpoint-{state.global_step}" / _COMPLETE).touch()
            remove_other_checkpoints(checkpoints)
        self._last_save = time.monotonic()
        self._longest_save = max(self._longest_save, self._last_save - self._step_end)
        if self._signalled:
            log.info("the scheduler ends this job: exiting with checkpoint-%d", state.global_step)
            self._exit()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the signal handler: saving the model takes less time than repeating the last steps."""
        signal.signal(signal.SIGUSR2, self._previous_handler)

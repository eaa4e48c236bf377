"""When a training saves a checkpoint, and which of them count.

Ten are spread evenly over a training, more come by the clock, and one when the scheduler says that the job has to go.
"""

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from montessori_core.files import hash_json
from montessori_core.models.fetch import fingerprint
from montessori_core.training.schedule import CHECKPOINT_SECONDS, CHECKPOINTS

log = logging.getLogger(__name__)

_STEPS_WORTH_ONE = 20
_COST = 0.05
"""Share of the time that saving by the clock may take."""
_GRACE = 60.0
"""Seconds that a job is surely given to leave; submitit asks Slurm for 90."""
_WHOLE = "whole"
"""File in a checkpoint that was written to its end."""


def checkpoint_folder(output: Path, settings: Mapping[str, Any], model: str, rows: Sequence[object]) -> Path:
    """Where a training keeps its checkpoints: beside its result, and of these settings, weights, rows and processes alone."""
    decides = [dict(settings), fingerprint(Path(model)), rows, os.environ["WORLD_SIZE"]]
    folder = output.parent / "checkpoints" / hash_json(decides)[:16]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # torch keeps pickles here
    return folder


def evenly_spread(steps: int) -> dict[str, Any]:
    """The trainer's arguments for the checkpoints that come in any case; a short training needs none."""
    return {
        "save_strategy": "steps" if steps >= _STEPS_WORTH_ONE else "no",
        "save_steps": 1 / CHECKPOINTS,
        "save_total_limit": 2,  # the last may be half written when the job is killed
    }


def last_whole(checkpoints: Path) -> Path | None:
    """The checkpoint to go on from."""
    whole = [path.parent for path in checkpoints.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class CheckpointCallback(TrainerCallback):
    """Marks checkpoints that are whole, and has one saved when much time has passed or the job is told to go.

    All processes save after the same step: they agree on it after each one.
    """

    def __init__(self) -> None:
        self._told = False
        self._last = time.monotonic()
        self._begun = 0.0
        self._longest = 0.0
        # submitit's own handler puts the job back into the queue at once, wherever it is in a step.
        self._leave = signal.signal(signal.SIGUSR2, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        if self._longest > _GRACE:
            log.warning("told to go, and a checkpoint takes %.0f s: leaving without one", self._longest)
            self._go()

    def _go(self) -> None:
        if callable(self._leave):
            self._leave(signal.SIGUSR2, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer."""
        waited = time.monotonic() - self._last
        due = torch.tensor(self._told or waited > max(CHECKPOINT_SECONDS, self._longest / _COST), dtype=torch.int32)
        due = due.to(args.device)
        torch.distributed.all_reduce(due, torch.distributed.ReduceOp.MAX)
        control.should_save |= bool(due) and state.global_step < state.max_steps
        self._begun = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer."""
        torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()
        self._last = time.monotonic()
        self._longest = max(self._longest, self._last - self._begun)
        if self._told:
            log.info("told to go: leaving with checkpoint-%d", state.global_step)
            self._go()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer. What is left to do is quicker than what would have to be done again."""
        signal.signal(signal.SIGUSR2, self._leave)

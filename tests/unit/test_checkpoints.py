"""When a training saves checkpoints: after an interval, and before the scheduler ends it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from montessori_core import programs
from montessori_core.config import TeacherUpdate, Zero
from montessori_core.training import checkpoints
from montessori_core.training.checkpoints import (
    CheckpointCallback,
    checkpoint_folder,
    last_complete_checkpoint,
    remove_other_checkpoints,
)


class Training:
    """A trainer that calls the callback; saving takes no time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
        self.state = TrainerState(max_steps=100, is_world_process_zero=True)
        self.callback = CheckpointCallback()

    def step(self) -> bool:
        """Take a step; return whether the callback asked for a checkpoint, which is then saved."""
        control = TrainerControl()
        self.state.global_step += 1
        self.callback.on_step_end(self.arguments, self.state, control)
        if control.should_save:
            (self.folder / f"checkpoint-{self.state.global_step}").mkdir()
            self.callback.on_save(self.arguments, self.state, control)
        return control.should_save

    def end(self) -> None:
        """End the training."""
        self.callback.on_train_end(self.arguments, self.state, TrainerControl())


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    before = signal.getsignal(signal.SIGUSR2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Training(tmp_path)
    torch.distributed.destroy_process_group()
    signal.signal(signal.SIGUSR2, before)


def test_checkpoint_is_saved_after_interval(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not training.step()
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    assert training.step()
    assert last_complete_checkpoint(training.folder) == training.folder / "checkpoint-2"
    (training.folder / "checkpoint-3").mkdir()  # incomplete
    assert last_complete_checkpoint(training.folder) == training.folder / "checkpoint-2"
    remove_other_checkpoints(training.folder)
    assert [path.name for path in training.folder.iterdir()] == ["checkpoint-2"]
    training.callback._longest_save = 0.0
    assert training.step()
    assert [path.name for path in training.folder.iterdir()] == ["checkpoint-3"]
    training.callback._longest_save = 600.0  # a large model; saving may take a twentieth of the time
    assert not training.step()


def test_signalled_training_saves_before_exit(tmp_path: Path, training: Training) -> None:
    gone: list[int] = []
    training.end()
    signal.signal(signal.SIGUSR2, lambda number, frame: gone.append(training.state.global_step))
    training.callback = CheckpointCallback()
    assert not training.step()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert gone == []
    assert training.step()
    assert gone == [2]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_signalled_training_with_slow_checkpoints_exits(training: Training) -> None:
    gone: list[int] = []
    training.end()
    signal.signal(signal.SIGUSR2, lambda number, frame: gone.append(number))
    training.callback = CheckpointCallback()
    training.callback._longest_save = 61.0
    os.kill(os.getpid(), signal.SIGUSR2)
    assert gone == [signal.SIGUSR2]


def test_signal_handler_is_restored_after_training(training: Training) -> None:
    gone: list[int] = []
    training.end()
    signal.signal(signal.SIGUSR2, lambda number, frame: gone.append(number))
    training.callback = CheckpointCallback()
    training.end()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert gone == [signal.SIGUSR2]


def test_new_option_that_is_off_keeps_checkpoints(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LaterDpo(programs.Dpo):
        """DPO in a later version."""

        new_option: int | None = None

    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = {"prompt_style": "chat", "recipe": TeacherUpdate(), "zero": Zero(), "seed": 0}
    before, off, on = (
        checkpoint_folder(tmp_path / "part-00000", dpo, str(tiny_llama), [])
        for dpo in (
            programs.Dpo.model_validate(settings),
            LaterDpo.model_validate(settings),
            LaterDpo.model_validate(settings | {"new_option": 1}),
        )
    )
    assert before == off != on

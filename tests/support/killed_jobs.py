"""Find local jobs; kill them in the middle of a training, or before its result is committed; count checkpoints.

The trainings save a checkpoint after each step: those of tests end before the first is due.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from montessori_core import programs
from montessori_core.program import Compute, Report

SFT = replace(programs.SFT, entry="support.killed_jobs:open_sft")
BF16_SFT = replace(programs.SFT, entry="support.killed_jobs:open_bf16_sft")
DYING_SFT = replace(programs.SFT, entry="support.killed_jobs:open_dying_sft")
COUNTED_SFT = replace(programs.SFT, entry="support.killed_jobs:open_counted_sft")
DPO = replace(programs.DPO, entry="support.killed_jobs:open_dpo")


def jobs_of(folder: Path) -> list[psutil.Process]:
    """Return the local jobs of stages in a folder that are alive."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        lives = process.info["status"] != psutil.STATUS_ZOMBIE
        if lives and "cluster.supervisor" in command and str(folder) in command:
            found.append(process)
    return found


def kill_jobs_once(stage: Path, beyond: int) -> threading.Thread:
    """In the background, kill -9 the jobs of a stage once a checkpoint after step `beyond` is complete."""

    def watch() -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            whole = [path.parent.name for path in stage.glob("checkpoints/*/checkpoint-*/whole")]
            if any(int(name.split("-")[1]) > beyond for name in whole):
                for job in jobs_of(stage):
                    with suppress(psutil.NoSuchProcess):  # its supervisor was killed before it
                        job.kill()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def save_after_each_step() -> None:
    """Let trainings of this process save a checkpoint after each step."""
    from montessori_core.training import checkpoints

    checkpoints.CHECKPOINT_SECONDS = 0.0
    checkpoints._TIME_SHARE = math.inf


def open_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute:
    """Train a student, see `montessori_core.training.sft`."""
    from montessori_core.training import sft

    save_after_each_step()
    return sft.open_sft(settings, inputs)


def open_counted_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute:
    """Train a student; `bytes.txt` in the stage's folder gets the bytes of all checkpoints whenever one is written."""
    from montessori_core.training.checkpoints import CheckpointCallback

    complete = CheckpointCallback.on_save

    def on_save(callback: CheckpointCallback, args: Any, *others: Any, **named: Any) -> None:
        folder = Path(args.output_dir)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt")]
        with (folder.parents[1] / "bytes.txt").open("a") as log:
            print(sum(sizes), file=log)
        complete(callback, args, *others, **named)

    CheckpointCallback.on_save = on_save  # type: ignore[method-assign]
    return open_sft(settings, inputs)


def open_bf16_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute:
    """Train a student with bf16 copies of its weights."""
    from support import bf16

    save_after_each_step()
    return bf16.open_sft(settings, inputs)


def open_dpo(settings: programs.Dpo, inputs: Mapping[str, Path]) -> Compute:
    """Update a teacher, see `montessori_core.training.dpo`."""
    from montessori_core.training import dpo

    save_after_each_step()
    return dpo.open_dpo(settings, inputs)


def open_dying_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute:
    """Train a student; the first job dies when its result is written."""
    train = open_sft(settings, inputs)

    def compute(rows: list[Any], output: Path, report: Report) -> None:
        train(rows, output, report)
        died = output.parent / "died"
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return compute

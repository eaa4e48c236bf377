"""Find local jobs; kill them in the middle of a training, or before its result is committed."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from montessori_core import programs
from montessori_core.program import Compute, Report


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


def open_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute:
    """Train a student, see `montessori_core.training.sft`; the first job dies when its result is written."""
    from montessori_core.training import sft

    train = sft.open_sft(settings, inputs)

    def compute(rows: list[Any], output: Path, report: Report) -> None:
        train(rows, output, report)
        died = output.parent / "died"
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return compute

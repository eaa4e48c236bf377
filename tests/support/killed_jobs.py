"""Find local jobs, and kill them in the middle of a training."""

import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil


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

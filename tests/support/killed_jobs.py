"""Kill jobs in the middle of a training."""

import threading
import time
from pathlib import Path

import psutil


def kill_jobs_once(stage: Path, beyond: int) -> threading.Thread:
    """In the background, kill -9 the jobs of a stage once a checkpoint after step `beyond` is complete."""

    def watch() -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            whole = [path.parent.name for path in stage.glob("checkpoints/*/checkpoint-*/whole")]
            if any(int(name.split("-")[1]) > beyond for name in whole):
                for process in psutil.process_iter(["cmdline"]):
                    if "cluster.supervisor" in (line := " ".join(process.info["cmdline"] or [])) and str(stage) in line:
                        process.kill()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread

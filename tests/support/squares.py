"""A stage of squares whose rows fail on demand, and its driver: for tests of the fan-out, local and on Slurm."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from cluster.fanout import fan_out
from cluster.ledger import Ledger, Submission
from cluster.stage import Stage
from montessori_core.config import Cluster, Resources
from montessori_core.program import Row
from support import NO_LIBRARIES, ROOT
from support.row_programs import as_shards

CLUSTER = Cluster(poll_seconds=0.05)
SHARDS: list[list[Row]] = [[{"n": 10 * shard + row} for row in range(3)] for shard in range(6)]
NUMBERS = [row["n"] for shard in SHARDS for row in shard]
PROGRAM = """
import json, os, signal, time
from pathlib import Path
from montessori_core.program import NotOpened

class OutOfMemoryError(RuntimeError):  # as torch's
    pass

def taken(file):
    try:
        file.unlink()
    except FileNotFoundError:  # no such file, or another job took it
        return False
    return True

def open_squares(settings, inputs):
    folder = Path(settings["folder"])
    with (folder / "opened.txt").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    if (folder / "does-not-open").exists():
        raise RuntimeError("the model does not load")
    if taken(folder / "no-memory"):
        raise MemoryError("another process has it")
    def compute(rows, output, report):
        for number, row in enumerate(rows, 1):
            with (folder / "computed.txt").open("a") as log:
                log.write(f"{row['n']}\\n")
            if taken(folder / f"kill-{row['n']}"):
                os.kill(os.getpid(), signal.SIGKILL)
            if (folder / f"fail-{row['n']}").exists():
                raise ValueError(f"row {row['n']} is bad")
            if (folder / "opens-late").exists():
                raise NotOpened("the engine does not load") from RuntimeError("see root cause above")
            if (folder / f"gpu-{row['n']}").exists():
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if taken(folder / f"peer-{row['n']}"):
                raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")
            if (folder / f"full-{row['n']}").exists():
                Path("/dev/full").write_text("x")  # no space left on device
            if taken(folder / f"hang-{row['n']}"):
                time.sleep(600)
            time.sleep(settings["seconds"])
            report(number)
        output.write_text(json.dumps([row["n"] ** 2 for row in rows]))
    return compute
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program of squares, on the path of jobs."""
    (tmp_path / "squares_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests"))))
    return tmp_path


@pytest.fixture
def forking_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program of squares; its jobs start from one warm process, which imports no large library."""
    (tmp_path / "squares_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (NO_LIBRARIES, ROOT, ROOT / "tests"))))
    return tmp_path


def stage(folder: Path, seconds: float = 0.0, version: int = 1) -> Stage:
    settings = {"folder": str(folder), "seconds": seconds}
    return Stage(
        "squares", version, "support.squares_program:open_squares", settings, {}, {}, folder / "stage", ".json"
    )


def run(
    folder: Path,
    shards: list[list[Row]] = SHARDS,
    jobs: int = 2,
    seconds: float = 0.0,
    python: str | None = None,
    **options: float,
) -> list[Path]:
    resources = Resources(parallel_jobs=jobs, cpus_per_process=1, **options)
    return fan_out(stage(folder, seconds), as_shards(*shards), resources, CLUSTER, python=python)


def key_of(made: Stage, rows: list[Row]) -> str:
    return made.key(pa.Table.from_pylist(rows))


def submissions(folder: Path, name: str = "stage") -> list[Submission]:
    return Ledger(folder / name / "jobs").submissions


def results(parts: list[Path]) -> list[int]:
    return [value for part in parts for value in json.loads(part.read_text())]


def computed(folder: Path) -> list[int]:
    log = folder / "computed.txt"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


EXPECTED = [number**2 for number in NUMBERS]


DRIVER = """
    import sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from support.squares import run, results
    print("begun", flush=True)
    print(results(run(Path({folder!r}), jobs=2, seconds=0.15)))
"""


def start_driver(folder: Path) -> subprocess.Popen[str]:
    code = textwrap.dedent(DRIVER.format(tests=str(ROOT / "tests"), folder=str(folder)))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def jobs_alive(folder: Path) -> int:
    return sum(
        str(folder) in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
        for process in psutil.process_iter(["cmdline", "status"])
        if process.pid != os.getpid()
    )

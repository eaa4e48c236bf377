"""A stage of squares on the Slurm of the tests, and a program of several processes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from cluster.fanout import fan_out
from cluster.progress import Progress
from cluster.stage import Stage
from montessori_core.config import Cluster, Resources, Slurm
from montessori_core.program import Row
from support import squares as local
from support.row_programs import as_shards
from support.slurm_lab import command_of

SHARDS = local.SHARDS


PROCESSES_PROGRAM = """
import json, os, platform, time
from pathlib import Path

def open_processes(settings, inputs):
    folder = Path(settings["folder"])
    rank = os.environ["RANK"]
    def compute(rows, output, report):
        if rank == settings["failing_rank"]:
            raise ValueError(f"rank {rank} is bad")
        (folder / f"rank-{rank}.json").write_text(json.dumps({"node": platform.node(), **os.environ}))
        while len(list(folder.glob("rank-*.json"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.1)
        output.write_text(rank)
    return compute
"""


ONE_A_NODE = Slurm(exclusive=True)


def run(
    folder: Path,
    shards: list[list[Row]] = SHARDS,
    seconds: float = 0.0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    slurm: Slurm = Slurm(),  # noqa: B008 (frozen)
    stage: Stage | None = None,
    **resources: float,
) -> list[Path]:
    cluster = Cluster(profile="slurm", poll_seconds=0.5, slurm=slurm)
    defaults: dict[str, float] = {"parallel_jobs": 8, "cpus_per_process": 1, "shards_per_job": 1}
    return fan_out(
        stage or local.stage(folder, seconds),
        as_shards(*shards),
        Resources(**defaults | resources),
        cluster,
        on_progress,
    )


def once(condition: Callable[[], bool], action: Callable[[], object]) -> Callable[[Progress], None]:
    """Return an `on_progress` callback that acts when the condition holds for the first time."""
    acted = False

    def look(progress: Progress) -> None:
        nonlocal acted
        if not acted and condition():
            acted = True
            action()

    return look


def start_driver(folder: Path, **options: object) -> subprocess.Popen[str]:
    command = command_of("support.slurm_stage", f"t.run(Path({str(folder)!r}), **{options!r})")
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def processes(folder: Path, failing_rank: str = "") -> Stage:
    settings = {"folder": str(folder), "failing_rank": failing_rank}
    return Stage("processes", 1, "processes_program:open_processes", settings, {}, {}, folder / "stage", ".json")

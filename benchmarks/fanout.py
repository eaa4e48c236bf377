"""Measure the overhead of the fan-out with 100, 1,000 and 10,000 shards that only sleep.

    python benchmarks/fanout.py [--profile local|slurm] [--shards 100 1000 10000] [--seconds 0.5] [--jobs 16]

A real shard takes a minute on its GPU; here --jobs shards sleep for --seconds at the same time on a few cores. The result is
an upper bound, because the workers compete for these cores. The two kinds of overhead scale differently and are reported
separately:

* of a worker, per shard: reading the shard, then writing, hashing and committing its result while a GPU waits; measured
  between two commits of a job;
* of the driver, once: from the call until the jobs are submitted, and from the last commit to the return. The start-up time
  of jobs is not included.

The table also has the resulting overhead of a stage of 60 s shards on 64 and on 1,000 GPUs, the driver's peak memory, and the
number of scheduler queries. With --profile slurm the shards go through sbatch, e.g. to docker/slurm/lab.sh.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from cluster.backends import slurm
from cluster.backends.command import run_command
from cluster.fanout import fan_out
from cluster.ledger import Ledger
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import Cluster, Resources, Slurm
from montessori_core.data.rows import Rows

PROGRAM = """
import time
import pyarrow as pa, pyarrow.parquet as pq

def open_sleep(settings, inputs):
    def compute(rows, output, report):
        time.sleep(settings["seconds"])
        report(len(rows))
        pq.write_table(pa.table({"row": [row["n"] for row in rows]}), output)
    return compute
"""
ROWS = 64  # per shard, the default of the influence stage
SHARD_SECONDS = 60.0
_POLL = 2.0  # seconds between polls


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=["local", "slurm"], default="local", help="where the shards run")
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000, 10_000], help="numbers of shards")
    parser.add_argument("--seconds", type=float, default=0.5, help="sleep of each shard")
    parser.add_argument("--jobs", type=int, default=16, help="jobs running at a time")
    parser.add_argument("--shards-per-job", type=int, default=50, help="shards per array task (Slurm)")
    parser.add_argument("--folder", type=Path, default=Path(), help="parent of scratch folders; shared, for Slurm")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments, arguments.measure)))  # noqa: T201
        return
    lines = [
        "| shards | wall, s | driver: before, after, s | worker, s per shard | peak memory of the driver, MB | scheduler "
        "queries | overhead at 60 s, 64 GPUs | 1,000 GPUs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shards in arguments.shards:
        # A new process for each size, because peak memory never decreases.
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(shards)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        lines.append(
            f"| {shards} | {result['wall']:.0f} | {result['before']:.1f}, {result['after']:.1f} | {result['worker']:.3f} | "
            f"{result['megabytes']:.0f} | {result['queries']} | {overhead(result, shards, 64):.2%} | "
            f"{overhead(result, shards, 1000):.2%} |"
        )
        print("\n".join(lines) if len(lines) == 3 else lines[-1], flush=True)  # noqa: T201


def measure(arguments: argparse.Namespace, shards: int) -> dict[str, float]:
    """Run and time one fan-out of sleeping shards."""
    queries = 0

    def count_commands(*command: str, timeout: float = 120.0) -> str | None:
        nonlocal queries
        queries += 1
        return run_command(*command, timeout=timeout)

    with (
        patch.object(slurm, "run_command", count_commands),
        tempfile.TemporaryDirectory(dir=arguments.folder) as scratch,
    ):
        folder = Path(scratch).resolve()
        (folder / "sleeping_program.py").write_text(PROGRAM)
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{Path(__file__).resolve().parent.parent}"
        settings = {"seconds": arguments.seconds}
        warming, stage = (
            Stage("sleep", 1, "sleeping_program:open_sleep", settings, {}, {}, folder / name)
            for name in ("warming", "stage")
        )
        rows = Shards(Rows.of([{"n": number} for number in range(ROWS * shards)]), ROWS)
        resources = Resources(parallel_jobs=arguments.jobs, cpus_per_process=1, shards_per_job=arguments.shards_per_job)
        cluster = Cluster(profile=arguments.profile, poll_seconds=_POLL, slurm=Slurm())
        polls: list[float] = []
        if arguments.profile == "local":  # the process that local jobs are forked from starts once
            fan_out(warming, Shards(Rows.of([{"n": 0}]), 1), resources, cluster, lambda progress: None)
        started = time.time()
        fan_out(stage, rows, resources, cluster, lambda progress: polls.append(time.time()))
        ended = time.time()
        commits = [stage.manifest(index).stat().st_mtime for index in range(shards)]
        tasks = [task for submission in Ledger(stage.folder / "jobs").submissions for task in submission.tasks]
    between = [commits[b] - commits[a] for task in tasks for a, b in itertools.pairwise(task)]
    return {
        "wall": ended - started,
        "before": polls[1] - _POLL - started,  # jobs are submitted between the first two polls
        "after": ended - max(commits),
        "worker": statistics.mean(between) - arguments.seconds,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "queries": queries,
    }


def overhead(result: dict[str, float], shards: int, gpus: int) -> float:
    """Return both overheads as a share of the compute time of a stage of 60 s shards on `gpus` GPUs."""
    compute = SHARD_SECONDS * max(1.0, shards / gpus)
    worker = result["worker"] * max(1.0, shards / gpus)
    return (result["before"] + result["after"] + worker) / compute


if __name__ == "__main__":
    main()

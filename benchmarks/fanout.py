"""What the fan-out itself costs: shards that sleep, at 100, 1,000 and 10,000 of them.

    python benchmarks/fanout.py [--profile local|slurm] [--shards 100 1000 10000] [--seconds 0.5] [--jobs 16]

A real shard takes a minute on a GPU of its own; here it sleeps for --seconds beside --jobs - 1 others on a few cores, so
that what is measured is an upper bound: the workers' own overhead contends for the same cores. Two kinds of overhead do
not scale alike, and are reported apart:

* a worker's, for each shard: reading it, writing, hashing and committing its result (a GPU waits meanwhile), taken from
  the time between two commits of one job;
* the driver's, once: from the call until the jobs are submitted, and from the last commit to the return (all wait). How long
  a job takes to start is Slurm's, Python's and the model's affair.

The table also says what they make of a stage of shards of 60 s on 64 and on 1,000 GPUs, the driver's peak memory, and how
often it asked the scheduler. With --profile slurm the shards go through sbatch, e.g. to docker/slurm/lab.sh.
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

from cluster import backends
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
        started = time.time()
        time.sleep(settings["seconds"])
        report(len(rows))
        pq.write_table(pa.table({"row": [row["n"] for row in rows]}), output)
    return compute
"""
ROWS = 64  # of a shard, as the influence stage has by default
SHARD_SECONDS = 60.0
_POLL = 2.0  # seconds between looks


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=["local", "slurm"], default="local", help="where the shards run")
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000, 10_000], help="how many")
    parser.add_argument("--seconds", type=float, default=0.5, help="that a shard sleeps")
    parser.add_argument("--jobs", type=int, default=16, help="shards at work at a time")
    parser.add_argument("--shards-per-job", type=int, default=50, help="shards of one array task (Slurm)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where scratch folders are made; shared, for Slurm")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments, arguments.one)))  # noqa: T201
        return
    lines = [
        "| shards | wall, s | driver: before, after, s | worker: a shard, s | peak memory of the driver, MB | looks at the "
        "scheduler | overhead at 60 s, 64 GPUs | 1,000 GPUs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shards in arguments.shards:
        # A process of its own for each size: peak memory never falls.
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(shards)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        lines.append(
            f"| {shards} | {found['wall']:.0f} | {found['before']:.1f}, {found['after']:.1f} | {found['worker']:.3f} | "
            f"{found['megabytes']:.0f} | {found['looks']} | {overhead(found, shards, 64):.2%} | "
            f"{overhead(found, shards, 1000):.2%} |"
        )
        print("\n".join(lines) if len(lines) == 3 else lines[-1], flush=True)  # noqa: T201


def measure(arguments: argparse.Namespace, shards: int) -> dict[str, float]:
    """One fan-out of sleeping shards, timed."""
    looks = 0
    ask = backends.ask

    def counted(*command: str, timeout: float = 120.0) -> str | None:
        nonlocal looks
        looks += 1
        return ask(*command, timeout=timeout)

    backends.ask = counted
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch).resolve()
        (folder / "sleeping_program.py").write_text(PROGRAM)
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{Path(__file__).resolve().parent.parent}"
        settings = {"seconds": arguments.seconds}
        stage = Stage("sleep", 1, "sleeping_program:open_sleep", settings, {}, {}, folder / "stage")
        rows = Shards(Rows.of([{"n": number} for number in range(ROWS * shards)]), ROWS)
        resources = Resources(parallel_jobs=arguments.jobs, cpus_per_process=1, shards_per_job=arguments.shards_per_job)
        cluster = Cluster(profile=arguments.profile, poll_seconds=_POLL, slurm=Slurm())
        looked: list[float] = []
        started = time.time()
        fan_out(stage, rows, resources, cluster, lambda progress: looked.append(time.time()))
        ended = time.time()
        commits = [stage.manifest(index).stat().st_mtime for index in range(shards)]
        tasks = [task for submission in Ledger(stage.folder / "jobs").submissions for task in submission.tasks]
    between = [commits[b] - commits[a] for task in tasks for a, b in itertools.pairwise(task)]
    return {
        "wall": ended - started,
        "before": looked[1] - _POLL - started,  # jobs are submitted between the first two looks
        "after": ended - max(commits),
        "worker": statistics.mean(between) - arguments.seconds,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "looks": looks,
    }


def overhead(found: dict[str, float], shards: int, gpus: int) -> float:
    """Share that both overheads add to a stage of shards of 60 s on so many GPUs."""
    compute = SHARD_SECONDS * max(1.0, shards / gpus)
    worker = found["worker"] * max(1.0, shards / gpus)
    return (found["before"] + found["after"] + worker) / compute


if __name__ == "__main__":
    main()

"""Compare the simulation of `montessori forecast` with a real Slurm: predicted and measured time of the same stages.

    LAB=/tmp/lab NODES=4 CPUS=1 docker/slurm/lab.sh start && eval "$(LAB=/tmp/lab docker/slurm/lab.sh env)"
    LAB=/tmp/lab python benchmarks/simulation.py --folder /tmp [--runs 4]
    LAB=/tmp/lab docker/slurm/lab.sh stop

Shards sleep for random times, without partial commits. A *pilot* of 8 shards without faults measures the cost of a row. From
this, the program predicts 96 shards and then runs them --runs times, under each of:

* no faults, with four jobs at a time and with two;
* preemption: each running job is requeued (scontrol requeue) at random, every 20 s on average;
* failing nodes: each node crashes (lab.sh kill-node) every 60 s on average and is restarted after 20 s.

Each line has the median and 80 % range of the simulations, then the measured runs. The lab notices a crashed node at once and
starts a requeued job after --requeue-seconds.
"""

import argparse
import math
import os
import random
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cluster.fanout import fan_out
from cluster.shards import Shards
from cluster.simulation import ClusterSpec, FailureModel, Work, simulate
from cluster.stage import Stage
from cluster.usage import StageCost, cost_of, use_of
from montessori_core.config import Cluster, Resources
from montessori_core.data.rows import Rows

PROGRAM = """
import random, time
import pyarrow as pa, pyarrow.parquet as pq

def open_sleep(settings, inputs):
    def compute(rows, output, report):
        for row in rows:
            time.sleep(random.Random(row["n"]).lognormvariate(-0.125, 0.5) * settings["seconds"])
        report(len(rows))
        pq.write_table(pa.table({"row": [row["n"] for row in rows]}), output)
    return compute
"""
NODES = 4
ROWS, SECONDS = 8, 0.3  # rows per shard, mean sleep of a row
SHARDS, SHARDS_PER_JOB = 96, 6
PREEMPTION, FAILURE, REPAIR = 20.0, 60.0, 20.0  # seconds
SIMULATIONS = 400


def main() -> None:
    """Run the pilot, then predict and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="parent of scratch folders; shared, for Slurm")
    parser.add_argument("--runs", type=int, default=4, help="measured runs per line")
    parser.add_argument(
        "--requeue-seconds", type=float, default=6.0, help="requeue delay of the lab; see cred_expire in slurm.conf"
    )
    arguments = parser.parse_args()

    cost, _ = run(arguments.folder, 8, NODES, lambda stop: None)
    print(  # noqa: T201
        f"pilot: {cost.seconds_per_row:.3f} s a row, spread {cost.spread:.2f}, opening {cost.opening:.1f} s\n\n"
        "| | simulated, s: median, 10 % to 90 % | measured, s | job seconds, simulated | measured | requeued, simulated "
        "| measured |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    delay = arguments.requeue_seconds
    no_faults = FailureModel(requeue_seconds=delay)
    preemption = FailureModel(preemption_hours=PREEMPTION / 3600, requeue_seconds=delay)
    crashes = FailureModel(FAILURE / 3600, notice_seconds=0.0, repair_minutes=REPAIR / 60, requeue_seconds=delay)
    for name, at_once, failures, inject_faults in (
        ("no faults, 4 jobs at a time", 4, no_faults, lambda stop: None),
        ("no faults, 2 jobs at a time", 2, no_faults, lambda stop: None),
        ("preemption", 4, preemption, preempt),
        ("failing nodes", 4, crashes, crash_nodes),
    ):
        work = planned(cost, at_once)
        simulated = [simulate([work], ClusterSpec(NODES, 0, 1), failures, seed)[0] for seed in range(SIMULATIONS)]
        deciles = statistics.quantiles([outcome.seconds for outcome in simulated], n=10)
        measured = [run(arguments.folder, SHARDS, at_once, inject_faults) for _ in range(arguments.runs)]
        print(  # noqa: T201
            f"| {name} | {deciles[4]:.0f}, {deciles[0]:.0f} to {deciles[8]:.0f} "
            f"| {', '.join(f'{clock.ended - clock.submitted:.0f}' for _, clock in measured)} "
            f"| {statistics.median(outcome.job_seconds for outcome in simulated):.0f} "
            f"| {', '.join(f'{clock.occupied:.0f}' for _, clock in measured)} "
            f"| {statistics.mean(outcome.restarts for outcome in simulated):.1f} "
            f"| {', '.join(str(clock.restarts) for _, clock in measured)} |",
            flush=True,
        )


class Clock:
    """Submission and end of a run, total seconds its jobs held nodes, and number of requeues."""

    submitted = ended = occupied = 0.0
    restarts = 0


def run(
    folder: Path, shards: int, at_once: int, inject_faults: Callable[[threading.Event], None]
) -> tuple[StageCost, Clock]:
    """Run one fan-out of sleeping shards; return its cost and times."""
    clock, stop = Clock(), threading.Event()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        workspace = Path(scratch).resolve()
        (workspace / "sleeping_program.py").write_text(PROGRAM)
        os.environ["PYTHONPATH"] = f"{workspace}{os.pathsep}{Path(__file__).resolve().parent.parent}"
        stage = Stage(
            *("sleep", 1, "sleeping_program:open_sleep", {"seconds": SECONDS}, {}, {}, workspace / "stage"),
            kind="influence",
        )
        rows = Shards(Rows.of([{"n": number} for number in range(ROWS * shards)]), ROWS)
        resources = Resources(
            parallel_jobs=at_once, cpus_per_process=1, shards_per_job=min(SHARDS_PER_JOB, shards // NODES)
        )
        before = len(completed())
        faults = threading.Thread(target=inject_faults, args=(stop,))
        clock.submitted = time.time()
        faults.start()
        try:
            fan_out(stage, rows, resources, Cluster(profile="slurm", poll_seconds=0.5))
        finally:
            stop.set()
            faults.join()
        while running():
            time.sleep(0.1)
        clock.occupied = sum(completed()[before:])
        cost = cost_of(stage.folder)
        assert cost is not None
        clock.ended = cost.ended
        clock.restarts = use_of(stage.folder).interruptions
    return cost, clock


def planned(cost: StageCost, at_once: int) -> Work:
    """Return the stage as input of the simulation."""
    return Work(
        name="sleep",
        jobs=[[ROWS * cost.seconds_per_row] * SHARDS_PER_JOB] * (SHARDS // SHARDS_PER_JOB),
        spread=cost.spread / ROWS**0.5,
        opening=cost.opening,
        saved_every=math.inf,
        nodes=1,
        gpus=0,
        cpus=1,
        at_once=at_once,
        limit=4 * 3600,
        around=1.0,
    )


def running() -> list[str]:
    """Return the ids of running jobs."""
    command = ["squeue", "--me", "--noheader", "--states=RUNNING", "--format=%i"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.split()


def completed() -> list[float]:
    """Return the seconds that each job held its node, from the lab's record; each start of a requeued job counts."""
    record = Path(os.environ["LAB"], "log", "completed")
    if not record.exists():
        return []
    spans = re.findall(r" StartTime=(\d\S+) EndTime=(\d\S+)", record.read_text())
    return [(datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() for start, end in spans]


def preempt(stop: threading.Event) -> None:
    """Requeue running jobs at random."""
    checked = time.monotonic()
    while not stop.wait(0.5):
        elapsed, checked = time.monotonic() - checked, time.monotonic()
        for job in running():
            if random.random() < elapsed / PREEMPTION:
                subprocess.run(["scontrol", "requeue", job], stderr=subprocess.DEVNULL)


def crash_nodes(stop: threading.Event) -> None:
    """Crash nodes at random and restart each after `REPAIR` seconds."""
    due = {node: time.time() + random.expovariate(1 / FAILURE) for node in range(1, NODES + 1)}
    down: set[int] = set()
    while not stop.wait(0.2):
        for node in [node for node, at in due.items() if at <= time.time()]:
            lab("start-node" if node in down else "kill-node", str(node))
            due[node] = time.time() + (random.expovariate(1 / FAILURE) if node in down else REPAIR)
            down ^= {node}
    for node in down:
        lab("start-node", str(node))


def lab(*arguments: str) -> None:
    """Run lab.sh."""
    script = Path(__file__).resolve().parent.parent / "docker" / "slurm" / "lab.sh"
    subprocess.run([script, *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

"""The simulation behind `montessori forecast` beside a real Slurm: predicted and measured time of the same stages.

    LAB=/tmp/lab NODES=4 CPUS=1 docker/slurm/lab.sh start && eval "$(LAB=/tmp/lab docker/slurm/lab.sh env)"
    LAB=/tmp/lab python benchmarks/simulation.py --folder /tmp [--runs 4]
    LAB=/tmp/lab docker/slurm/lab.sh stop

Shards sleep a time that differs from shard to shard, and are committed whole. A *pilot* of 8 shards, run first and in peace,
says what a row costs; from that, 96 shards are predicted and then run --runs times, under each of:

* peace, with four jobs at a time and with two;
* preemption: every running job is put back into the queue (scontrol requeue) at random, once in 20 s on average;
* failing nodes: each is crashed (lab.sh kill-node) once in 60 s on average and started again after 20 s.

Each line gives the median and 80 % range of the simulations, then the measured runs. The lab is told of a crashed node at
once, and lets a job that was put back start after --requeue-seconds.
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

from cluster.costs import StageCost, cost_of
from cluster.fanout import fan_out
from cluster.shards import Shards
from cluster.simulation import ClusterSpec, FailureModel, Work, simulate
from cluster.stage import Stage
from cluster.usage import use_of
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
ROWS, SECONDS = 8, 0.3  # rows of a shard, and what a row sleeps on average
SHARDS, SHARDS_PER_JOB = 96, 6
PREEMPTION, FAILURE, REPAIR = 20.0, 60.0, 20.0  # seconds
SIMULATIONS = 400


def main() -> None:
    """Measure the pilot, then predict and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where scratch folders are made; shared, for Slurm")
    parser.add_argument("--runs", type=int, default=4, help="measured runs of each line")
    parser.add_argument("--requeue-seconds", type=float, default=6.0, help="of the lab; see cred_expire in slurm.conf")
    arguments = parser.parse_args()

    cost, _ = run(arguments.folder, 8, NODES, lambda stop: None)
    print(  # noqa: T201
        f"pilot: {cost.seconds_per_row:.3f} s a row, spread {cost.spread:.2f}, opening {cost.opening:.1f} s\n\n"
        "| | simulated, s: median, 10 % to 90 % | measured, s | job seconds, simulated | measured | requeued, simulated "
        "| measured |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    back = arguments.requeue_seconds
    peace = FailureModel(requeue_seconds=back)
    preempted = FailureModel(preemption_hours=PREEMPTION / 3600, requeue_seconds=back)
    failing = FailureModel(FAILURE / 3600, notice_seconds=0.0, repair_minutes=REPAIR / 60, requeue_seconds=back)
    for name, at_once, disturbances, disturb in (
        ("no faults, 4 jobs at a time", 4, peace, lambda stop: None),
        ("no faults, 2 jobs at a time", 2, peace, lambda stop: None),
        ("preemption", 4, preempted, preempt),
        ("failing nodes", 4, failing, crash_nodes),
    ):
        work = planned(cost, at_once)
        spent = [simulate([work], ClusterSpec(NODES, 0, 1), disturbances, seed)[0] for seed in range(SIMULATIONS)]
        deciles = statistics.quantiles([one.seconds for one in spent], n=10)
        measured = [run(arguments.folder, SHARDS, at_once, disturb) for _ in range(arguments.runs)]
        print(  # noqa: T201
            f"| {name} | {deciles[4]:.0f}, {deciles[0]:.0f} to {deciles[8]:.0f} "
            f"| {', '.join(f'{one.ended - one.submitted:.0f}' for _, one in measured)} "
            f"| {statistics.median(one.job_seconds for one in spent):.0f} "
            f"| {', '.join(f'{one.occupied:.0f}' for _, one in measured)} "
            f"| {statistics.mean(one.restarts for one in spent):.1f} "
            f"| {', '.join(str(one.restarts) for _, one in measured)} |",
            flush=True,
        )


class Clock:
    """When a run was submitted and ended, how long its jobs held nodes together, and how many of them Slurm put back."""

    submitted = ended = occupied = 0.0
    restarts = 0


def run(folder: Path, shards: int, at_once: int, disturb: Callable[[threading.Event], None]) -> tuple[StageCost, Clock]:
    """One fan-out of sleeping shards; its cost and its time."""
    clock, stop = Clock(), threading.Event()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        home = Path(scratch).resolve()
        (home / "sleeping_program.py").write_text(PROGRAM)
        os.environ["PYTHONPATH"] = f"{home}{os.pathsep}{Path(__file__).resolve().parent.parent}"
        stage = Stage(
            *("sleep", 1, "sleeping_program:open_sleep", {"seconds": SECONDS}, {}, {}, home / "stage"),
            kind="influence",
        )
        rows = Shards(Rows.of([{"n": number} for number in range(ROWS * shards)]), ROWS)
        resources = Resources(
            parallel_jobs=at_once, cpus_per_process=1, shards_per_job=min(SHARDS_PER_JOB, shards // NODES)
        )
        before = len(completed())
        beside = threading.Thread(target=disturb, args=(stop,))
        clock.submitted = time.time()
        beside.start()
        try:
            fan_out(stage, rows, resources, Cluster(profile="slurm", poll_seconds=0.5))
        finally:
            stop.set()
            beside.join()
        while running():
            time.sleep(0.1)
        clock.occupied = sum(completed()[before:])
        cost = cost_of(stage.folder)
        assert cost is not None
        clock.ended = cost.ended
        clock.restarts = use_of(stage.folder).preemptions
    return cost, clock


def planned(cost: StageCost, at_once: int) -> Work:
    """The stage as the simulation has it."""
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
    """Jobs that hold a node now."""
    command = ["squeue", "--me", "--noheader", "--states=RUNNING", "--format=%i"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.split()


def completed() -> list[float]:
    """How long each job held its node, in seconds, every start of one that was put back by itself: from the lab's record."""
    record = Path(os.environ["LAB"], "log", "completed")
    if not record.exists():
        return []
    spans = re.findall(r" StartTime=(\d\S+) EndTime=(\d\S+)", record.read_text())
    return [(datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() for start, end in spans]


def preempt(stop: threading.Event) -> None:
    """Put running jobs back into the queue at random."""
    looked = time.monotonic()
    while not stop.wait(0.5):
        since, looked = time.monotonic() - looked, time.monotonic()
        for job in running():
            if random.random() < since / PREEMPTION:
                subprocess.run(["scontrol", "requeue", job], stderr=subprocess.DEVNULL)


def crash_nodes(stop: threading.Event) -> None:
    """Crash nodes at random, and start each again after a while."""
    due = {node: time.time() + random.expovariate(1 / FAILURE) for node in range(1, NODES + 1)}
    down: set[int] = set()
    while not stop.wait(0.2):
        for node in [node for node, when in due.items() if when <= time.time()]:
            lab("start-node" if node in down else "kill-node", str(node))
            due[node] = time.time() + (random.expovariate(1 / FAILURE) if node in down else REPAIR)
            down ^= {node}
    for node in down:
        lab("start-node", str(node))


def lab(*arguments: str) -> None:
    """Speak to the lab."""
    script = Path(__file__).resolve().parent.parent / "docker" / "slurm" / "lab.sh"
    subprocess.run([script, *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

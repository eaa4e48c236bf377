"""The command forecast: how long will an experiment take on a cluster?"""

import math
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import ClusterFile, on_cluster, warn
from flows.cli.tables import print_forecasts
from montessori_core import layout
from montessori_core.config import read_experiment
from tasks.run import reopen_run


def forecast(
    pilot: Annotated[
        Path, typer.Option(metavar="RUN_DIR", help="A finished run: what its stages cost is measured there.")
    ],
    config: Annotated[
        Path | None,
        typer.Argument(help="Configuration of the experiment; by default that of the pilot.", metavar="[CONFIG]"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one field; may be repeated.")
    ] = None,
    cluster: ClusterFile = None,
    nodes: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Nodes of the cluster, by default one; may be repeated, to compare."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node.")] = 8,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="Cores of each node.")] = 64,
    node_failure_hours: Annotated[
        float | None, typer.Option(min=0.01, help="Mean hours between failures of one node; none: never.")
    ] = None,
    notice_seconds: Annotated[float, typer.Option(min=0, help="Until Slurm notices one (SlurmdTimeout).")] = 300.0,
    repair_minutes: Annotated[float, typer.Option(min=0, help="Until the node is back.")] = 60.0,
    preemption_hours: Annotated[
        float | None, typer.Option(min=0.01, help="Mean hours that a job runs until it is preempted; none: never.")
    ] = None,
    requeue_seconds: Annotated[
        float, typer.Option(min=0, help="Until a job put back may start again (cred_expire).")
    ] = 120.0,
    queue_minutes: Annotated[float, typer.Option(min=0, help="Mean wait of a submission in the queue.")] = 0.0,
    simulations: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
) -> None:
    """Say how long an experiment will take on a cluster: wall time and GPU-hours.

    Simulates it on nodes that fail, preempt and queue, from the measured costs of a pilot.
    A pilot is the same experiment with small sizes, run on a machine of the cluster.

      montessori forecast CONFIG --pilot runs/pilot --cluster cluster.yaml \\
        --nodes 4 --nodes 16 --node-failure-hours 500 --queue-minutes 10
    """
    from cluster.simulation import ClusterSpec, FailureModel
    from flows.forecast import costs_may_differ
    from flows.forecast import forecast as simulate

    run = reopen_run(pilot)
    file = config or pilot / layout.CONFIG
    experiment = on_cluster(read_experiment(file, tuple(set_ or [])), cluster, file)
    differing = costs_may_differ(run.experiment, experiment)
    warn([f"not as in the pilot, whose stages and costs are taken all the same: {line}" for line in differing])
    machines = [ClusterSpec(count, gpus_per_node, cpus_per_node) for count in nodes or [1]]
    disturbances = FailureModel(
        node_failure_hours or math.inf,
        notice_seconds,
        repair_minutes,
        preemption_hours or math.inf,
        requeue_seconds,
        queue_minutes,
    )
    print_forecasts(simulate(run, experiment, machines, disturbances, simulations))

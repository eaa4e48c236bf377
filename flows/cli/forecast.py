"""The command forecast: predict the time of an experiment on a cluster."""

import math
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import ClusterFile, Overrides, on_cluster, warn
from flows.cli.tables import print_forecasts
from montessori_core import layout
from montessori_core.config import read_experiment
from tasks.run import reopen_run


def forecast(
    pilot: Annotated[
        Path, typer.Option(metavar="RUN_DIR", help="A finished run whose stages provide the measured costs.")
    ],
    config: Annotated[
        Path | None, typer.Argument(help="Configuration of the experiment; by default the pilot's.", metavar="[CONFIG]")
    ] = None,
    set_: Overrides = None,
    cluster: ClusterFile = None,
    nodes: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of nodes, by default 1; may be repeated to compare.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node.")] = 8,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="Cores of each node.")] = 64,
    node_failure_hours: Annotated[
        float | None, typer.Option(min=0.01, help="Mean hours between failures of a node; by default never.")
    ] = None,
    notice_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds until Slurm notices that a node has failed (SlurmdTimeout).")
    ] = 300.0,
    repair_minutes: Annotated[float, typer.Option(min=0, help="Minutes until a failed node is up again.")] = 60.0,
    preemption_hours: Annotated[
        float | None, typer.Option(min=0.01, help="Mean hours until a running job is preempted; by default never.")
    ] = None,
    requeue_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds until a requeued job may start again (cred_expire).")
    ] = 120.0,
    queue_minutes: Annotated[
        float, typer.Option(min=0, help="Mean minutes that a submission waits in the queue.")
    ] = 0.0,
    simulations: Annotated[int, typer.Option(min=1, help="Number of simulations.")] = 100,
) -> None:
    """Predict how long an experiment takes on a cluster: wall time and GPU-hours.

    Simulates node failures, preemption and queueing with the costs measured in a pilot.
    A pilot is the same experiment with small sizes, run on a machine of the cluster.

      montessori forecast CONFIG --pilot runs/pilot --cluster cluster.yaml \\
        --nodes 4 --nodes 16 --node-failure-hours 500 --queue-minutes 10
    """
    from cluster.simulation import ClusterSpec, FailureModel
    from flows.forecast import costs_may_differ
    from flows.forecast import forecast as simulate

    run = reopen_run(pilot)
    file = config or pilot / layout.CONFIG
    experiment = on_cluster(read_experiment(file, tuple(set_ or [])), cluster, file, set_ or ())
    differences = costs_may_differ(run.experiment, experiment)
    warn([f"differs from the pilot, whose stages and costs are used nevertheless: {line}" for line in differences])
    machines = [ClusterSpec(count, gpus_per_node, cpus_per_node) for count in nodes or [1]]
    failures = FailureModel(
        node_failure_hours or math.inf,
        notice_seconds,
        repair_minutes,
        preemption_hours or math.inf,
        requeue_seconds,
        queue_minutes,
    )
    print_forecasts(simulate(run, experiment, machines, failures, simulations))

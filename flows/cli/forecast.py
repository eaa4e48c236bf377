"""The command forecast: how long will an experiment take on a cluster?"""

from pathlib import Path
from typing import Any

import typer

from cluster.simulation import Disturbances, Machines
from flows.cli.console import console
from flows.cli.options import on_cluster, warn
from montessori_core.config import read_experiment


def _simulation(*names: str, help: str, **options: Any) -> Any:
    """An option of `plan` that stands with --simulate."""
    return typer.Option(*names, help=help, rich_help_panel="With --simulate", **options)


def _simulate(
    config: Path | None,
    pilot: Path,
    overrides: list[str],
    cluster: Path | None,
    machines: list[Machines],
    disturbances: Disturbances,
    simulations: int,
) -> None:
    from flows.cli.tables import print_forecast
    from flows.forecast import costs_may_differ, forecast
    from tasks.run import reopen_run

    run = reopen_run(pilot)
    file = config or pilot / "config.yaml"
    experiment = on_cluster(read_experiment(file, tuple(overrides)), cluster, file)
    differing = costs_may_differ(run.experiment, experiment)
    warn([f"not as in the pilot, whose stages and costs are taken all the same: {line}" for line in differing])
    print_forecast(forecast(run, experiment, machines, disturbances, simulations), console)

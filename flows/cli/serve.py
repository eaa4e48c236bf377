"""The commands for Prefect: up, deploy."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from flows.prefect_api import DRIVER_VARIABLES

DeploymentsFile = Annotated[
    Path | None, typer.Option(help="Prefect's file of deployments; by default prefect.yaml here, or the shipped one.")
]


def up(
    file: DeploymentsFile = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    port: Annotated[
        int, typer.Option(help="Port of the Prefect server, if the command starts one; reports are served on the next.")
    ] = 4200,
) -> None:
    """Serve runs in Prefect's UI until Ctrl-C: start, schedule, watch, retry and cancel them in the browser.

    Uses the server of PREFECT_API_URL, or one on this machine, or starts one that only this machine can reach.
    Jobs run where a run's cluster section says.
    """
    _set_prefect_defaults()
    from flows.deployments import up as serve_deployments

    serve_deployments(file, run_root, port, console)


def deploy(
    pool: Annotated[str, typer.Option(help="Work pool whose workers run the drivers.")], file: DeploymentsFile = None
) -> None:
    """Register the deployments of montessori up on a running Prefect server, for the workers of a work pool."""
    _set_prefect_defaults()
    from flows.deployments import deploy as register_deployments

    register_deployments(file, pool, console)


def _set_prefect_defaults() -> None:
    """Set variables for flow runs, before Prefect is imported: its logs, how patient its client is, and heartbeats."""
    for name, value in DRIVER_VARIABLES.items():
        os.environ.setdefault(name, value)
    del os.environ["PREFECT_INTERNAL_LOGGING_LEVEL"]
    if os.environ["PREFECT_LOGGING_LEVEL"] == "CRITICAL":  # the default of other commands
        os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"

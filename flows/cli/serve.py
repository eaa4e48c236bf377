"""Commands for Prefect: up, deploy."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console

DeploymentsFile = Annotated[
    Path | None,
    typer.Option(help="Prefect's file of deployments; by default prefect.yaml here, or the shipped one."),
]


def up(
    file: DeploymentsFile = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port of the Prefect server, if one has to be started.")] = 4200,
) -> None:
    """Start, schedule, watch, retry and cancel runs in Prefect's UI, from this machine, until Ctrl-C.

    Uses the server that PREFECT_API_URL names, or one that answers here, or starts one that only this machine reaches.
    Jobs go where a run's cluster section says.
    """
    _let_prefect_log()
    from flows.deployments import up as serve_deployments

    serve_deployments(file, run_root, port, console)


def deploy(
    pool: Annotated[str, typer.Option(help="Work pool whose workers drive the runs.")],
    file: DeploymentsFile = None,
) -> None:
    """Register the same deployments on a Prefect server you have, for the workers of a work pool."""
    _let_prefect_log()
    from flows.deployments import deploy as register_deployments

    register_deployments(file, pool, console)


def _let_prefect_log() -> None:
    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL"):
        os.environ.pop(name)
    os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"

"""The command doctor."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import console
from flows.cli.interrupt import cancelled_by_signals
from montessori_core.config import read_cluster


def doctor(
    cluster: Annotated[Path, typer.Option(help="Cluster file, or a configuration with a cluster section.")],
    run_root: Annotated[Path, typer.Option(help="Folder of the runs, used for scratch files.")] = Path("runs"),
    patience: Annotated[float, typer.Option(help="Seconds that a test job may take, queueing included.")] = 300.0,
) -> None:
    """Check a cluster before a run depends on it: scheduler, partition, GPUs, shared files, worker environment, network.

    Submits a few small jobs. Exits with 1 if a check fails; each failure comes with a remedy.
    """
    from cluster.doctor import check_cluster

    passed = True
    with cancelled_by_signals():
        for finding in check_cluster(read_cluster(cluster), run_root, patience):
            mark, colour = {True: ("ok", "green"), False: ("BAD", "red"), None: ("note", "yellow")}[finding.good]
            console.print(f"{mark:>4}", style=colour, end="  ")
            console.print(f"{finding.check}: {finding.seen}", soft_wrap=True)
            if finding.good is False:
                passed = False
                console.print(f"      remedy: {finding.remedy}", soft_wrap=True)
    if not passed:
        raise typer.Exit(1)

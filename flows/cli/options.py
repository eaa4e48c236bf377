"""Options and checks that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.status import stages_of
from flows.cli.console import console
from montessori_core.config import Experiment, parse_experiment, read_cluster
from montessori_core.errors import UserError
from tasks.run import Run

RunFolder = Annotated[Path, typer.Argument(help="Folder of the run.", metavar="RUN_DIR")]
ClusterFile = Annotated[
    Path | None, typer.Option(help="Cluster file (YAML) that replaces the configuration's cluster section.")
]
StageName = Annotated[
    str | None, typer.Option("--stage", help="Stage, as named by status; by default the last that started.")
]


def on_cluster(experiment: Experiment, cluster: Path | None, config: Path) -> Experiment:
    """Replace the cluster section of an experiment by a cluster file."""
    if cluster is None:
        return experiment
    content = experiment.model_dump(mode="json") | {"cluster": read_cluster(cluster).model_dump(mode="json")}
    return parse_experiment(content, f"{config} with {cluster}")


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        console.print("warning:", style="yellow", end=" ")
        console.print(warning, soft_wrap=True)


def stage_folder(run: Run, name: str | None) -> Path:
    """Return the folder of a run's stage; without a name, of the last that started.

    Raises:
        UserError: no such stage.
    """
    folders = stages_of(run.folder)
    if not folders:
        raise UserError(f"{run.folder}: no stage has started")
    if name is None:
        return folders[-1]
    names = [str(folder.relative_to(run.folder)) for folder in folders]
    if name not in names:
        raise UserError(f"{run.folder}: no stage {name!r}; its stages are {', '.join(names)}")
    return run.folder / name

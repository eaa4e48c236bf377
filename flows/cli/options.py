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
    Path | None, typer.Option(help="Cluster file, YAML: where jobs run, in place of the configuration's.")
]
StageName = Annotated[
    str | None, typer.Option("--stage", help="The stage, as status names it; by default the last that began.")
]


def on_cluster(experiment: Experiment, cluster: Path | None, config: Path) -> Experiment:
    """The experiment, with the content of a cluster file in place of its own section."""
    if cluster is None:
        return experiment
    content = experiment.model_dump(mode="json") | {"cluster": read_cluster(cluster).model_dump(mode="json")}
    return parse_experiment(content, f"{config} with {cluster}")


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        console.print("warning:", style="yellow", end=" ")
        console.print(warning, soft_wrap=True)


def stage_folder(run: Run, name: str | None) -> Path:
    """The folder of a run's stage; without a name, of the last that began.

    Raises:
        UserError: there is none of that name.
    """
    folders = stages_of(run.folder)
    if not folders:
        raise UserError(f"{run.folder}: no stage has begun")
    if name is None:
        return folders[-1]
    known = [str(folder.relative_to(run.folder)) for folder in folders]
    if name not in known:
        raise UserError(f"{run.folder}: no stage {name!r}; there are {', '.join(known)}")
    return run.folder / name

"""The command compare."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.driver import SubmitDriver, check_driver_job, command_to_resume, submit_command
from flows.cli.interrupt import interruptible
from flows.cli.options import ClusterFile, enter_started, on_cluster, warn
from flows.cli.tables import print_comparison
from tasks.resume import STUDY, command_to_compare, seeds_of


def compare(
    study: Annotated[Path, typer.Argument(help="Study: a YAML file or a preset, e.g. quickstart.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one field, e.g. experiment.training.examples=100. Relative paths are read from the current "
            "directory.",
        ),
    ] = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds runs and studies.")] = Path("runs"),
    cluster: ClusterFile = None,
    as_job: SubmitDriver = False,
) -> None:
    """Compare methods of making training data on equal terms. To resume after an interruption, run the same command again."""
    from flows.disk import warn_of_study
    from flows.study import compare_opened, open_study
    from montessori_core.config import read_study

    seeds = seeds_of(study.resolve().parent) if study.name == STUDY else []
    if seeds:  # a study that has begun
        study, run_root = study.resolve(), run_root.resolve()
        set_, cluster = enter_started(seeds[0], set_ or [], cluster)
    settings = read_study(study, tuple(set_ or []))
    experiment = on_cluster(settings.experiment, cluster, study, set_ or ())
    settings = settings.model_copy(update={"experiment": experiment})
    if as_job:
        check_driver_job(settings.experiment)
    folder = run_root / settings.name
    if seeds and run_root == study.parent.parent and settings.name == read_study(study).name:
        folder = study.parent  # it may have been copied or renamed
    seeded, warnings = open_study(settings, folder)
    warn([*warnings, *warn_of_study(settings, [seeded[0].run, *seeded[0].others], folder)])
    if as_job:
        folder = folder.resolve()
        submit_command(folder, command_to_compare(folder), settings.experiment.cluster.slurm)
        return
    command = command_to_resume(folder)
    interruptible(lambda: compare_opened(settings, folder, seeded), folder, settings.experiment.cluster, command)
    print_comparison(folder)

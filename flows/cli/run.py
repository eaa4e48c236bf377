"""The commands that run a driver: run, resume, retry."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.lock import no_driver
from cluster.status import invalidate_shard, stages_of
from flows.cli.console import console
from flows.cli.driver import SubmitDriver, check_driver_job, command_to_resume, submit_command
from flows.cli.interrupt import interruptible
from flows.cli.options import (
    ClusterFile,
    Overrides,
    RunFolder,
    StageName,
    enter_started,
    on_cluster,
    stage_folder,
    warn,
)
from flows.cli.tables import print_estimate, print_summary
from montessori_core import layout
from montessori_core.config import read_experiment, read_yaml
from montessori_core.config.yaml import apply_overrides
from montessori_core.errors import UserError
from tasks.resume import STUDY, enter_directory, is_opened, refuse_command_folder, resume_command, study_of
from tasks.run import Run, open_run, reopen_run


def run(
    config: Annotated[Path, typer.Argument(help="Configuration: a YAML file or a preset, e.g. quickstart.")],
    set_: Overrides = None,
    run_root: Annotated[
        Path | None,
        typer.Option(help="Folder that holds the runs.", show_default="runs; of RUN_DIR/config.yaml, that of RUN_DIR"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; by default the configuration's.")] = None,
    cluster: ClusterFile = None,
    as_job: SubmitDriver = False,
) -> None:
    """Run an experiment. An existing run of the same name is resumed; finished work is not repeated.

    RUN_DIR/config.yaml continues the run in RUN_DIR with changed settings (--set), unless --name or another --run-root is
    given. Relative paths in --set are read from the current directory.
    """
    # Quote the name: it may look like a date or a number.
    overrides = [*(set_ or []), *([f"name={json.dumps(name)}"] if name else [])]
    begun = continued_run(config, run_root, name, tuple(overrides))
    if begun is not None:
        config = begun / layout.CONFIG
        overrides, cluster = enter_started(begun, overrides, cluster)
    experiment = on_cluster(read_experiment(config, tuple(overrides)), cluster, config, overrides)
    if as_job:
        check_driver_job(experiment)
    folder = begun or (run_root or Path("runs")) / experiment.name
    refuse_other_work(folder.resolve())
    opened, warnings = open_run(experiment, folder)
    warn(warnings)
    if not stages_of(opened.folder):
        from flows.disk import warn_of_run
        from flows.estimate import estimate_run

        print_estimate(opened.experiment, estimate_run(opened))
        warn(warn_of_run(opened))
    drive_run(opened, as_job)


def continued_run(config: Path, run_root: Path | None, name: str | None, overrides: tuple[str, ...]) -> Path | None:
    """Return the folder of the run that holds a configuration if these options continue it; None: they name another run."""
    folder = config.parent.resolve()  # it may have been copied or renamed
    if config.name != layout.CONFIG or name is not None or not is_opened(folder):
        return None
    same_root = run_root is None or run_root.resolve() == folder.parent
    content = read_yaml(config)
    recorded = content.get("name")
    apply_overrides(content, overrides)
    return folder if same_root and content.get("name") == recorded else None


def resume(
    run_dir: RunFolder,
    as_job: SubmitDriver = False,
    approve: Annotated[
        bool, typer.Option("--approve-pairs", help="Approve the preference pairs at which the run has stopped.")
    ] = False,
) -> None:
    """Resume a run after an interruption, a crash or a fixed error.

    Work of other commands is resumed by the command that started it; resume names it.
    """
    reopened = _reopen(run_dir)
    if as_job:
        check_driver_job(reopened.experiment)
    opened, warnings = open_run(reopened.experiment, reopened.folder)
    warn(warnings)
    if approve:
        from tasks.approval import approve_pairs

        with no_driver(opened.folder):
            console.print(f"approved: {approve_pairs(opened)}", soft_wrap=True)
    drive_run(opened, as_job)


def retry(
    run_dir: RunFolder,
    failed: Annotated[
        bool, typer.Option("--failed", help="Submit all failed and missing shards again; the default.")
    ] = False,
    shard: Annotated[
        int | None, typer.Option(help="Compute this shard of --stage again, even if it is done; counted from 0.")
    ] = None,
    stage: StageName = None,
) -> None:
    """Submit shards again, either one or all that are failed or missing, then resume the run."""
    if failed and shard is not None:
        raise UserError("--failed and --shard exclude each other: name one shard, or retry all that are missing")
    if stage is not None and shard is None:
        raise UserError("--stage needs --shard: without it, retry submits what is missing in all stages")
    reopened = _reopen(run_dir)
    opened, warnings = open_run(reopened.experiment, reopened.folder)
    warn(warnings)
    if shard is not None:
        with no_driver(opened.folder):
            invalidate_shard(stage_folder(opened, stage), shard)
    drive_run(opened)


def drive_run(opened: Run, as_job: bool = False) -> None:
    """Run or resume an experiment, in this process or by a Slurm job; print its results, or how to find the job."""
    name, folder = opened.experiment.name, opened.folder
    if as_job and opened.finished:
        console.print(f"{name} is finished; to check its results: montessori resume {folder}")
        return
    if as_job:
        submit_command(folder, ["resume", str(folder)], opened.experiment.cluster.slurm)
        return
    from flows.experiment import experiment

    if opened.finished:
        console.print(f"{name} is finished; checking its results.")
    interruptible(lambda: experiment(opened), folder, opened.experiment.cluster, command_to_resume(folder))
    print_summary(opened)


def _reopen(folder: Path) -> Run:
    """Reopen a run, and go to the directory from which it was started.

    Raises:
        UserError: the folder is not a run, or part of a study.
    """
    folder = folder.resolve()
    refuse_other_work(folder)
    enter_directory(folder)
    return reopen_run(folder)


def refuse_other_work(folder: Path) -> None:
    """Raise a UserError if a folder is a study, a run of one, or holds another command's work."""
    refuse_command_folder(folder)
    if study_of(folder) is not None:
        role = "is" if (folder / STUDY).exists() else "belongs to"
        raise UserError(f"{folder} {role} a study; resume with: {resume_command(folder)}")

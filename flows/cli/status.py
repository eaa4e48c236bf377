"""The command status."""

from rich.table import Table

from cluster.backends.base import SchedulerUnavailable
from cluster.backends.held import states_of_held_jobs
from cluster.driver_job import log_of_driver
from cluster.lock import driver_of
from cluster.status import StageStatus, read_stage_status, stages_of
from flows.cli.console import console
from flows.cli.options import DrivenFolder
from montessori_core.formatting import duration
from tasks.resume import resume_command
from tasks.run import Run
from tasks.studies import is_finished, reopen, unused_stages


def status(run_dir: DrivenFolder) -> None:
    """Show the stages of a run or a study: shards done, running and failed; and its driver.

    Also of an evaluation, of a validation, and of the folder .parts of a training or a measurement of influence.
    """
    run = reopen(run_dir)
    stages = [read_stage_status(folder, run.experiment.cluster) for folder in stages_of(run.folder)]
    _print_stages(run, stages)
    _print_driver(run, bool(stages))


def _print_stages(run: Run, stages: list[StageStatus]) -> None:
    """Print a line per stage, and the error of each failed shard; finished stages of earlier settings only by name."""
    unused = unused_stages(run)
    left_out = [stage for stage in stages if stage.folder in unused and stage.state == "done"]
    rows = []
    for stage in stages:
        if stage in left_out:
            continue
        running = stage.state == "running"
        rows.append(
            {
                "stage": str(stage.folder.relative_to(run.folder)),
                "state": stage.state,
                "shards done": f"{stage.done}/{stage.shards}",
                "running": str(stage.running or ""),
                "queued": str(stage.queued or ""),
                "failed": str(stage.failed or ""),
                "rows computed": f"{int(stage.rows_done)}/{stage.rows}",
                "rows/min": f"{60 * stage.rows_per_second:.3g}" if running and stage.rows_per_second else "",
                "job seconds": f"{stage.job_seconds:.0f}",
                "left": _time_left(stage) if running else "",
            }
        )
    # Drop empty columns: terminals are narrow, and other commands take the full names of stages.
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    table = Table(title=f"{run.experiment.name} ({run.folder})", title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=name in ("stage", "state"))
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    if rows:
        console.print(table)
    else:
        console.print(f"{run.experiment.name} ({run.folder}): no stage has started", soft_wrap=True)
    if left_out:
        names = ", ".join(str(stage.folder.relative_to(run.folder)) for stage in left_out)
        seconds = sum(stage.job_seconds for stage in left_out)
        console.print(f"of earlier settings, {seconds:.0f} job seconds: {names}", soft_wrap=True)
    for stage in stages:
        name = str(stage.folder.relative_to(run.folder))
        for failure in stage.failures:
            console.print(f"failed: {name}, shard {failure.shard}: {failure.kind}: {failure.error}", soft_wrap=True)
            for line in failure.last_lines:
                console.print(f"  | {line}", soft_wrap=True)
            console.print(f"  log: {failure.log}", soft_wrap=True)


def _print_driver(run: Run, started: bool) -> None:
    """Print who drives the run, or how to resume it."""
    log = log_of_driver(run.folder)
    try:
        driver = driver_of(run.folder)
    except (SchedulerUnavailable, OSError) as error:
        console.print(f"driver: not known: {error}", soft_wrap=True)
        return
    if driver is not None:
        console.print(f"driver: {driver}", soft_wrap=True)
    elif (started or log.exists()) and not is_finished(run):
        option = " --submit-driver" if log.exists() else ""
        console.print(f"No driver is running. Resume with: {resume_command(run.folder, option)}", soft_wrap=True)
    if log.exists():
        console.print(f"log of the driver: {log}", soft_wrap=True)
    if held := states_of_held_jobs(run.folder):
        console.print(f"held jobs: {', '.join(f'{count} {state.lower()}' for state, count in held.items())}")


def _time_left(stage: StageStatus) -> str:
    """Format the remaining time of a running stage; "starting" before the first measurement."""
    if stage.seconds_left is not None:
        return f"about {duration(stage.seconds_left)}"
    return "starting" if stage.running else ""

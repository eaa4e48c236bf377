"""`montessori plan`: what measuring influence on a student takes in memory, and what goes where."""

from typing import Any

from rich.console import Console
from rich.table import Table

from montessori_core.config import Influence, Lora
from montessori_core.errors import UserError
from montessori_core.models import local_path, why_not_loaded, with_lora


def show_plan(
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

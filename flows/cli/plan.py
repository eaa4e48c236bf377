"""The command plan: check whether measuring influence on a student, or updating a teacher, fits a GPU."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.console import console
from flows.cli.influence import ReferenceBatchTokens, ScreenName, parse_options
from flows.cli.tables import print_memory_plan, print_update_plans
from montessori_core.config import Influence, Lora, TeacherUpdate, Vllm, parse
from montessori_core.errors import UserError
from montessori_core.models.adapters import adapted_model, adapter_rank, is_adapter
from montessori_core.models.fetch import local_path
from montessori_core.models.load import describe_load_error, with_lora
from montessori_core.models.shape import GB, USABLE, Shape
from montessori_core.synthesis.vllm_parallelism import DEFAULT_SHARE, ModelSize, choose_parallelism

_OF_A_MEASUREMENT = ("estimator", "screen", "dtype", "state_dtype", "reference_batch_tokens")


def plan(
    context: typer.Context,
    student: Annotated[
        str | None, typer.Option(help="Folder, also of an adapter, or Hugging Face id; only its configuration is read.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="The same, to plan a teacher update instead.")] = None,
    gpu_memory: Annotated[float, typer.Option(help="Memory of a GPU, GB.")] = 80.0,
    estimator: Annotated[str, typer.Option(help="exact, first_order, linear or screened.")] = "screened",
    screen: ScreenName = "first_order",
    dtype: Annotated[
        str, typer.Option(help="Precision: float32, mixed or bfloat16; see montessori influence --help.")
    ] = "float32",
    state_dtype: Annotated[
        str,
        typer.Option(
            help="What moments and reference gradient are kept in: float32 or bfloat16; see montessori influence --help."
        ),
    ] = "float32",
    max_length: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Tokens of the longest example (1,024 if not given), or for a teacher of the longer text of a pair (2,048).",
            show_default=False,
        ),
    ] = None,
    reference_batch_tokens: ReferenceBatchTokens = 2048,
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Plan for a LoRA adapter of this rank; by default all weights are trained."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="nf4: the weights of a teacher with an adapter are kept in 4 bits.")
    ] = None,
) -> None:
    """Check whether measuring influence on a student fits a GPU, or the update of a teacher.

    For a student, shows what is placed on the device and what in host memory; jobs use the same plan.
    For a teacher, shows the memory of each GPU with teacher_update.micro_batch_size: 1, and how vLLM shares the GPUs of
    a generation job.
    Exits with 1 if it does not fit.
    """
    if (student is None) == (teacher is None):
        raise UserError("give a --student or a --teacher")
    lora = Lora(rank=lora_rank) if lora_rank else None
    if teacher is not None:
        _check_options_of_teacher(context)
        if quantization and not lora:
            raise UserError(
                "--quantization: weights in 4 bits cannot be trained, only an adapter on them: give --lora-rank"
            )
        _plan_update(teacher, _parse_update(lora, quantization), max_length or 2048, gpu_memory)
        return
    if quantization is not None:
        raise UserError("--quantization applies only to --teacher; influence needs all weights of the student")
    assert student is not None
    options: dict[str, Any] = {"estimator": estimator, "dtype": dtype, "state_dtype": state_dtype}
    options |= {"reference_batch_tokens": reference_batch_tokens, "screening": {"estimator": screen}}
    _plan_measurement(student, lora, parse_options(options), max_length or 1024, gpu_memory)


def _check_options_of_teacher(context: typer.Context) -> None:
    """Raise a UserError if an option of a measurement is given."""
    for name in _OF_A_MEASUREMENT:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"--{name.replace('_', '-')} applies only to --student")


def _plan_measurement(
    student: str, lora: Lora | None, influence: Influence, max_length: int, gpu_memory: float
) -> None:
    from montessori_core.influence.memory import plan_memory

    shape = Shape.of(_load_without_weights(student, lora))
    memory = int(gpu_memory * GB)
    fits = True
    screened = influence.estimator == "screened"
    for name in (influence.screening.estimator, "exact") if screened else (influence.estimator,):
        dtypes = influence.dtype, influence.state_dtype
        memory_plan = plan_memory(shape, name, dtypes, max_length, influence.reference_batch_tokens, memory)
        kept = ", state in 16 bits" if "bfloat16" in dtypes else ""
        print_memory_plan(memory_plan, f"{student}: {name}, {influence.dtype}{kept}, one worker", gpu_memory)
        fits &= memory_plan.fits
    console.print(f"{shape.parameters / 1e9:.3f}e9 parameters, {shape.trained / 1e9:.3f}e9 of them trained")
    if not fits:
        raise typer.Exit(1)


def _parse_update(lora: Lora | None, quantization: str | None) -> TeacherUpdate:
    section = {"lora": lora and lora.model_dump(), "quantization": quantization}
    return parse(TeacherUpdate, section, "--quantization")


def _plan_update(teacher: str, recipe: TeacherUpdate, max_length: int, gpu_memory: float) -> None:
    from montessori_core.training.memory import plan_update

    model = _load_without_weights(teacher, recipe.lora)
    shape = Shape.of(model)
    layouts = [(1, 2, False), (2, 2, False)]
    if recipe.quantization is None:  # weights in 4 bits are not partitioned
        layouts += [(2, 3, False), (2, 3, True)]
    plans = {
        f"{processes} GPU{'s' * (processes > 1)}, zero.stage {stage}{', offload optimizer' * offload}": plan_update(
            shape, stage, processes, 2 * max_length, recipe.quantization, offload
        )
        for processes, stage, offload in layouts
    }
    fitting = [name for name, plan in plans.items() if plan.total <= USABLE * gpu_memory * GB]
    print_update_plans(plans, f"{teacher}: teacher update, GB on each GPU", gpu_memory, fitting)
    size = ModelSize.from_config(model.config.to_dict(), shape.parameters)
    _print_generation(size, teacher, int(gpu_memory * GB))
    if not fitting:
        raise typer.Exit(1)


def _print_generation(size: ModelSize, teacher: str, memory: int) -> None:
    """Print how vLLM shares some numbers of GPUs, with the defaults of `cluster.vllm`."""
    table = Table(
        *("GPUs", "tensor_parallel", "data_parallel", "weights, GB", "left for activations and cache, GB"),
        title=f"{teacher}: generation with vLLM, for each GPU",
        title_justify="left",
    )
    for gpus in (1, 2, 4, 8):
        parallelism = choose_parallelism(size, gpus, memory, Vllm())
        weights = size.weights / parallelism.tensor
        left = max(0.0, DEFAULT_SHARE * memory - weights)
        table.add_row(
            *map(str, (gpus, parallelism.tensor, parallelism.data)), f"{weights / GB:.2f}", f"{left / GB:.2f}"
        )
    console.print(table)
    if size.token:
        console.print(f"cache of a token in all layers: {size.token / 1e6:.3f} MB, shared by tensor_parallel GPUs")


def _load_without_weights(name: str, lora: Lora | None) -> Any:
    """Load a model on the meta device, which has shapes but no weights, with its adapter or a new one."""
    try:
        import torch
        from peft import PeftConfig, PeftModel
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"planning needs the worker's libraries ({error}); pip install 'montessori[train]'") from error
    folder = Path(local_path(name))
    if is_adapter(folder):
        rank = adapter_rank(folder)
        if lora and lora.rank != rank:
            raise UserError(f"--lora-rank {lora.rank}: {name} is an adapter of rank {rank}, which is trained further")
        settings = PeftConfig.from_pretrained(folder)
        settings.inference_mode = False
        base = _load_without_weights(adapted_model(folder), None)
        with torch.device("meta"):
            return PeftModel(base, settings)
    try:
        config = AutoConfig.from_pretrained(local_path(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of {name!r} cannot be loaded: {describe_load_error(error)}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return with_lora(model, lora) if lora else model

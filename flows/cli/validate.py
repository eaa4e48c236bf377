"""The command validate: does influence predict what training does?"""

import math
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.cli.console import console
from flows.cli.influence import (
    DEFAULT_RATE,
    MEASUREMENT_OPTIONS,
    REDUCTION,
    WEIGHT_PER,
    ClusterInsteadOfDevice,
    Examples,
    InstructionField,
    MaxLength,
    NumberType,
    Reference,
    ReferenceBatchTokens,
    ResponseField,
    StateNumberType,
    StudentOption,
    WarmState,
    cluster_or_device,
    parse_options,
)
from flows.cli.options import (
    ChatTemplate,
    ChatTemplateVariables,
    Device,
    data_source,
    names_options,
    student_with_template,
    warn,
)
from montessori_core.config import Influence, Optimization, Resources, Schedule
from montessori_core.errors import ConfigError, UserError
from montessori_core.formatting import UNKNOWN

if TYPE_CHECKING:
    from flows.validation import Validation

OutFolder = Annotated[Path, typer.Option(help="Folder of the result; its finished work makes the command resumable.")]
WarmupFile = Annotated[
    str | None,
    typer.Option(
        help="Examples for a warm-up of the student, in the form of --examples. Give either this or --warm-state."
    ),
]
ExampleWeights = Annotated[
    list[float] | None,
    typer.Option(
        "--example-weight",
        help="Factor of the example's gradient in the influence step; repeat it to compare weights.",
        show_default="0.03125",
    ),
]
WeightsPer = Annotated[
    list[str] | None,
    typer.Option(
        "--weight-per",
        help=f"{WEIGHT_PER} Repeat it to compare both.",
        show_default="example",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(help="Peak rate of warm-up and trainings, and rate of the influence step.", show_default=DEFAULT_RATE),
]
Subsets = Annotated[int, typer.Option(min=8, help="Number of random subsets, each with a training.")]
SubsetSize = Annotated[
    int | None, typer.Option(min=2, help="Examples of a random subset.", show_default="a quarter of the examples")
]
Groups = Annotated[
    int,
    typer.Option(
        help="Number of groups of examples that are left out in turn: at least 8, or 0 for none. With as many groups as "
        "examples, these are left out one by one."
    ),
]

OPTIONS = {
    **MEASUREMENT_OPTIONS,
    "warmup": "--warmup",
    "warmup.instruction_field": "--instruction-field",
    "warmup.output_field": "--response-field",
    "warmup.learning_rate": "--learning-rate",
}
"""See `names_options`."""


@names_options(OPTIONS)
def validate(
    student: StudentOption,
    examples: Examples,
    out: OutFolder,
    reference: Reference = "builtin",
    warmup: WarmupFile = None,
    warm_state: WarmState = None,
    learning_rate: Rate = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a training step.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of a training over its subset.")] = 1,
    example_weight: ExampleWeights = None,
    weight_per: WeightsPer = None,
    exact: Annotated[bool, typer.Option(help="Measure exact (and screened) influence, too; the slowest part.")] = True,
    reference_reduction: Annotated[str, typer.Option(help=REDUCTION)] = "example",
    subsets: Subsets = 32,
    subset_size: SubsetSize = None,
    leave_out: Groups = 16,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of subsets and groups.")] = 0,
    dtype: NumberType = "float32",
    state_dtype: StateNumberType = "float32",
    reference_batch_tokens: ReferenceBatchTokens = 2048,
    device: Device = "auto",
    cluster: ClusterInsteadOfDevice = None,
    max_length: MaxLength = 1024,
    instruction_field: InstructionField = "instruction",
    response_field: ResponseField = "output",
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateVariables = None,
) -> None:
    """Check whether influence predicts what training does, for any student and data.

    The influence of each example on the warm student is measured.
    Then the student is trained on random subsets, on all examples but a few,
    and on the deciles of highest, middle and lowest influence.

    The score (linear datamodeling score) is the rank correlation between the summed
    influence of a subset and the drop in reference loss: 1 is perfect, 0 chance.
    Cheap rivals are scored beside it: the example's loss, its response tokens,
    its gradient's norm and cosine with the reference gradient, BM25.
    If a rival scores as high, it is the better choice for these data.

    [b]Example[/b]
      montessori validate --student smollm2-135m --examples data.jsonl \\
        --warmup warmup.jsonl --reference builtin/maths --out validation

    To resume after an interruption, run the same command again.
    """
    _check_options(out, leave_out)
    from flows.measurement import Measurement, step_rate
    from flows.validation import Validation

    rate = step_rate(warm_state) if learning_rate is None else learning_rate
    options = {
        "learning_rate": rate,
        "reference_reduction": reference_reduction,
        "dtype": dtype,
        "state_dtype": state_dtype,
        "reference_batch_tokens": reference_batch_tokens,
    }
    fields = {"instruction_field": instruction_field, "output_field": response_field}
    settings = _steps(example_weight, weight_per, options)
    model = student_with_template(student, max_length, chat_template, chat_template_kwargs)
    data, good = data_source(examples, "--examples", **fields), data_source(reference, "--reference")
    jobs = cluster_or_device(cluster, device)
    measurement = Measurement(model, warm_state, data, good, settings[0], "student", jobs)
    recipe = _recipe(rate, batch_size, epochs, jobs.resources.training if warmup else Resources())
    source = data_source(warmup, "--warmup", **fields) if warmup else None
    _validate(Validation(measurement, source, settings, exact, recipe, subsets, subset_size, leave_out, seed), out)


def _validate(validation: "Validation", out: Path) -> None:
    """Run or resume a validation and print its scores."""
    from flows.validation import PAGE, validate_influence

    print_validation(validate_influence(validation, out, sys.argv[1:]))
    console.print(f"result: {out / PAGE}", soft_wrap=True)


def _check_options(out: Path, leave_out: int) -> None:
    """Check options that typer cannot.

    Raises:
        UserError: one is invalid; the message names it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if leave_out < 8 and leave_out != 0:
        raise ConfigError(f"--leave-out {leave_out}: a correlation needs at least 8 groups; 0 leaves nothing out")


def _steps(weights: list[float] | None, weights_per: list[str] | None, options: dict[str, Any]) -> list[Influence]:
    """Return the influence steps to compare: each weight with each unit that it is given per."""
    return [
        parse_options({"estimator": "first_order", "example_weight": weight, "weight_per": per, **options})
        for weight, per in product(weights or [Influence().example_weight], weights_per or [Influence().weight_per])
    ]


def _recipe(learning_rate: float, batch_size: int, epochs: int, warmed_by: Resources) -> Optimization:
    """Return the recipe of trainings that continue at the warm-up's peak rate.

    Args:
        learning_rate, batch_size, epochs: see `config.Optimization`.
        warmed_by: resources of the warm-up, whose processes share a batch.

    Raises:
        ConfigError: the batch cannot be divided among the processes.
    """
    processes = warmed_by.nodes * warmed_by.processes_per_node
    if batch_size % processes:
        raise ConfigError(
            f"--batch-size {batch_size}: must be a multiple of the {processes} processes of the warm-up "
            "(resources.training of --cluster)"
        )
    return Optimization(
        learning_rate=learning_rate,
        batch_size=batch_size,
        micro_batch_size=math.gcd(batch_size // processes, 2),
        epochs=epochs,
        schedule=Schedule(warmup=0.0, stable=1.0, decay=0.0),
    )


def print_validation(result: dict[str, Any]) -> None:
    """Print the scores of all predictors, and what training on their deciles does."""
    console.print(
        f"{result['examples']} examples ({result['examples_left_out']} left out), {result['reference_examples']} reference "
        f"examples; reference loss of the warm student {result['student_loss']:.4f} nats per token",
        soft_wrap=True,
    )
    for key, title in (
        ("random_subsets", "{} random subsets of {} examples: rank correlation with the drop in reference loss"),
        ("left_out", "{} groups of {} examples left out in turn: rank correlation with the loss without them"),
    ):
        if key in result:
            part = result[key]
            console.print("\n" + title.format(len(part["measured"]), part["size"]), soft_wrap=True)
            _print_scores(part["scores"])
    deciles = result["tenths"]
    console.print(f"\ndeciles ({deciles['size']} examples): drop in reference loss, nats per token", soft_wrap=True)
    table = Table("deciles by", "top", "middle", "bottom")
    for row in deciles["falls"]:
        table.add_row(row["predictor"], *(f"{row[part]:+.3e}" for part in ("top", "middle", "bottom")))
    console.print(table)
    warn(result["warnings"])


def _print_scores(scores: list[dict[str, Any]]) -> None:
    first = scores[0]["predictor"]
    table = Table("predicted by", "score", "95 % interval", f"score less {first}", "95 % interval")
    for number, score in enumerate(scores):
        difference = ("", "") if number == 0 else (_number(score["difference"]), _interval(score, "difference_"))
        table.add_row(score["predictor"], _number(score["score"]), _interval(score, ""), *difference)
    console.print(table)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:+.2f}"


def _interval(score: dict[str, Any], prefix: str) -> str:
    return f"{_number(score[f'{prefix}low'])} to {_number(score[f'{prefix}high'])}"

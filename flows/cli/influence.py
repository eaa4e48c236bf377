"""The command influence: measure the influence of any data, without a run."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cluster.backends.local import gpus_of_this_machine
from flows.cli.console import console
from flows.cli.options import (
    TEMPLATE_OPTIONS,
    ChatTemplate,
    ChatTemplateVariables,
    Device,
    data_source,
    names_options,
    student_with_template,
)
from flows.cli.tables import print_influence
from montessori_core.config import Cluster, Influence, Preferences, Resources, StageResources, read_cluster
from montessori_core.data.files import COMPRESSIONS, KINDS
from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.errors import ConfigError, UserError

StudentOption = Annotated[str, typer.Option(help="Folder or Hugging Face id of the student.")]
DATA_HELP = (
    f"a file ({', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}), a folder or glob of them, an fsspec URL, or a "
    "Hugging Face data set id."
)
_DATA_SET = (
    "Or a mapping as in a configuration, e.g. '{path: openai/gsm8k, subset: main, instruction_field: question, "
    "output_field: answer}'."
)
Examples = Annotated[str, typer.Option(help=f"Examples to measure: {DATA_HELP} {_DATA_SET}")]
TableFile = Annotated[
    Path, typer.Option(help="Influence table to write, .parquet; FILE.parts next to it makes it resumable.")
]
Reference = Annotated[
    str,
    typer.Option(
        help=f"Reference set, examples of what the student should get better at: {DATA_HELP} Or 'builtin', or e.g. "
        f"'builtin/maths'. {_DATA_SET}"
    ),
]
References = Annotated[
    list[str] | None,
    typer.Option(
        "--reference",
        help=f"Reference set, examples of what the student should get better at: {DATA_HELP} Or 'builtin', or e.g. "
        f"'builtin/maths'. {_DATA_SET} Given several times, one pass measures the examples on all sets, to first order, and "
        "each set gets a table: OUT-NAME.parquet.",
        show_default="builtin",
    ),
]
WEIGHT_PER = (
    "What has the weight --example-weight: example, the mean loss of every example (Eq. 1); or token: examples with more "
    "response tokens weigh more, as in a training batch."
)
REDUCTION = "Reference loss: the mean over examples (example, Eq. 2) or over all response tokens (token)."
WarmState = Annotated[
    Path | None,
    typer.Option(
        help="Folder with AdamW's moments of this student, such as that of a warm student. If not given, the step is "
        "AdamW's first."
    ),
]
EstimatorName = Annotated[
    str,
    typer.Option(
        help="exact: take the step, evaluate the reference set. first_order: project the step on the reference "
        "gradient. linear: the same for a step that is linear in the example's gradient, many examples at once. screened: "
        "first order (or linear: --screen) for all, exact for an audit and for uncertain signs."
    ),
]
ScreenName = Annotated[str, typer.Option(help="What screened uses for all examples: first_order or linear.")]
DEFAULT_RATE = "the peak rate that the --warm-state was trained with, or 5e-6"
ExampleWeight = Annotated[float, typer.Option(help="Factor of the example's gradient in AdamW's step, e.g. 0.125.")]
BaselineName = Annotated[
    str,
    typer.Option(
        help="What an example must beat to help: student (no step), null_step (a step of momentum alone) or median (the "
        "median example)."
    ),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps a projection of the step on each example. For another --reference, the same command reads "
        "them instead of computing the steps again.",
    ),
]
StoreNumbers = Annotated[
    int,
    typer.Option(min=256, help="Numbers that --store keeps of a step, two bytes each; more are more precise."),
]
ErrorRate = Annotated[
    float | None,
    typer.Option(
        metavar="ERROR_RATE",
        help="With exact: read the reference set only until the sign is decided, with at most this share of wrong signs.",
    ),
]
NumberType = Annotated[
    str,
    typer.Option(
        help="Precision: float32; mixed (bf16 activations in the example's gradient); bfloat16 (everything: less "
        "memory, but mostly rounding error for small students)."
    ),
]
StateNumberType = Annotated[
    str,
    typer.Option(
        help="What AdamW's moments and the reference gradient are kept in: float32, or bfloat16, which takes half the "
        "memory of a large student's state; arithmetic is in fp32. With --dtype bfloat16 they are in bfloat16 anyway."
    ),
]
ReferenceBatchTokens = Annotated[
    int, typer.Option(min=1, help="Tokens of a batch of reference examples; fewer take less memory.")
]
ClusterInsteadOfDevice = Annotated[
    Path | None, typer.Option("--cluster", help="Cluster file (YAML): where jobs run, in place of --device.")
]
MaxLength = Annotated[
    int,
    typer.Option(min=32, help="Maximum tokens of an example; the end of longer ones is cut, and the table says so."),
]
InstructionField = Annotated[str, typer.Option(help="Field of --examples that holds the instruction.")]
ResponseField = Annotated[str, typer.Option(help="Field of --examples that holds the response.")]

MEASUREMENT_OPTIONS = {
    **TEMPLATE_OPTIONS,
    "examples": "--examples",
    "examples.instruction_field": "--instruction-field",
    "examples.output_field": "--response-field",
    "reference": "--reference",
    "student.max_length": "--max-length",
    "student.lora": "--student with the folder of an adapter",
    "influence.dtype": "--dtype",
    "influence.state_dtype": "--state-dtype",
    "influence.reference_batch_tokens": "--reference-batch-tokens",
    "influence.example_weight": "--example-weight",
    "cluster": "--cluster",
}
"""The options that `influence` and `validate` have for fields, see `names_options`."""
STEP_OPTIONS = {
    "influence.estimator": "--estimator",
    "influence.screening.audit_examples": "--audit-examples",
    "influence.screening.estimator": "--screen",
    "influence.sequential": "--sequential",
    "warmup.learning_rate": "the learning rate that --student was trained with",
}
"""Those that `influence` alone has."""


@names_options({**MEASUREMENT_OPTIONS, **STEP_OPTIONS})
def influence(
    student: StudentOption,
    examples: Examples,
    out: TableFile,
    reference: References = None,
    warm_state: WarmState = None,
    estimator: EstimatorName = "screened",
    screen: ScreenName = "first_order",
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the AdamW step.", show_default=DEFAULT_RATE)
    ] = None,
    example_weight: ExampleWeight = 1 / 32,
    weight_per: Annotated[str, typer.Option(help=WEIGHT_PER)] = "example",
    baseline: BaselineName = "student",
    reference_reduction: Annotated[str, typer.Option(help=REDUCTION)] = "example",
    audit_examples: Annotated[int, typer.Option(help="Examples that screened also measures exactly.")] = 100,
    store: StoreFolder = None,
    store_numbers: StoreNumbers = 16384,
    sequential: ErrorRate = None,
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
    """Measure how much each example of any data helps a student, without a run.

    Rows may be Alpaca, messages, ShareGPT, or TRL's prompt and completion; montessori data check shows how they are read.
    A row's influence is positive if one training step on it lowers the student's loss on the reference set.
    To resume after an interruption, run the same command again.
    """
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: the table is a Parquet file; its name must end in .parquet")
    from flows.influence import measure_influence
    from flows.measurement import Measurement, Store, step_rate

    options = {
        "estimator": estimator,
        "learning_rate": step_rate(warm_state) if learning_rate is None else learning_rate,
        "example_weight": example_weight,
        "weight_per": weight_per,
        "reference_reduction": reference_reduction,
        "dtype": dtype,
        "state_dtype": state_dtype,
        "reference_batch_tokens": reference_batch_tokens,
        "screening": {"audit_examples": audit_examples, "estimator": screen},
        "sequential": None if sequential is None else {"error_rate": sequential},
    }
    first, *others = (data_source(source, "--reference") for source in reference or ["builtin"])
    measurement = Measurement(
        student=student_with_template(student, max_length, chat_template, chat_template_kwargs),
        warm_state=warm_state,
        examples=data_source(examples, "--examples", instruction_field=instruction_field, output_field=response_field),
        reference=first,
        targets=tuple(others),
        settings=parse_options(options),
        baseline=check_baseline(baseline),
        cluster=cluster_or_device(cluster, device),
        store=Store(store.resolve(), store_numbers) if store else None,
    )
    for table in measure_influence(measurement, out, sys.argv[1:]):
        print_influence(read_table(table, INFLUENCE), baseline)
        console.print(f"table: {table}", soft_wrap=True)


def parse_options(options: dict[str, Any]) -> Influence:
    """Validate command-line options as the settings of a measurement.

    Raises:
        ConfigError: an option is invalid; the message names it.
    """
    try:
        return Influence.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        place = tuple(str(part) for part in problem["loc"])
        if not place:  # settings that exclude each other
            raise ConfigError(problem["msg"].removeprefix("Value error, ")) from error
        names: dict[tuple[str, ...], str] = {
            ("screening", "estimator"): "screen",
            ("screening", "audit_examples"): "audit_examples",
        }
        name = names.get(place, place[0])
        raise ConfigError(f"--{name.replace('_', '-')}: {problem['msg']}") from error


def check_baseline(baseline: str) -> str:
    """Return the baseline if it is valid here.

    Raises:
        ConfigError: no such baseline, or it would compare each example with itself.
    """
    if baseline == "prompt":
        raise ConfigError("--baseline prompt: these examples have no prompts in common; use median")
    try:
        return Preferences.model_validate({"baseline": baseline}).baseline
    except ValidationError as error:
        raise ConfigError(f"--baseline: {error.errors()[0]['msg']}") from error


def cluster_or_device(file: Path | None, device: str) -> Cluster:
    """Return the cluster of a file; without one, this machine.

    Raises:
        UserError: the file is invalid, both are given, or there is no such device.
    """
    if file is None:
        return local_cluster(device)
    if device != "auto":
        raise ConfigError("--cluster and --device: give one of them; a cluster file says how many GPUs a job has")
    return read_cluster(file)


def local_cluster(device: str) -> Cluster:
    """Return a cluster of this machine whose jobs compute on a device: 'auto', 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        UserError: no such device.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise ConfigError(f"--device: {device!r} is not one of auto, cpu, cuda, cuda:N")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--device {device}: PyTorch sees no such GPU; use --device cpu, or install PyTorch's CUDA build"
            )
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif number:  # as in PyTorch, an index of the GPUs that this process may use
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus_of_this_machine()[int(number)]) if visible else number
    jobs = Resources(gpus_per_node=1 if gpus_of_this_machine() else 0)
    return Cluster(resources=StageResources(influence=jobs, training=jobs))

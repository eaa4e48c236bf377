"""The programs that jobs run, and the settings that decide their results.

The driver imports this module, and the node only the entry it needs. Sizes of shards and resources are no settings: a
result does not depend on them.
"""

from typing import Any, Literal

from pydantic import Field

from montessori_core.config import Influence, Lora, Optimization, Sampling, Section, Sequential, TeacherUpdate, Zero
from montessori_core.data import rows
from montessori_core.program import Program

Form = Literal["tagged", "whole", "request", "reply"]
"""A tagged or whole text is continued as it stands, after the token that texts begin with, a tagged one up to the closing
tag. A request is put by the template, and so is what follows a request and its answer, to get a reply."""


class NoSettings(Section):
    """Of a program whose inputs and rows decide everything."""


class Generation(Section):
    """How a loaded teacher writes."""

    engine: Literal["auto", "vllm", "transformers"]
    form: Form
    sampling: Sampling


class ApiRequest(Section):
    """Who answers behind an API: what decides its answers, see `config.Endpoint.identity`."""

    endpoint: dict[str, Any]


class ApiGeneration(ApiRequest):
    """How a teacher behind an API writes."""

    sampling: Sampling


class Judging(ApiRequest):
    """What a judge gives points for."""

    response_only: bool = Field(description="Five points for the response, in place of six with the instruction's.")


class BenchmarkJudging(ApiRequest):
    """How a judge of a benchmark is asked."""

    prompts: Literal["own", "published"]


class Sft(Section):
    """Supervised fine-tuning."""

    max_length: int = Field(description="Tokens of an example.")
    lora: Lora | None = Field(description="Train an adapter of this kind; none trains all weights.")
    recipe: Optimization
    zero: Zero
    seed: int
    save_moments: bool = Field(description="Keep AdamW's moments beside the weights.")
    conversations: bool = Field(False, description="Rows are whole conversations, as NOMAD trains teachers.")
    mask_prompts: bool = Field(True, description="Of conversations, train the responses alone.")


class Dpo(Section):
    """Direct preference optimization."""

    prompt_style: Literal["chat", "completion"]
    recipe: TeacherUpdate
    zero: Zero
    seed: int
    keep: int = Field(0, description="How many models on the way are kept.")


class AdamWStep(Section):
    """The one step of Eq. 11, its rate resolved."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    example_weight: float


class InfluenceMeasurement(Section):
    """How influence is measured."""

    max_length: int
    estimator: Literal["exact", "first_order"]
    dtype: Literal["float32", "mixed", "bfloat16"]
    step: AdamWStep
    reference_reduction: Literal["example", "token"]
    reference_batch_tokens: int
    sequential: Sequential | None
    baseline: Literal["student", "null_step"] | None = Field(
        description="Whose sign a sequential measurement decides; none without one."
    )


def measurement_settings(
    influence: Influence, warmup: Optimization, max_length: int, estimator: str, baseline: str
) -> InfluenceMeasurement:
    """The settings of a measurement by one of the two estimators that jobs have.

    Args:
        influence: the configuration.
        warmup: whose AdamW takes the one step, at its peak rate unless `influence` has another.
        max_length: tokens of an example.
        estimator: 'exact' or 'first_order'.
        baseline: see `config.Preferences`; a sequential measurement decides signs against it.
    """
    sequential = influence.sequential if estimator == "exact" else None
    step = AdamWStep(
        learning_rate=influence.learning_rate or warmup.learning_rate,
        beta1=warmup.beta1,
        beta2=warmup.beta2,
        epsilon=warmup.epsilon,
        weight_decay=warmup.weight_decay,
        example_weight=influence.example_weight,
    )
    return InfluenceMeasurement.model_validate(
        {
            **influence.model_dump(include={"dtype", "reference_reduction", "reference_batch_tokens"}),
            "max_length": max_length,
            "estimator": estimator,
            "step": step,
            "sequential": sequential,
            "baseline": baseline if sequential else None,
        }
    )


class ModelLoss(Section):
    """How the loss of a model is evaluated."""

    max_length: int
    batch_tokens: int


class InContext(ModelLoss):
    """How the worth of a demonstration is measured."""

    reference_reduction: Literal["example", "token"]


class Similarity(Section):
    """How texts are compared."""

    max_length: int


class Harness(Section):
    """How items are put to a model."""

    batch_size: int = Field(description="Items scored together, and requests in a forward pass.")
    chat_template: bool = Field(description="Put prompts in the model's template.")


_CORE = "montessori_core"
GENERATION = Program(
    "generation", 1, f"{_CORE}.synthesis.jobs:open_generation", Generation, rows.GenerationRow, "generation"
)
API_GENERATION = Program(
    "api-generation", 1, f"{_CORE}.synthesis.jobs:open_api_generation", ApiGeneration, rows.GenerationRow, "judging"
)
SFT = Program("sft", 1, f"{_CORE}.training.sft:open_sft", Sft, rows.TrainingRow, "training", suffix="")
DPO = Program("dpo", 1, f"{_CORE}.training.dpo:open_dpo", Dpo, rows.PairRow, "teacher_update", suffix="")
INFLUENCE = Program(
    "influence", 1, f"{_CORE}.influence.jobs:open_influence", InfluenceMeasurement, rows.ExampleRow, "influence"
)
REFERENCE_LOSS = Program(
    "reference-loss", 1, f"{_CORE}.influence.jobs:open_reference_loss", ModelLoss, rows.TaskRow, "evaluation"
)
TRAINING_LOSS = Program(
    "training-loss", 1, f"{_CORE}.influence.signals:open_training_loss", ModelLoss, rows.ExampleRow, "influence"
)
IN_CONTEXT = Program(
    "in-context", 1, f"{_CORE}.influence.signals:open_in_context", InContext, rows.ExampleRow, "influence"
)
NORM_SIM = Program("norm-sim", 1, f"{_CORE}.synthesis.nomad:open_norm_sim", Similarity, rows.TaskRow, "influence")
JUDGE = Program("judge", 1, f"{_CORE}.judging.points:open_judge", Judging, rows.ExampleRow, "judging")
PAIRWISE_JUDGE = Program(
    "pairwise-judge",
    1,
    f"{_CORE}.judging.pairwise:open_pairwise_judge",
    BenchmarkJudging,
    rows.ComparisonRow,
    "judging",
)
MT_BENCH_JUDGE = Program(
    "mt-bench-judge", 1, f"{_CORE}.judging.mt_bench:open_mt_bench_judge", BenchmarkJudging, rows.DialogueRow, "judging"
)
BENCHMARK_ITEMS = Program(
    "benchmark-items", 1, f"{_CORE}.evaluation.harness:open_items", NoSettings, rows.BenchmarkRow, "evaluation"
)
HARNESS = Program("harness", 1, f"{_CORE}.evaluation.harness:open_harness", Harness, rows.ItemRow, "evaluation")

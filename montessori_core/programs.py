"""The programs that jobs run, and the settings that decide their results.

The driver imports this module; a node imports only the entry it needs. Sizes of shards and resources are not settings:
results do not depend on them.
"""

from typing import Any, Literal

from pydantic import Field

from montessori_core.config import (
    Dtype,
    Influence,
    Lora,
    Optimization,
    Sampling,
    Section,
    Sequential,
    StateDtype,
    TeacherUpdate,
    WeightPer,
    Zero,
)
from montessori_core.data import rows
from montessori_core.program import Program

Form = Literal["tagged", "whole", "user_line", "request", "reply", "user_turn"]
"""How a teacher gets its text. A tagged or whole text, or a user's line, is continued after the beginning-of-text token: a
tagged one up to the closing tag, a user's line up to the assistant's. The chat template renders a request; for a reply, it
renders a request, its answer and a second request; of a user's turn it renders the beginning, which the teacher continues."""


class NoSettings(Section):
    """Settings of a program that has none."""


class Generation(Section):
    """How a local teacher generates."""

    engine: Literal["auto", "vllm", "transformers"]
    engine_options: dict[str, Any] = Field({}, description="Further options of vLLM's engine.")
    form: Form
    sampling: Sampling


class ApiRequest(Section):
    """The settings of an endpoint that decide its answers, see `config.Endpoint.identity`."""

    endpoint: dict[str, Any]


class ApiGeneration(ApiRequest):
    """How a teacher behind an API generates."""

    sampling: Sampling


class Judging(ApiRequest):
    """What a judge scores."""

    response_only: bool = Field(description="Score the response alone, with five points instead of six.")


class BenchmarkJudging(ApiRequest):
    """Which prompts the judge of a benchmark gets."""

    prompts: Literal["own", "published"]


class Sft(Section):
    """Supervised fine-tuning."""

    max_length: int = Field(description="Tokens of an example.")
    lora: Lora | None = Field(default=None, description="Train this adapter; none trains all weights.")
    recipe: Optimization
    zero: Zero
    seed: int
    save_moments: bool = Field(description="Save AdamW's moments with the weights.")
    conversations: bool = Field(False, description="Rows are whole conversations, as NOMAD trains teachers.")
    mask_prompts: bool = Field(True, description="Train only the responses of conversations.")
    response_tokens: int | None = Field(None, description="Most response tokens of the examples of an epoch.")


class Dpo(Section):
    """Direct preference optimization."""

    prompt_style: Literal["chat", "completion"]
    recipe: TeacherUpdate
    zero: Zero
    seed: int
    keep: int = Field(0, description="Number of intermediate models to keep.")


class AdamWStep(Section):
    """The optimizer step of Eq. 11, with its learning rate resolved."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    example_weight: float
    weight_per: WeightPer


class InfluenceMeasurement(Section):
    """How influence is measured."""

    max_length: int
    estimator: Literal["exact", "first_order", "linear"]
    dtype: Dtype
    state_dtype: StateDtype
    step: AdamWStep
    reference_reduction: Literal["example", "token"]
    reference_batch_tokens: int
    sequential: Sequential | None = None
    baseline: Literal["student", "null_step"] | None = Field(
        default=None, description="Baseline whose sign a sequential measurement tests; none if it is not sequential."
    )


class StepProjection(Section):
    """How the steps on examples are projected, to keep them."""

    max_length: int
    dtype: Dtype
    state_dtype: StateDtype
    step: AdamWStep
    numbers: int = Field(description="About how many numbers a projection has.")


class ReferenceProjection(StepProjection):
    """How a reference set's gradient is projected, to compare it with such steps."""

    reference_reduction: Literal["example", "token"]
    reference_batch_tokens: int


def measurement_settings(
    influence: Influence, warmup: Optimization, max_length: int, estimator: str, baseline: str
) -> InfluenceMeasurement:
    """Return the settings of a measurement.

    Args:
        influence: its configuration.
        warmup: its AdamW takes the step, at its peak learning rate unless `influence` sets another.
        max_length: tokens of an example.
        estimator: 'exact', 'first_order' or 'linear'.
        baseline: see `config.Preferences`; a sequential measurement tests signs against it.
    """
    sequential = influence.sequential if estimator == "exact" else None
    step = AdamWStep(
        learning_rate=influence.learning_rate or warmup.learning_rate,
        beta1=warmup.beta1,
        beta2=warmup.beta2,
        epsilon=warmup.epsilon,
        weight_decay=warmup.weight_decay,
        example_weight=influence.example_weight,
        weight_per=influence.weight_per,
    )
    return InfluenceMeasurement.model_validate(
        {
            **influence.model_dump(include={"dtype", "state_dtype", "reference_reduction", "reference_batch_tokens"}),
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


class ReferenceSignal(ModelLoss):
    """How an example is measured on the reference set."""

    reference_reduction: Literal["example", "token"]


class Retraining(ReferenceSignal):
    """How the warm student is trained on subsets of the examples."""

    recipe: Optimization
    mixed: bool = Field(description="Run forward and backward passes of the training in bf16.")


class Similarity(Section):
    """How texts are compared."""

    max_length: int


class Embedding(Section):
    """How instructions are embedded."""

    max_length: int = Field(description="Tokens of a text.")


class CodeRuns(Section):
    """Limits of the code of a response."""

    seconds: int
    memory_mb: int
    need_isolation: bool = Field(description="Fail where the system has no namespaces.")


class Harness(Section):
    """How a model is evaluated on items."""

    batch_size: int = Field(description="Items scored together, and requests in a forward pass.")
    chat_template: bool = Field(description="Render prompts with the model's chat template.")


_CORE = "montessori_core"
_NO_OFFLOAD = {"zero": {"offload": "none"}}  # offload only moves tensors
GENERATION = Program(
    "generation", 2, f"{_CORE}.synthesis.jobs:open_generation", Generation, rows.GenerationRow, "generation"
)
API_GENERATION = Program(
    "api-generation", 3, f"{_CORE}.synthesis.jobs:open_api_generation", ApiGeneration, rows.GenerationRow, "judging"
)
SFT = Program(
    "sft", 1, f"{_CORE}.training.sft:open_sft", Sft, rows.TrainingRow, "training", suffix="", key_values=_NO_OFFLOAD
)
DPO = Program(
    "dpo", 1, f"{_CORE}.training.dpo:open_dpo", Dpo, rows.PairRow, "teacher_update", suffix="", key_values=_NO_OFFLOAD
)
INFLUENCE = Program(
    "influence", 4, f"{_CORE}.influence.jobs:open_influence", InfluenceMeasurement, rows.ExampleRow, "influence"
)
INFLUENCE_BY_TARGET = Program(
    "influence-by-target",
    2,
    f"{_CORE}.influence.target_jobs:open_targets",
    InfluenceMeasurement,
    rows.ExampleRow,
    "influence",
)
STEPS = Program("steps", 1, f"{_CORE}.influence.step_jobs:open_steps", StepProjection, rows.ExampleRow, "influence")
REFERENCE_PROJECTION = Program(
    "reference-projection",
    1,
    f"{_CORE}.influence.step_jobs:open_reference_projection",
    ReferenceProjection,
    rows.TaskRow,
    "influence",
)
REFERENCE_LOSS = Program(
    "reference-loss", 1, f"{_CORE}.influence.jobs:open_reference_loss", ModelLoss, rows.TaskRow, "evaluation"
)
TRAINING_LOSS = Program(
    "training-loss", 1, f"{_CORE}.influence.signals:open_training_loss", ModelLoss, rows.ExampleRow, "influence"
)
IN_CONTEXT = Program(
    "in-context", 1, f"{_CORE}.influence.signals:open_in_context", ReferenceSignal, rows.ExampleRow, "influence"
)
GRADIENT_COSINE = Program(
    "gradient-cosine",
    1,
    f"{_CORE}.influence.signals:open_gradient_cosine",
    ReferenceSignal,
    rows.ExampleRow,
    "influence",
)
RETRAINING = Program(
    "retraining", 1, f"{_CORE}.influence.retraining:open_retraining", Retraining, rows.SubsetRow, "influence"
)
NORM_SIM = Program("norm-sim", 1, f"{_CORE}.synthesis.nomad:open_norm_sim", Similarity, rows.TaskRow, "influence")
EMBEDDING = Program(
    "embedding", 1, f"{_CORE}.synthesis.embedding:open_embedding", Embedding, rows.TaskRow, "evaluation"
)
CODE_RUNS = Program("code-runs", 1, f"{_CORE}.synthesis.sandbox:open_code_runs", CodeRuns, rows.TaskRow, "evaluation")
JUDGE = Program("judge", 3, f"{_CORE}.judging.points:open_judge", Judging, rows.ExampleRow, "judging")
PAIRWISE_JUDGE = Program(
    "pairwise-judge",
    2,
    f"{_CORE}.judging.pairwise:open_pairwise_judge",
    BenchmarkJudging,
    rows.ComparisonRow,
    "judging",
)
MT_BENCH_JUDGE = Program(
    "mt-bench-judge", 2, f"{_CORE}.judging.mt_bench:open_mt_bench_judge", BenchmarkJudging, rows.DialogueRow, "judging"
)
BENCHMARK_ITEMS = Program(
    "benchmark-items", 2, f"{_CORE}.evaluation.harness:open_items", NoSettings, rows.BenchmarkRow, "evaluation"
)
HARNESS = Program("harness", 2, f"{_CORE}.evaluation.harness:open_harness", Harness, rows.ItemRow, "evaluation")

"""How influence is measured and turned into preference pairs."""

import math
from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Probability, Section
from montessori_core.errors import ConfigError

LARGEST_LINEAR_WEIGHT = 1 / 32
"""Example weight up to which AdamW's step is nearly linear; at 1/8, Spearman with exact is 0.90 (docs/numerics.md)."""


def conformal_rank(errors: int, error_rate: float) -> int:
    """Return the rank, from 1, of the error that another error exceeds with probability `error_rate` at most.

    A rank of more than `errors` says that there are too few.
    """
    return math.ceil((errors + 1) * (1 - error_rate))


class Screening(Section):
    """Audit of the screened estimator: estimates for all examples, exact values where a sign is in doubt."""

    estimator: Literal["first_order", "linear"] = Field(
        "first_order",
        description="What measures all examples before the audit: 'first_order', or 'linear', which takes a fraction of the "
        "time but leaves more signs in doubt, which are then measured exactly. It pays for large sets.",
    )
    audit_examples: int = Field(
        100,
        ge=40,
        description="Examples, drawn at random, that are also measured exactly: one half calibrates the error of the "
        "estimator, the other half measures how often the signs agree after correction.",
    )
    error_rate: float = Field(
        0.05,
        gt=0.0,
        lt=0.5,
        description="Share of examples whose error may exceed the width of the band in which signs are confirmed exactly. "
        "To tell it, the audit needs about 2 / error_rate examples.",
    )
    minimum_agreement: Probability = Field(
        0.9,
        description="If a smaller share of the audit's signs agree after correction, measure every example exactly.",
    )


class Sequential(Section):
    """Sequential test: read the reference set only until the sign of an influence is decided."""

    error_rate: float = Field(
        0.05,
        gt=0.0,
        lt=0.5,
        description="Share of examples whose sign may differ from that over the whole reference set.",
    )
    block: int = Field(32, ge=8, description="Reference examples that are read before each look at the sign.")


WeightPer = Literal["example", "token"]
Dtype = Literal["float32", "mixed", "bfloat16"]
StateDtype = Literal["float32", "bfloat16"]


class Influence(Section):
    """How local data influence is measured (Eq. 1 and 2)."""

    probing_examples: Count = Field(10_000, description="Examples in the probing set of the first iteration.")
    later_probing_examples: Count = Field(2000, description="Examples in the probing set of later iterations.")
    estimator: Literal["exact", "first_order", "linear", "screened"] = Field(
        "screened",
        description="'exact' takes the step and evaluates the reference set. 'first_order' projects the step on the "
        "reference gradient at the null step; with many reference examples it is hundreds of times cheaper. 'linear' also "
        "treats the step as linear in the example's gradient, which it nearly is up to a weight of 1/32: one pass measures a "
        "batch of examples, without moments and weight gradients. 'screened' uses first order (or linear, see screening) for "
        "all examples, audits it, and confirms signs in doubt exactly.",
    )
    dtype: Dtype = Field(
        "float32",
        description="Precision of a step: 'float32'; 'mixed' (bf16 activations for the example's gradient, fp32 for the "
        "rest); 'bfloat16' (everything, as in the authors' code: less memory, but mostly rounding error for small students).",
    )
    state_dtype: StateDtype = Field(
        "float32",
        description="What AdamW's moments and the reference gradient are kept in; arithmetic is in fp32 (unless dtype: "
        "bfloat16; with dtype: mixed, a linear measurement keeps directions in bf16). 'bfloat16' takes half the memory: more "
        "of a large student's state stays on the GPU, instead of being copied there for each batch of examples. Ranks stay "
        "the same (docs/numerics.md).",
    )
    screening: Screening = Field(Screening(), description="How estimator: screened audits its estimates.")
    sequential: Sequential | None = Field(
        None,
        description="For estimator: exact, stop reading the reference set once the sign of the influence is clear (a "
        "sequential test). If not set, read all of it.",
    )
    reference_reduction: Literal["example", "token"] = Field(
        "example", description="Reference loss: mean over examples (Eq. 2) or over all response tokens."
    )
    learning_rate: float | None = Field(
        None, gt=0.0, description="Learning rate of the step. If not set, the warm-up's peak rate."
    )
    example_weight: float = Field(
        1 / 32,
        gt=0.0,
        le=1.0,
        description="Factor on the example's gradient before AdamW: 1 is Eq. 1 to the letter, 1/8 the authors' code on 8 "
        "GPUs, 1/32 (the default: no other value predicts training measurably better) an example in a training batch of 32. "
        "At 1, the square of the example's gradient can dominate AdamW's denominator (`dominated_share` in the table).",
    )
    weight_per: WeightPer = Field(
        "example",
        description="What has the weight example_weight: 'example', the mean loss of every example (Eq. 1); 'token', that "
        "of an example with as many response tokens as a reference example has on average. Examples with more tokens then "
        "weigh more, as in a training batch, whose loss is the mean over the tokens of all its examples.",
    )
    reference_batch_tokens: Count = Field(
        2048,
        description="Tokens of a forward pass, including padding, over reference and evaluation examples and, with linear, "
        "over probing examples.",
    )
    examples_per_shard: Count = Field(64, description="Maximum number of probing examples per shard.")

    @model_validator(mode="after")
    def _linear_weight_is_small(self) -> "Influence":
        screened = self.estimator == "screened"
        estimator = self.screening.estimator if screened else self.estimator
        if estimator == "linear" and self.example_weight > LARGEST_LINEAR_WEIGHT:
            name = "influence.screening.estimator" if screened else "influence.estimator"
            raise ValueError(
                f"{name}=linear with influence.example_weight={self.example_weight:g}: AdamW's step is nearly linear in the "
                f"example's gradient up to about {LARGEST_LINEAR_WEIGHT:g}; lower influence.example_weight, or set "
                f"{name}=first_order"
            )
        return self

    @model_validator(mode="after")
    def _sequential_is_exact(self) -> "Influence":
        if self.sequential is not None and self.estimator != "exact":
            raise ValueError(
                f"influence.sequential belongs to influence.estimator=exact, not {self.estimator}; set "
                "influence.estimator=exact, or leave out influence.sequential"
            )
        return self

    def refuse_small_audit(self) -> None:
        """Refuse an audit after which every example would be measured exactly.

        When a measurement begins, not when a configuration is read: folders of earlier versions have such settings.

        Raises:
            ConfigError: the estimator is screened, and its audit too small for its error rate.
        """
        audit, rate = self.screening.audit_examples, self.screening.error_rate
        half = math.ceil(audit / 2)
        if self.estimator == "screened" and conformal_rank(half, rate) > half:
            raise ConfigError(
                f"influence.screening.audit_examples: {audit} are too few to tell an error that a share of {rate:g} exceeds "
                "(error_rate), so that every example would be measured exactly; set at least "
                f"{2 * math.ceil(1 / rate - 1)}, or influence.estimator: exact"
            )


Baseline = Literal["student", "null_step", "median", "prompt"]


class Preferences(Section):
    """How influence becomes preference pairs (Eq. 3)."""

    baseline: Baseline = Field(
        "prompt",
        description="What an example is compared with: 'student', the student without the step (the paper's sign); "
        "'null_step', a step of momentum alone; 'median', the median of the probing set; 'prompt', the mean over the "
        "examples of its prompt. Where momentum outweighs a single example, most examples lie on one side of the first two, "
        "which leaves few pairs; 'prompt' leaves pairs for every prompt.",
    )
    margin: float = Field(
        0.0,
        ge=0.0,
        description="Keep pairs whose influence gap exceeds this many standard errors over the reference examples (the "
        "errors of both examples are treated as independent); 0 keeps every pair of examples that lie outside rounding error "
        "of the threshold.",
    )
    pairs: Literal["within_prompt", "across_prompts"] = Field(
        "within_prompt",
        description="'within_prompt' pairs each helpful example with each harmful example of its prompt (Eq. 3); "
        "'across_prompts' pairs the most helpful with the most harmful examples of any prompt, under the prompt of the "
        "harmful one. Needs baseline student, null_step or median.",
    )
    max_uses: Count = Field(
        1,
        description="Maximum number of pairs that an example may be in, for pairs: across_prompts. With max_pairs, a larger "
        "number trains on fewer and more helpful examples, each under several prompts.",
    )
    max_pairs: Count | None = Field(
        None,
        description="Maximum number of pairs: those with the largest influence gap; across prompts, those of the most "
        "helpful examples, each with max_uses others. If not set, all.",
    )

    @model_validator(mode="after")
    def _pairs_have_their_settings(self) -> "Preferences":
        if self.pairs == "across_prompts" and self.baseline == "prompt":
            raise ValueError(
                "pairs: across_prompts with baseline: prompt; the mean of a prompt divides only its own examples; set "
                "baseline: median or null_step"
            )
        if self.pairs == "within_prompt" and self.max_uses != 1:
            raise ValueError(
                f"max_uses: {self.max_uses} needs pairs: across_prompts; within a prompt, each helpful example makes a pair "
                "with each harmful one"
            )
        return self

    def within_prompts(self) -> "Preferences":
        """Return the same rules for pairs of one prompt; a threshold of all prompts may leave many without pairs."""
        if self.pairs == "within_prompt":
            return self
        return self.model_copy(update={"pairs": "within_prompt", "max_uses": 1, "baseline": "prompt"})

"""How influence is measured, and how it becomes preference pairs."""

from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Probability, Section


class Screening(Section):
    """How the screened estimator checks itself: first order for all, exact where it matters."""

    audit_examples: int = Field(
        100,
        ge=40,
        description="Examples measured both ways, drawn at random: one half says how far first order is off, the other "
        "how often the signs agree once that is corrected.",
    )
    error_rate: float = Field(
        0.05,
        gt=0.0,
        lt=0.5,
        description="Share of examples on which first order may be off by more than the width within which signs are "
        "confirmed exactly.",
    )
    minimum_agreement: Probability = Field(
        0.9, description="If fewer signs of the audit agree after correction, every example is measured exactly."
    )


class Sequential(Section):
    """Reading the reference set only until the sign of an influence is decided."""

    error_rate: float = Field(
        0.05, gt=0.0, lt=0.5, description="Share of examples whose sign may differ from that over the whole set."
    )
    block: int = Field(32, ge=8, description="Reference examples read between two decisions.")


class Influence(Section):
    """How local data influence is measured (Eq. 1 and 2)."""

    probing_examples: Count = Field(10_000, description="Examples in the probing set of the first iteration.")
    later_probing_examples: Count = Field(2000, description="Examples in the probing set of later iterations.")
    estimator: Literal["exact", "first_order", "screened"] = Field(
        "screened",
        description="'exact' takes the step and evaluates the reference set; 'first_order' projects the step on "
        "the reference gradient at the null step, hundreds of times cheaper with many reference examples; 'screened' "
        "takes first order for all, audits it, and confirms exactly where the sign is in doubt.",
    )
    dtype: Literal["float32", "mixed", "bfloat16"] = Field(
        "float32",
        description="Numbers a step is computed in: 'float32'; 'mixed' (the example's gradient with bf16 activations, "
        "all else fp32); 'bfloat16' (all of it, as the authors' code: smaller, and mostly rounding for small students).",
    )
    screening: Screening = Field(Screening(), description="The audit of estimator: screened.")
    sequential: Sequential | None = Field(
        None,
        description="Exact measurements read the reference set only until the sign is decided; none reads all of it.",
    )
    reference_reduction: Literal["example", "token"] = Field(
        "example", description="Reference loss: mean over examples (Eq. 2) or over all response tokens."
    )
    learning_rate: float | None = Field(
        None, gt=0.0, description="Rate of the one step; none takes the warm-up's peak rate."
    )
    example_weight: float = Field(
        1 / 32,
        gt=0.0,
        le=1.0,
        description="What the example's gradient is multiplied by before AdamW's arithmetic: 1 is Eq. 1 to the letter, 1/8 "
        "the authors' code on 8 GPUs, 1/32 (the default: no other predicts training measurably better) an "
        "example of a training batch of 32. At 1 the example's own square can decide most of AdamW's denominator "
        "(`dominated_share` of the table).",
    )
    reference_batch_tokens: Count = Field(
        2048, description="Tokens of a batch of reference examples, padding included."
    )
    examples_per_shard: Count = Field(64, description="Most probing examples in one shard.")

    @model_validator(mode="after")
    def _sequential_is_exact(self) -> "Influence":
        if self.sequential is not None and self.estimator != "exact":
            raise ValueError(
                f"sequential evaluation belongs to estimator: exact, not {self.estimator}; set estimator: exact, or "
                "sequential: null"
            )
        return self


Baseline = Literal["student", "null_step", "median", "prompt"]


class Preferences(Section):
    """How influence becomes preference pairs (Eq. 3)."""

    baseline: Baseline = Field(
        "prompt",
        description="What an example is compared with: the student as it is (the paper's sign), the null step (what "
        "momentum alone would do), the median of the probing set, or the mean of the examples of its prompt. Of the first "
        "two, most examples lie on one side when momentum outweighs a single example, which leaves few pairs; the mean of "
        "a prompt leaves pairs in every prompt.",
    )
    margin: float = Field(
        0.0,
        ge=0.0,
        description="Keep pairs that differ in influence by more than so many standard errors of the difference over the "
        "reference examples, the errors of both being taken as independent; 0 keeps all that rounding does not blur.",
    )
    max_pairs: Count | None = Field(
        None, description="Keep only so many pairs, those with the widest influence gap; none keeps all."
    )

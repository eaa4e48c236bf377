"""Training recipes: warm-up, student training, teacher update."""

from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.models import Lora
from montessori_core.config.section import Count, Probability, Section
from montessori_core.config.synthesis import Sampling


class Schedule(Section):
    """Learning-rate schedule (WSD): warm-up, stable phase, decay, as shares of all steps."""

    warmup: Probability = Field(0.1, description="Share of the steps with a linear ramp up to the peak rate.")
    stable: Probability = Field(0.5, description="Share of the steps at the peak rate.")
    decay: Probability = Field(0.4, description="Share of the steps with a linear decay to the final rate.")
    final: Probability = Field(0.001, description="Final rate, as a share of the peak.")

    @model_validator(mode="after")
    def _shares_add_up(self) -> "Schedule":
        total = self.warmup + self.stable + self.decay
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"warmup + stable + decay must be 1, not {total:g}: they are shares of all steps")
        return self


class Optimization(Section):
    """Settings that all training recipes share."""

    learning_rate: float = Field(5e-6, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(32, description="Examples per optimizer step, over all processes.")
    micro_batch_size: Count = Field(2, description="Examples per process and forward pass; more need more memory.")
    epochs: Count = Field(1, description="Passes over the data.")
    schedule: Schedule = Field(Schedule(), description="Learning-rate schedule.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW: decay of the first moment.")
    beta2: float = Field(0.999, gt=0.0, lt=1.0, description="AdamW: decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0.0, description="AdamW: term added to the denominator.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW: decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradients are clipped to this norm; 0 is off.")

    def shared(self) -> "Optimization":
        """Return the fields that all recipes have, which determine a training on given rows."""
        return Optimization.model_validate(self.model_dump(include=set(Optimization.model_fields)))

    @model_validator(mode="after")
    def _whole_accumulation(self) -> "Optimization":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self


class Warmup(Optimization):
    """Warm-up of the student and its AdamW moments, before influence is measured."""

    examples: Count = Field(1000, description="Examples in the warm-up set.")
    schedule: Schedule = Field(
        Schedule(warmup=1.0, stable=0.0, decay=0.0),
        description="Learning-rate schedule; by default a linear ramp to the peak over the whole warm-up.",
    )


class Training(Optimization):
    """Training of the student, from its original weights, on the updated teacher's data."""

    examples: Count = Field(10_000, description="Examples in the training set.")
    response_tokens: Count | None = Field(
        None,
        description="Train on the first examples that together have at most this many response tokens, as the student counts "
        "them, so that students of all methods learn from equally much text. If not set, on all examples.",
    )

    @model_validator(mode="after")
    def _budget_holds_a_batch(self) -> "Training":
        if self.response_tokens is not None and self.response_tokens < self.batch_size:
            raise ValueError(
                f"response_tokens ({self.response_tokens}) must be at least batch_size ({self.batch_size}): an example has "
                "one or more"
            )
        return self


class TeacherUpdate(Optimization):
    """Direct preference optimization of the teacher (Eq. 4)."""

    learning_rate: float = Field(1e-6, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(2, description="Preference pairs per optimizer step, over all processes.")
    micro_batch_size: Count = Field(
        2, description="Preference pairs per process and forward pass; more need more memory."
    )
    beta: float = Field(0.1, gt=0.0, description="DPO: strength of the pull towards the teacher before the update.")
    loss: Literal["sigmoid", "ipo", "robust", "sigmoid_norm"] = Field(
        "sigmoid",
        description="Loss of a pair, by TRL's name. 'sigmoid' is DPO (Eq. 4). For noisy pairs: 'ipo' pulls the margin of the "
        "mean log-ratios per token towards 1 / (2 beta), not to infinity; 'robust' is unbiased if a share `label_smoothing` "
        "of the pairs is reversed. 'sigmoid_norm' is DPO with the mean log-ratio per token, so that length counts less; it "
        "needs a larger beta.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=0.5,
        description="Share of the pairs that loss: robust expects to be reversed; 0 for the other losses.",
    )
    sft_weight: float = Field(
        0.0,
        ge=0.0,
        description="Weight of TRL's loss 'sft', which is added: the negative log-likelihood of chosen outputs, a mean over "
        "the tokens of a micro-batch. It keeps their likelihood from falling; 0 is off.",
    )
    max_length: int = Field(
        2048,
        ge=64,
        description="Maximum length of prompt and instruction, tokens; longer pairs are skipped and counted.",
    )
    lora: Lora | None = Field(
        None,
        description="Train LoRA matrices; the updated teacher is an adapter, and later iterations continue it. If not set, "
        "train all weights. The learning rate should be 10 to 100 times higher than for all weights.",
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description="With lora: keep the frozen weights in 4 bits during the update (QLoRA), about a quarter of bf16; nf4 is "
        "normalised float with double quantization. Generation applies the adapter to the whole weights. Needs "
        "bitsandbytes where the jobs run (pip install 'montessori[qlora]'). If not set, bf16 on GPUs, fp32 on CPUs.",
    )

    @model_validator(mode="after")
    def _adapters_are_trained_on_quantized_weights(self) -> "TeacherUpdate":
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization: {self.quantization} without lora; weights in 4 bits cannot be trained, only an adapter on "
                "them: set lora: {}, or quantization: null"
            )
        return self

    @model_validator(mode="after")
    def _smoothing_belongs_to_robust(self) -> "TeacherUpdate":
        if (self.loss == "robust") != (self.label_smoothing > 0):
            raise ValueError(
                f"loss: {self.loss} with label_smoothing: {self.label_smoothing:g}; loss: robust needs label_smoothing above "
                "0, such as 0.1, and the other losses have none"
            )
        return self

    @property
    def precomputes_reference(self) -> bool:
        """Whether the teacher before the update reads the pairs before training, and not in every step."""
        return self.lora is None or self.epochs > 1


class Nomad(Optimization):
    """Settings of the method nomad: the teacher's training on whole conversations, and the student's data mixture."""

    learning_rate: float = Field(2e-5, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(128, description="Conversations per optimizer step, over all processes.")
    epochs: Count = Field(2, description="Passes over the data.")
    teacher_examples: Count = Field(
        15_000,
        description="Maximum number of reference examples to train the teacher on, drawn at random. A teacher that saw a "
        "small part of them often writes data that add more to the real examples.",
    )
    mask_prompts: bool = Field(
        False, description="Train the teacher on responses only, as is usual; the paper finds this worse."
    )
    real_share: float = Field(
        0.5,
        ge=0.0,
        lt=1.0,
        description="Share of reference examples in the student's training set, or less if there are not enough.",
    )
    sampling: Sampling = Field(
        Sampling(temperature=1.0, presence_penalty=0.0, max_tokens=2048), description="Decoding of conversations."
    )
    training: Optimization | None = Field(
        None,
        description="Student recipe for this method only (the paper: learning rate 2e-5, batches of 128, 4 epochs). If not "
        "set, the experiment's, which other methods and the students of `transfer` always use.",
    )


class Zero(Section):
    """DeepSpeed ZeRO: memory partitioning for warm-up, student training and teacher update."""

    stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="ZeRO stage: 0 partitions nothing (on GPUs, 1 is taken instead), 1 the optimizer, 2 also gradients, "
        "3 also weights.",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="Keep the optimizer ('optimizer'), or optimizer and weights ('all', stage 3), in host memory. It may "
        "change in a started run: finished trainings are kept, an interrupted one starts again.",
    )

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> "Zero":
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3; set stage, or offload: none")
        if self.offload == "all" and self.stage != 3:
            raise ValueError("offload: all needs stage 3; set stage: 3, or offload: optimizer")
        return self

"""Recipes: warm-up, training of the student, update of the teacher."""

from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Probability, Section
from montessori_core.config.synthesis import Sampling


class Schedule(Section):
    """Learning rate over one training: ramp up, hold, decay (WSD), as shares of all steps."""

    warmup: Probability = Field(0.1, description="Share of the steps that ramp linearly up to the peak rate.")
    stable: Probability = Field(0.5, description="Share of the steps at the peak rate.")
    decay: Probability = Field(0.4, description="Share of the steps that decay linearly to the final rate.")
    final: Probability = Field(0.001, description="Final rate, as a share of the peak.")

    @model_validator(mode="after")
    def _shares_add_up(self) -> "Schedule":
        total = self.warmup + self.stable + self.decay
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"warmup + stable + decay must be 1, not {total:g}: they are shares of all steps")
        return self


class Optimization(Section):
    """What warm-up, student training and the teacher update have in common."""

    learning_rate: float = Field(5e-6, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(32, description="Examples (or pairs) per optimizer step, over all processes.")
    micro_batch_size: Count = Field(2, description="Examples (or pairs) per process and forward pass.")
    epochs: Count = Field(1, description="Passes over the data.")
    schedule: Schedule = Field(Schedule(), description="Course of the learning rate.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW: decay of the first moment.")
    beta2: float = Field(0.999, ge=0.0, lt=1.0, description="AdamW: decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0.0, description="AdamW: term added to the denominator.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW: decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradients are scaled down to this norm; 0 is off.")

    def shared(self) -> "Optimization":
        """What decides a training on given rows: the fields that all recipes have."""
        return Optimization.model_validate(self.model_dump(include=set(Optimization.model_fields)))

    @model_validator(mode="after")
    def _whole_accumulation(self) -> "Optimization":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self


class Warmup(Optimization):
    """Training that warms the student and its AdamW moments before influence is measured."""

    examples: Count = Field(1000, description="Examples in the warm-up set.")
    schedule: Schedule = Field(
        Schedule(warmup=1.0, stable=0.0, decay=0.0),
        description="Course of the learning rate; by default a linear ramp to the peak over the whole warm-up.",
    )


class Training(Optimization):
    """Training of the student, from its first weights, on the updated teacher's data."""

    examples: Count = Field(10_000, description="Examples in the training set.")


class TeacherUpdate(Optimization):
    """Direct preference optimization of the teacher (Eq. 4)."""

    learning_rate: float = Field(1e-6, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(2, description="Preference pairs per optimizer step, over all processes.")
    micro_batch_size: Count = Field(2, description="Preference pairs per process and forward pass.")
    beta: float = Field(0.1, gt=0.0, description="DPO: strength of the pull towards the teacher before.")
    max_length: int = Field(
        2048, ge=64, description="Tokens of prompt and instruction; pairs that are longer are left out and counted."
    )


class Nomad(Optimization):
    """Training of the teacher on whole conversations of the reference set, and the mixture, for the method nomad."""

    learning_rate: float = Field(2e-5, gt=0.0, description="Peak learning rate of AdamW.")
    batch_size: Count = Field(128, description="Conversations per optimizer step, over all processes.")
    epochs: Count = Field(2, description="Passes over the data.")
    teacher_examples: Count = Field(
        15_000,
        description="Most reference examples that the teacher is trained on, drawn at random: a small part often gives data "
        "that adds more to the real ones.",
    )
    mask_prompts: bool = Field(
        False,
        description="Train the teacher on responses alone, as is usual; the paper's finding is that this is worse.",
    )
    real_share: float = Field(
        0.5,
        ge=0.0,
        lt=1.0,
        description="Share of reference examples in the student's training set, as far as there are enough of them.",
    )
    sampling: Sampling = Field(
        Sampling(temperature=1.0, presence_penalty=0.0, max_tokens=2048), description="Decoding of conversations."
    )
    training: Optimization | None = Field(
        None,
        description="Recipe of the student for this method alone (the paper: learning rate 2e-5, batches of 128, 4 epochs); "
        "none takes the experiment's, as all methods do, and as the students of `transfer` do in any case.",
    )


class Zero(Section):
    """DeepSpeed's memory partitioning for warm-up, student training and teacher update."""

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO stage: 0 none, 1 optimizer, 2 and gradients, 3 and weights partitioned."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="Keep the optimizer, or optimizer and weights (stage 3), in host memory."
    )

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> "Zero":
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3; set stage, or offload: none")
        if self.offload == "all" and self.stage != 3:
            raise ValueError("offload: all needs stage 3; set stage: 3, or offload: optimizer")
        return self

"""Train the warm student on subsets of the examples, one after the other, to check what influence predicts.

The student is loaded once. Before each training its weights and AdamW's moments are those after the warm-up, so that the
result of a training does not depend on earlier ones.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from montessori_core import programs
from montessori_core.config import Optimization
from montessori_core.data.rows import SubsetRow
from montessori_core.data.sources import load_tasks
from montessori_core.data.tables import RETRAINING
from montessori_core.errors import DataError
from montessori_core.influence.losses import TokenLosses
from montessori_core.influence.reference import ReferenceSet, open_reference
from montessori_core.models.chat import Encoded
from montessori_core.models.device import check_memory, compute_device
from montessori_core.models.examples import encode_task
from montessori_core.models.load import load_with_tokenizer
from montessori_core.program import Recorder, Report, RowProgram
from montessori_core.training.moments import Moments, cold_moments, load_moments
from montessori_core.training.schedule import rate_factor


def open_retraining(settings: programs.Retraining, inputs: Mapping[str, Path]) -> RowProgram[SubsetRow]:
    """Load the warm student, its moments, the examples and the reference set once.

    Inputs: `student`; `moments`, a folder with AdamW's moments, without which a training begins with AdamW's first step;
    `examples` and `reference` (tasks). The result is a table of schema `RETRAINING`.
    """
    device = compute_device()
    tokenizer, model = load_with_tokenizer(str(inputs["student"]), torch.float32)
    moments = load_moments(inputs["moments"]) if "moments" in inputs else cold_moments(model)
    check_memory(model.to(device), 20, "training a student on subsets")  # fp32: gradient, moments, a temporary of AdamW
    student = WarmStudent(model, moments, settings.recipe, settings.mixed, settings.batch_tokens)
    tasks = load_tasks(inputs["examples"])
    reference = open_reference(tokenizer, inputs["reference"], settings.max_length, settings.batch_tokens, device)

    @cache
    def encode(position: int) -> Encoded:
        return encode_task(tokenizer, tasks[position], settings.max_length)

    def compute(rows: list[SubsetRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for number, row in enumerate(rows):
            batches = [[encode(position) for position in batch] for batch in row["batches"]]
            steps = student.train(batches, lambda share, number=number: recorder.progress(number + share))  # type: ignore[misc]
            loss = reference.evaluate(student.losses).reduce(settings.reference_reduction)
            student.restore()
            if not math.isfinite(loss):
                raise DataError(
                    f"{inputs['student']}: the training {row['training_id']} on a subset of the examples diverged (the "
                    "reference loss is not finite after it); lower --learning-rate"
                )
            record = {
                "training_id": row["training_id"],
                "example_ids": [tasks[position].example_id for batch in row["batches"] for position in batch],
                "steps": steps,
                "response_tokens": sum(example.response_tokens for batch in batches for example in batch),
                "reference_loss": loss,
            }
            recorder.finish(number, [record])
            recorder.progress(number + 1)

    return RowProgram(RETRAINING, compute)


class WarmStudent:
    """A student that is trained from its warm state, again and again.

    Attributes:
        losses: token losses of the model with its current weights.
    """

    def __init__(self, model: Any, moments: Moments, recipe: Optimization, mixed: bool, batch_tokens: int) -> None:
        """Copy the warm weights to host memory.

        Args:
            model: the fp32 model, on its device; weights without `requires_grad` (the base of a LoRA student) are fixed.
            moments: AdamW's moments of the trained weights.
            recipe: recipe of the training.
            mixed: run forward and backward passes in bf16; the weights are fp32.
            batch_tokens: tokens of a forward pass, including padding.
        """
        self.losses = TokenLosses(model.eval())
        self._moments, self._recipe, self._mixed, self._batch_tokens = moments, recipe, mixed, batch_tokens
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._weights = {name: p.detach().cpu().clone() for name, p in self._parameters.items()}
        self._device = next(iter(self._parameters.values())).device

    def train(self, batches: Sequence[Sequence[Encoded]], report: Report = lambda share: None) -> int:
        """Train on the batches, in their order in each epoch; return the number of steps.

        As in the pipeline, the loss is the mean over a batch's response tokens, and gradients are clipped.

        Args:
            batches: examples of each step of an epoch.
            report: called with the share of the steps done.
        """
        recipe, optimizer = self._recipe, self._new_optimizer()
        steps = recipe.epochs * len(batches)
        for step in range(steps):
            batch = batches[step % len(batches)]
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate_factor(step, steps, recipe.schedule)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
                examples = ReferenceSet(batch, self._batch_tokens, self._device)
                examples.backward(self.losses, "token", range(len(batch)))
            if recipe.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self._parameters.values(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            report((step + 1) / steps)
        return steps

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the warm weights, bit for bit."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._weights[name])

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with the warm moments."""
        recipe, moments = self._recipe, self._moments
        optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
        )
        for name, parameter in self._parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.first[name].to(self._device, copy=True),
                "exp_avg_sq": moments.second[name].to(self._device, copy=True),
            }
        return optimizer

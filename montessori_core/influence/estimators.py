"""The influence meter: a resident student that measures one example after another.

Weights, moments and reference set are loaded once. Taking a step leaves the moments alone; restoring the weights copies a
snapshot, so the student is bit-identical after any number of examples, and an example's influence cannot depend on
those measured before it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from montessori_core.chat import Encoded
from montessori_core.errors import DataError
from montessori_core.influence.adamw import AdamW
from montessori_core.influence.reference import Loss, ReferenceSet, example_loss, influence_of
from montessori_core.training.moments import Moments


@dataclass(frozen=True)
class Measurement:
    """What was measured for one example; None where nothing could be.

    Attributes:
        status: 'ok', 'no_response_tokens' or 'non_finite'.
        example_loss: the student's mean loss on the response, nats per token.
        influence_student: against the student, nats; positive = helps.
        influence_null_step: against the null step, nats.
        standard_error: of influence_null_step over the reference examples, nats.
    """

    status: str
    example_loss: float | None = None
    influence_student: float | None = None
    influence_null_step: float | None = None
    standard_error: float | None = None


class InfluenceMeter:
    """Measures influence on one student and one reference set."""

    def __init__(
        self,
        model: Any,
        moments: Moments,
        adamw: AdamW,
        reference: ReferenceSet,
        device: torch.device,
        estimator: str = "exact",
        reduction: str = "example",
    ) -> None:
        """Take over `model` (already on `device`, in the precision the steps are to be taken in).

        Raises:
            DataError: the moments are of another model.
        """
        self._model, self._adamw, self._reference, self._device = model.eval(), adamw, reference, device
        self._estimator, self._reduction = estimator, reduction
        self._parameters = dict(model.named_parameters())
        self._first, self._second = _on_device(moments, self._parameters, device)
        self._snapshot = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.student_loss: Loss = reference.evaluate(model)
        self._take_step(gradient=False)
        self.null_step_loss: Loss = reference.evaluate(model)
        self.null_step_influence, _ = influence_of(self.student_loss, self.null_step_loss, reduction)
        if estimator == "first_order":
            reference.accumulate_gradient(model, reduction)
            self._reference_gradient = {name: p.grad.detach().clone() for name, p in self._parameters.items()}
            self._null_weights = {name: p.detach().clone() for name, p in self._parameters.items()}
            self._model.zero_grad(set_to_none=True)
        self._restore()
        repeat = reference.evaluate(model)
        self.noise_floor = abs(self.student_loss.reduce(reduction) - repeat.reduce(reduction))
        """Spread of repeated evaluations of the same student, nats; 0 where arithmetic is deterministic."""

    def measure(self, example: Encoded) -> Measurement:
        """Measure one example; the student is afterwards what it was before."""
        if example.response_tokens == 0:
            return Measurement("no_response_tokens")
        loss = example_loss(self._model, example, self._device)
        value = float(loss.detach())
        if not math.isfinite(value):
            return Measurement("non_finite")
        loss.backward()
        self._take_step(gradient=True)
        if self._estimator == "first_order":
            student, null_step, error = *self._project(), None
        else:
            stepped = self._reference.evaluate(self._model)
            student, _ = influence_of(self.student_loss, stepped, self._reduction)
            null_step, error = influence_of(self.null_step_loss, stepped, self._reduction)
        self._restore()
        if not math.isfinite(student):
            return Measurement("non_finite", value)
        return Measurement("ok", value, student, null_step, error)

    @torch.no_grad()
    def _take_step(self, gradient: bool) -> None:
        for name, parameter in self._parameters.items():
            slope = parameter.grad if gradient else None
            self._adamw.stepped_(parameter, slope, self._first[name], self._second[name])
            parameter.grad = None

    @torch.no_grad()
    def _restore(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._snapshot[name])

    @torch.no_grad()
    def _project(self) -> tuple[float, float]:
        """Centred first order: -<gradient of the reference loss at the null step, stepped - null step>."""
        null_step = 0.0
        for name, parameter in self._parameters.items():
            moved = parameter - self._null_weights[name]
            null_step -= float((self._reference_gradient[name] * moved).sum(dtype=torch.float64))
        return self.null_step_influence + null_step, null_step


def _on_device(
    moments: Moments, parameters: dict[str, Any], device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    unknown = sorted(set(parameters) ^ set(moments.first))
    wrong = [n for n, p in parameters.items() if n in moments.first and moments.first[n].shape != p.shape]
    if unknown or wrong:
        raise DataError(
            f"the AdamW moments are of another model: {len(unknown)} parameters have no counterpart (e.g. {unknown[:2]}), "
            f"{len(wrong)} differ in shape; use the moments that were saved with this student"
        )
    return tuple(  # type: ignore[return-value]
        {name: tensors[name].to(device, parameter.dtype) for name, parameter in parameters.items()}
        for tensors in (moments.first, moments.second)
    )

"""The influence meter: a resident student that measures one example after another.

*Exact* takes the step, evaluates the reference set, and restores the student. *First order* takes no step: around the null
step m0 the reference loss is linear in what an example adds to it,

    influence(z) = [L(m) - L(m0)] - <gradient of L at m0, step(z) - null step>,

so that one gradient of the reference set serves every example; that of a random half of the set gives the standard error.
An example's influence depends on student, moments and reference set alone: never on its neighbours, on what was measured
before, or on how the work was cut.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from montessori_core.errors import DataError
from montessori_core.influence.losses import make_batch
from montessori_core.influence.reference import (
    Loss,
    ReferenceSet,
    error_by_halves,
    influence_by_example,
    influence_of,
    rounding_noise,
)
from montessori_core.influence.sequential import SequentialReference
from montessori_core.influence.student import ResidentStudent
from montessori_core.models.chat import Encoded
from montessori_core.program import Report


@dataclass(frozen=True)
class Measurement:
    """What was measured for one example; None where nothing could be.

    Attributes:
        status: 'ok', 'no_response_tokens' or 'non_finite'.
        example_loss: the student's mean loss on the response, nats per token.
        influence_student: against the student, nats; positive = helps.
        influence_null_step: against the null step, nats.
        standard_error: of influence_null_step over the reference examples, nats. Exact: from all of them; first order: from
            two halves, so that one says little and the root mean square of many is to be taken.
        reference_tokens: tokens of the reference set that were read for this example.
        gradient_norm: of the example's gradient, unweighted.
        dominated_share: of the coordinates, those in which the example's weighted gradient decides AdamW's denominator.
    """

    status: str
    example_loss: float | None = None
    influence_student: float | None = None
    influence_null_step: float | None = None
    standard_error: float | None = None
    reference_tokens: int = 0
    gradient_norm: float | None = None
    dominated_share: float | None = None


class InfluenceMeter:
    """Measures influence on one student and one reference set.

    Attributes:
        student_loss: of the reference set, before any step.
        null_step_loss: after the null step.
        null_step_influence: of momentum alone, nats.
        noise_floor: two standard deviations of what rounding adds to an exact influence, nats.
        reference_gradient: gradient of the reference loss at the null step, by parameter; None for the exact estimator.
    """

    def __init__(
        self,
        student: ResidentStudent,
        reference: ReferenceSet,
        estimator: Literal["exact", "first_order"] = "exact",
        reduction: str = "example",
        sequential: SequentialReference | None = None,
        baseline: Literal["student", "null_step"] = "student",
    ) -> None:
        """Evaluate the student and its null step.

        Args:
            student: left as it is after every measurement.
            reference: the reference set.
            estimator: see the module.
            reduction: of the reference loss, 'example' or 'token'.
            sequential: stop reading the reference set once the sign is decided; none reads it to its end.
            baseline: whose sign that is.

        Raises:
            DataError: the student's loss on the reference set is not finite.
        """
        self._student, self._reference = student, reference
        self._reduction, self._sequential, self._baseline = reduction, sequential, baseline
        self.student_loss: Loss = reference.evaluate(student.losses)
        if not self.student_loss.summed.isfinite().all():
            broken = (~self.student_loss.summed.isfinite()).nonzero()[:, 0].tolist()
            raise DataError(
                f"the student's loss is not finite on {len(broken)} of {len(reference)} reference examples, the first of "
                f"them number {broken[0] + 1}; a student that diverged cannot be measured: lower the warm-up's learning rate"
            )
        student.perturb()
        self.noise_floor = rounding_noise(self.student_loss, reference.evaluate(student.losses), reduction)
        student.restore()
        student.take_null_step()
        self.null_step_loss: Loss = reference.evaluate(student.losses)
        self.null_step_influence, _ = influence_of(self.student_loss, self.null_step_loss, reduction)
        self.reference_gradient: dict[str, torch.Tensor] | None = None
        if estimator == "first_order":
            self.reference_gradient, self._half_gradient = self._reference_gradients()
            self._null_projections = student.project_null_step([self.reference_gradient, self._half_gradient])
        student.restore()
        if estimator == "first_order":
            student.drop_snapshot()

    def measure(self, example: Encoded, report: Report = lambda share: None) -> Measurement:
        """Measure one example; the student is afterwards what it was before.

        Args:
            example: to measure.
            report: called with the share of the reference set that was read, where all of it is.
        """
        if example.response_tokens == 0:
            return Measurement("no_response_tokens")
        if self.reference_gradient is not None:
            return self._measure_first_order(example, self.reference_gradient)
        return self._measure_exactly(example, lambda done: report(done / len(self._reference)))

    def _measure_first_order(self, example: Encoded, gradient: dict[str, torch.Tensor]) -> Measurement:
        batch = make_batch([(0, example)], self._student.device)
        own, projections = self._student.project_step(batch, [gradient, self._half_gradient])
        if not all(map(math.isfinite, projections)):
            return Measurement("non_finite", own.loss if math.isfinite(own.loss) else None)
        null_step, first_half = (null - at for null, at in zip(self._null_projections, projections, strict=True))
        return Measurement(
            "ok",
            own.loss,
            self.null_step_influence + null_step,
            null_step,
            error_by_halves(first_half, null_step - first_half, self._halves),
            gradient_norm=own.norm,
            dominated_share=own.dominated_share,
        )

    def _reference_gradients(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The gradient of the reference loss where the student stands, and what the first half of the set adds to it."""
        student, reference = self._student, self._reference
        first, second = reference.halves()
        self._halves = len(first), len(second)
        gradient = student.gradient_of(lambda: reference.backward(student.losses, self._reduction, first))
        half = student.halve(gradient)
        student.gradient_of(lambda: reference.backward(student.losses, self._reduction, second), onto=gradient)
        return gradient, half

    def _measure_exactly(self, example: Encoded, report: Report) -> Measurement:
        own = self._student.take_step(make_batch([(0, example)], self._student.device))
        if not math.isfinite(own.loss):
            return Measurement("non_finite")
        seen: list[int] | None = None
        if self._sequential is None:
            stepped, tokens = self._reference.evaluate(self._student.losses, report), self._reference.input_tokens
        else:
            stepped, seen, tokens = self._sequential.evaluate(self._student.losses, self._differences)
        self._student.restore()
        before, null_step = self.student_loss, self.null_step_loss
        if seen is not None:
            before, null_step = before.of(seen), null_step.of(seen)
        against_student, _ = influence_of(before, stepped, self._reduction)
        against_null_step, error = influence_of(null_step, stepped, self._reduction)
        if not math.isfinite(against_student):
            return Measurement("non_finite", own.loss, reference_tokens=tokens)
        return Measurement(
            "ok", own.loss, against_student, against_null_step, error, tokens, own.norm, own.dominated_share
        )

    def _differences(self, stepped: Loss, seen: Any) -> torch.Tensor:
        before = self.student_loss if self._baseline == "student" else self.null_step_loss
        return influence_by_example(before.of(seen), stepped, self._reduction)

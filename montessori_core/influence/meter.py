"""The influence meter measures examples one by one on a resident student.

*Exact* takes the step, evaluates the reference set, and restores the student. *First order* takes no step; it linearises
the reference loss around the null step m0:

    influence(z) = [L(m) - L(m0)] - <gradient of L at m0, step(z) - null step>.

One gradient of the reference set serves all examples; the gradient of a random half of it gives the standard error.
An example's influence depends on student, moments and reference set alone: not on other examples, order or shards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from montessori_core.influence.losses import make_batch
from montessori_core.influence.projections import AlongDirections
from montessori_core.influence.reference import Loss, ReferenceSet, influence_by_example, influence_of
from montessori_core.influence.reference_state import ReferenceGradient, ReferenceState, shared_state
from montessori_core.influence.sequential import SequentialReference
from montessori_core.influence.student import ExampleGradient, ResidentStudent
from montessori_core.influence.table import error_by_halves
from montessori_core.models.chat import Encoded
from montessori_core.program import Report


@dataclass(frozen=True)
class Measurement:
    """The measurement of one example; None marks values that could not be measured.

    Attributes:
        status: 'ok', 'no_response_tokens' or 'non_finite'.
        example_loss: the student's mean loss on the response, nats per token.
        influence_student: influence against the student, nats; positive = helps.
        influence_null_step: influence against the null step, nats.
        standard_error: standard error of influence_null_step over the reference examples, nats. Exact: from all examples.
            First order: from two halves; take the root mean square over many rows, a single value is very noisy.
        reference_tokens: tokens of the reference set that were read for this example.
        gradient_norm: norm of the example's unweighted gradient.
        dominated_share: share of the coordinates in which the weighted gradient dominates AdamW's denominator.
    """

    status: str
    example_loss: float | None = None
    influence_student: float | None = None
    influence_null_step: float | None = None
    standard_error: float | None = None
    reference_tokens: int = 0
    gradient_norm: float | None = None
    dominated_share: float | None = None


def measured_by_halves(
    loss: float, against_null_step: float, first_half: float, null_step_influence: float, references: int
) -> Measurement:
    """Return the measurement of an example whose influence is known on the reference set and on its first half.

    Args:
        loss: the student's mean loss on the response.
        against_null_step, first_half: influence against the null step, and the contribution of the first half.
        null_step_influence: influence of the null step.
        references: number of reference examples.
    """
    sizes = references // 2, references - references // 2
    error = error_by_halves(first_half, against_null_step - first_half, sizes)
    return Measurement("ok", loss, null_step_influence + against_null_step, against_null_step, error)


@dataclass(frozen=True)
class FirstOrder:
    """First-order influence on one reference set, from projections of steps on its gradient.

    Attributes:
        student_loss: reference loss before any step.
        null_step_influence: influence of the null step, nats.
        noise_floor: two standard deviations of the rounding noise of an exact influence, nats.
        gradient: gradient of the reference loss at the null step.
        references: number of reference examples.
    """

    student_loss: Loss
    null_step_influence: float
    noise_floor: float
    gradient: ReferenceGradient
    references: int

    @staticmethod
    def of(student: ResidentStudent, state: ReferenceState, reduction: str, references: int) -> "FirstOrder":
        """Move the gradient of a reference set to where it stays, see `ResidentStudent.settle`."""
        assert state.gradient is not None
        student.settle(state.gradient.full, "reference gradient")
        student.settle(state.gradient.half, "half gradient")
        influence, _ = influence_of(state.student_loss, state.null_step_loss, reduction)
        return FirstOrder(state.student_loss, influence, state.noise_floor, state.gradient, references)

    def measurement(self, step: ExampleGradient, projections: Sequence[float]) -> Measurement:
        """Return the measurement of an example.

        Args:
            step: about its step.
            projections: of the step on the gradient and on that of a half, see `ReferenceGradient`.
        """
        if not all(map(math.isfinite, projections)):
            return Measurement("non_finite", step.loss if math.isfinite(step.loss) else None)
        against_null_step, first_half = (
            null - projection for null, projection in zip(self.gradient.null_projections, projections, strict=True)
        )
        measured = measured_by_halves(
            step.loss, against_null_step, first_half, self.null_step_influence, self.references
        )
        return replace(measured, gradient_norm=step.norm, dominated_share=step.dominated_share)


def measure_together(
    student: ResidentStudent, targets: Sequence[FirstOrder], examples: Sequence[Encoded]
) -> list[list[Measurement]]:
    """Measure examples to first order; return the measurements of each, one per reference set.

    A measurement has the same bits with other examples and with other reference sets.
    """
    measured = [example for example in examples if example.response_tokens]
    batches = [make_batch([(0, example)], student.device) for example in measured]
    along = AlongDirections([part for target in targets for part in (target.gradient.full, target.gradient.half)])
    steps = iter(student.project_steps(batches, along))
    results = []
    for example in examples:
        if not example.response_tokens:
            results.append([Measurement("no_response_tokens")] * len(targets))
            continue
        step, projected = next(steps)
        pairs = zip(targets, projected.view(-1, 2).tolist(), strict=True)
        results.append([target.measurement(step, pair) for target, pair in pairs])
    return results


class InfluenceMeter:
    """Measure influence on one student and one reference set.

    Attributes:
        student_loss: reference loss before any step.
        null_step_loss: reference loss after the null step.
        null_step_influence: influence of the null step, nats.
        noise_floor: two standard deviations of the rounding noise of an exact influence, nats.
        reference_gradient: gradient of the reference loss at the null step; None for the exact estimator.
    """

    def __init__(
        self,
        student: ResidentStudent,
        reference: ReferenceSet,
        estimator: Literal["exact", "first_order"] = "exact",
        reduction: str = "example",
        sequential: SequentialReference | None = None,
        baseline: Literal["student", "null_step"] = "student",
        shared: Path | None = None,
    ) -> None:
        """Evaluate the student and its null step, unless another worker has.

        Args:
            student: the student; restored after every measurement.
            reference: the reference set.
            estimator: see the module.
            reduction: reduction of the reference loss, 'example' or 'token'.
            sequential: stop reading the reference set once the sign is decided; None always reads all of it.
            baseline: the baseline of that sign.
            shared: folder of workers with the same student, reference set and settings, see `shared_state`.

        Raises:
            DataError: the student's loss on the reference set is not finite.
        """
        self._student, self._reference = student, reference
        self._first_order: FirstOrder | None = None
        self._reduction, self._sequential, self._baseline = reduction, sequential, baseline
        measure = partial(ReferenceState.measure, student, reference, estimator, reduction)
        state = shared_state(shared, student.place, measure) if shared else measure()
        self.student_loss, self.null_step_loss = state.student_loss, state.null_step_loss
        self.noise_floor, self.reference_gradient = state.noise_floor, state.gradient
        self.null_step_influence, _ = influence_of(self.student_loss, self.null_step_loss, reduction)
        if state.gradient is not None:
            student.end_steps()
            self._first_order = FirstOrder.of(student, state, reduction, len(reference))

    def measure(self, example: Encoded, report: Report = lambda share: None) -> Measurement:
        """Measure one example and restore the student.

        Args:
            example: the example.
            report: called with the share of the reference set read so far, unless evaluation is sequential.
        """
        if example.response_tokens == 0:
            return Measurement("no_response_tokens")
        if self.reference_gradient is not None:
            return self.measure_batch([example])[0]
        return self._measure_exactly(example, lambda done: report(done / len(self._reference)))

    def measure_batch(self, examples: Sequence[Encoded]) -> list[Measurement]:
        """Measure examples to first order; AdamW's state and the reference gradient are read once for all of them.

        Each result is the same to the last bit as that of `measure`. The memory is that of the factors of all gradients, see
        `FactoredGradient`: that of a backward pass over all tokens at most.
        """
        if self._first_order is None:
            raise ValueError("measure_batch needs a meter with estimator='first_order'")
        return [of_targets[0] for of_targets in measure_together(self._student, [self._first_order], examples)]

    def _measure_exactly(self, example: Encoded, report: Report) -> Measurement:
        step = self._student.take_step(make_batch([(0, example)], self._student.device))
        if not math.isfinite(step.loss):
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
        if seen is not None and len(seen) < len(self._reference):
            # The test decides the difference from its baseline; the other threshold is known on the full set alone.
            if self._baseline == "student":
                against_null_step = against_student - self.null_step_influence
            else:
                against_student = self.null_step_influence + against_null_step
        if not math.isfinite(against_student):
            return Measurement("non_finite", step.loss, reference_tokens=tokens)
        return Measurement(
            "ok", step.loss, against_student, against_null_step, error, tokens, step.norm, step.dominated_share
        )

    def _differences(self, stepped: Loss, seen: Sequence[int]) -> torch.Tensor:
        before = self.student_loss if self._baseline == "student" else self.null_step_loss
        return influence_by_example(before.of(seen), stepped, self._reduction)

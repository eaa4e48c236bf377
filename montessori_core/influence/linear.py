"""The linear meter: first-order influence, for steps that are linear in the example's gradient, too.

A training batch of 32 gives an example a weight of 1/32. Its gradient then hardly changes AdamW's denominator, and the step
is nearly linear in it:

    influence(z) = [L(m) - L(m0)] + <u, gradient of the example's loss>,

where u is the gradient of the reference loss at the null step m0, divided by the denominator of a typical example. u is the
same for all examples: one pass over a batch measures all of them, without moments, weight gradients or steps. Only on the
rows of an example's own tokens the step is AdamW's, see `token_rows`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from montessori_core.influence.derivatives import ExampleDerivatives, InseparableError
from montessori_core.influence.gradients import pass_gradients_to
from montessori_core.influence.losses import TokenLosses, group_by_length, make_batch
from montessori_core.influence.meter import Measurement, measured_by_halves
from montessori_core.influence.projections import as_matrix
from montessori_core.influence.reference import ReferenceSet, influence_of
from montessori_core.influence.reference_state import ReferenceState, shared_state
from montessori_core.influence.student import ResidentStudent
from montessori_core.influence.token_rows import TokenRows
from montessori_core.models.chat import Encoded
from montessori_core.models.linear_layers import cast_linear_layers_

log = logging.getLogger(__name__)


class LinearMeter:
    """Measure influence to first order with a linear step.

    Attributes:
        student_loss: reference loss before any step.
        null_step_influence: influence of the null step, nats.
        noise_floor: two standard deviations of the rounding noise of an exact influence, nats.
    """

    def __init__(
        self,
        model: Any,
        open_student: Callable[[], ResidentStudent],
        reference: ReferenceSet,
        reduction: str = "example",
        mixed: bool = False,
        typical_tokens: float | None = None,
        shared: Path | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        """Read what other workers measured on the reference set, or measure it.

        Args:
            model: the student.
            open_student: returns the student with its moments, for the first worker alone.
            reference: the reference set; a batch of examples has as many tokens as one of it.
            reduction: reduction of the reference loss, 'example' or 'token'.
            mixed: compute the example's derivatives with bf16 activations; directions and linear layers are in bf16.
            typical_tokens: see `ResidentStudent`.
            shared: folder of workers with the same student, reference set and settings, see `shared_state`.
            state_dtype: what directions and rows of tokens are kept in. None: that of the weights, or bf16 if `mixed`.

        Raises:
            DataError: the student's loss on the reference set is not finite.
        """
        self._reference, self._mixed, self._typical_tokens = reference, mixed, typical_tokens
        self._device = next(model.parameters()).device
        self._losses = TokenLosses(model.eval())
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def measure() -> ReferenceState:
            return ReferenceState.measure(open_student(), reference, "linear", reduction)

        state = shared_state(shared, lambda gradient, *_: gradient, measure) if shared else measure()
        self.student_loss, self.noise_floor = state.student_loss, state.noise_floor
        self.null_step_influence, _ = influence_of(state.student_loss, state.null_step_loss, reduction)
        assert state.gradient is not None
        if mixed:
            cast_linear_layers_(model)
        dtype = state_dtype or (torch.bfloat16 if mixed else next(model.parameters()).dtype)
        parts = state.gradient.full, state.gradient.half
        self._directions = {
            name: [as_matrix(part.pop(name)).to(self._device, dtype) for part in parts] for name in self._parameters
        }
        self._token_rows = {name: rows.to(self._device, dtype) for name, rows in state.gradient.rows.items()}
        self._separable = True

    def batches(self, examples: Sequence[Encoded]) -> list[list[int]]:
        """Return the indices of the examples of each batch: examples of similar length."""
        lengths = [len(example.input_ids) for example in examples]
        return group_by_length(lengths, range(len(examples)), self._reference.batch_tokens)

    def measure_batch(self, examples: Sequence[Encoded]) -> list[Measurement]:
        """Measure examples in one pass; others change a result by rounding error only.

        One by one if the model has a layer that does not tell the examples of a batch from each other.
        """
        measured = [example for example in examples if example.response_tokens]
        results: list[Measurement] = []
        if self._separable and measured:
            try:
                results = self._measure(measured)
            except InseparableError as error:
                log.warning(
                    "examples are measured one by one, which takes longer: %s is used for all of a batch", error
                )
                self._separable = False
        if not results:
            results = [result for example in measured for result in self._measure([example])]
        ordered = iter(results)
        return [next(ordered) if example.response_tokens else Measurement("no_response_tokens") for example in examples]

    def _measure(self, examples: Sequence[Encoded]) -> list[Measurement]:
        batch = make_batch(list(enumerate(examples)), self._device)
        derivatives = ExampleDerivatives(self._parameters, self._directions, batch, 2, self._token_rows)
        with derivatives, torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            tokens = torch.bincount(batch.rows, minlength=len(examples))
            losses = self._losses(batch, derivatives, derivatives.projecting)
            by_example = torch.zeros_like(tokens, dtype=losses.dtype).index_add(0, batch.rows, losses) / tokens
        with pass_gradients_to(lambda name, _, gradient: derivatives.add_gradient(name, gradient), self._parameters):
            by_example.sum().backward()
        typical = self._typical_tokens
        weights = torch.ones_like(tokens) if typical is None else tokens / typical
        with torch.no_grad():
            totals = derivatives.totals * weights[:, None]
            for name, rows in self._token_rows.items():
                for number, gradient in enumerate(derivatives.rows[name]):
                    totals[number] += self._beyond_linear(
                        name, rows, derivatives.tokens[number], gradient * weights[number]
                    )
        return [
            self._result(loss, *against) for loss, against in zip(by_example.tolist(), totals.tolist(), strict=True)
        ]

    def _beyond_linear(self, name: str, rows: TokenRows, tokens: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return [directions] what the step on an example's own rows adds to the linear one."""
        linear = [
            (direction[tokens].float() * gradient).sum(dtype=torch.float64) for direction in self._directions[name]
        ]
        return rows.influence(tokens, gradient) - torch.stack(linear)

    def _result(self, loss: float, against_null_step: float, first_half: float) -> Measurement:
        if not math.isfinite(loss) or not math.isfinite(against_null_step):
            return Measurement("non_finite", loss if math.isfinite(loss) else None)
        return measured_by_halves(loss, against_null_step, first_half, self.null_step_influence, len(self._reference))

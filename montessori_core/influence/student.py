"""The resident student: loaded once; takes a step on each example and restores its weights.

The backward pass frees each gradient once it is used. Resident are the weights, the moments and, for exact influence, a
snapshot of the weights. Moments, snapshot and reference gradients may be in host memory and are then copied to the device
chunk by chunk (`montessori plan` shows which).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from montessori_core.errors import DataError
from montessori_core.influence.adamw import AdamW, GradientTally
from montessori_core.influence.losses import Batch, TokenLosses, example_loss
from montessori_core.training.moments import Moments, number_type, weights_checksums

Home = Literal["device", "host"]
Direction = Mapping[str, torch.Tensor]
Placement = Mapping[str, Home]
"""Home of 'moments', 'snapshot', 'reference gradient' and 'half gradient'."""

ON_DEVICE: Placement = {
    "moments": "device",
    "snapshot": "device",
    "reference gradient": "device",
    "half gradient": "device",
}


@dataclass(frozen=True)
class ExampleGradient:
    """Loss and gradient statistics of an example; norm and share have no meaning if the loss is not finite.

    Attributes:
        loss: loss before the step, nats per token.
        norm: norm of the unweighted gradient.
        dominated_share: share of the coordinates in which the weighted gradient dominates AdamW's denominator.
    """

    loss: float
    norm: float
    dominated_share: float


class ResidentStudent:
    """A model with its moments, from which it takes single steps.

    Attributes:
        losses: token losses of the model with its current weights.
        device: device of the model.
        parameters: trained parameters, by name.
    """

    def __init__(
        self,
        model: Any,
        moments: Moments,
        adamw: AdamW,
        device: torch.device,
        mixed: bool = False,
        placement: Placement = ON_DEVICE,
    ) -> None:
        """Take over `model`, which is on `device` and has the dtype of the steps.

        Args:
            model: the model; weights without `requires_grad` (the base of a LoRA student) are not trained.
            moments: moments of the trained parameters.
            adamw: the step.
            device: device of the model.
            mixed: compute the example's gradient with bf16 activations; weights and reference losses keep their dtype.
            placement: home of moments, snapshot and gradients.

        Raises:
            DataError: the moments belong to another model.
        """
        self.device, self.losses = device, TokenLosses(model.eval())
        self._adamw, self._mixed, self._placement = adamw, mixed, placement
        self.parameters: dict[str, torch.nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        _check_moments(moments, self.parameters)
        self._first, self._second = (
            {name: self._stored(tensors[name].to(p.dtype), "moments") for name, p in self.parameters.items()}
            for tensors in (moments.first, moments.second)
        )
        self._snapshot = {name: self._stored(p.detach().clone(), "snapshot") for name, p in self.parameters.items()}
        self._coordinates = sum(p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def take_null_step(self) -> None:
        """Update the weights by a step with a zero gradient: momentum alone."""
        for name, parameter in self.parameters.items():
            self._step(name, parameter, None)

    def take_step(self, batch: Batch) -> ExampleGradient:
        """Update the weights by one step on an example, unless its loss is not finite."""
        return self._backward(batch, self._step)

    def perturb(self) -> None:
        """Perturb the weights by their rounding error, see `perturb_weights`."""
        perturb_weights(self.parameters)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights from the snapshot, bit for bit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._snapshot[name], non_blocking=True)

    def project_step(self, batch: Batch, directions: Sequence[Direction]) -> tuple[ExampleGradient, list[float]]:
        """Return gradient statistics of the example, and <direction, step> of each direction, without taking the step.

        Args:
            batch: the example.
            directions: tensors by parameter name.
        """
        projections: list[list[float]] = []

        def project(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor, tally: GradientTally) -> None:
            projections.append(self._project(name, directions, gradient, tally))

        gradient = self._backward(batch, project)
        return gradient, _sum_projections(projections, len(directions))

    @torch.no_grad()
    def project_null_step(self, directions: Sequence[Direction]) -> list[float]:
        """Return <direction, null step> of each direction."""
        projections = [self._project(name, directions, None) for name in self.parameters]
        return _sum_projections(projections, len(directions))

    def gradient_of(
        self, accumulate: Callable[[], None], onto: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the sum of the gradients of all backward passes that `accumulate` runs, by parameter name.

        Args:
            accumulate: runs the backward passes.
            onto: gradients to add to, in place; None starts from zero.
        """
        total = onto or {
            name: self._stored(torch.zeros_like(p), "reference gradient") for name, p in self.parameters.items()
        }

        def add(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
            total[name] += gradient.to(total[name].device)

        with _pass_gradients_to(add, self.parameters):
            accumulate()
        return total

    @torch.no_grad()
    def copy_in_bf16(self, gradients: Direction) -> dict[str, torch.Tensor]:
        """Return a copy of gradients in bf16, which is precise enough for a standard error."""
        return {
            name: self._stored(gradient.to(torch.bfloat16, copy=True), "half gradient")
            for name, gradient in gradients.items()
        }

    def drop_snapshot(self) -> None:
        """Free the snapshot. The student can take no further step."""
        self._snapshot.clear()

    def _backward(
        self, batch: Batch, use: Callable[[str, torch.nn.Parameter, torch.Tensor, GradientTally], None]
    ) -> ExampleGradient:
        tally = GradientTally()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed):
            loss = example_loss(self.losses, batch)
        value = float(loss.detach())
        if math.isfinite(value):
            with_gradient: set[str] = set()

            def use_gradient(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
                with_gradient.add(name)
                use(name, parameter, gradient, tally)

            with _pass_gradients_to(use_gradient, self.parameters):
                loss.backward()
            # An expert that gets no token has no gradient. In a training batch other examples reach it, and the null step
            # updates it as well; so its momentum counts.
            with torch.no_grad():
                for name in self.parameters.keys() - with_gradient:
                    use(name, self.parameters[name], torch.zeros_like(self.parameters[name]), tally)
        return ExampleGradient(value, tally.norm, tally.dominated / self._coordinates)

    def _step(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        gradient: torch.Tensor | None,
        tally: GradientTally | None = None,
    ) -> None:
        self._adamw.step_(parameter, gradient, self._first[name], self._second[name], tally)

    def _project(
        self,
        name: str,
        directions: Sequence[Direction],
        gradient: torch.Tensor | None,
        tally: GradientTally | None = None,
    ) -> list[float]:
        parts = [direction[name] for direction in directions]
        return self._adamw.project(parts, gradient, self._first[name], self._second[name], self.device, tally)

    def _stored(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        tensor = tensor.contiguous()
        if self._placement[kind] == "device":
            return tensor.to(self.device)
        on_host = tensor.cpu()
        return on_host.pin_memory() if self.device.type == "cuda" else on_host


def _sum_projections(projections: Sequence[Sequence[float]], count: int) -> list[float]:
    """Return [count] sums of [parameters][count] projections; all NaN if any of them is not finite."""
    if not all(math.isfinite(value) for row in projections for value in row):
        return [math.nan] * count
    return [math.fsum(row[i] for row in projections) for i in range(count)]


@torch.no_grad()
def perturb_weights(parameters: Mapping[str, torch.Tensor]) -> None:
    """Move each weight to an adjacent floating-point number with probability 1/12: the variance of rounding."""
    for number, parameter in enumerate(parameters.values()):
        generator = torch.Generator(parameter.device).manual_seed(number)
        uniform = torch.rand(parameter.shape, generator=generator, device=parameter.device)
        infinity = torch.full_like(parameter, torch.inf)
        parameter.copy_(
            torch.where(
                uniform < 1 / 24,
                torch.nextafter(parameter, infinity),
                torch.where(uniform > 23 / 24, torch.nextafter(parameter, -infinity), parameter),
            )
        )


@contextmanager
def _pass_gradients_to(
    use: Callable[[str, torch.nn.Parameter, torch.Tensor], None], parameters: Mapping[str, torch.nn.Parameter]
) -> Any:
    """Pass each gradient to `use` as soon as the backward pass has accumulated it, then free it."""

    def hook_of(name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            with torch.no_grad():
                use(name, parameters[name], gradient)

        return hook

    hooks = [p.register_post_accumulate_grad_hook(hook_of(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_moments(moments: Moments, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    unmatched = sorted(set(parameters) ^ set(moments.first))
    reshaped = [n for n, p in parameters.items() if n in moments.first and moments.first[n].shape != p.shape]
    if unmatched or reshaped:
        raise DataError(
            f"the AdamW moments belong to another model: {len(unmatched)} parameters do not match (e.g. {unmatched[:2]}), "
            f"{len(reshaped)} differ in shape; use the moments that were saved with this student"
        )
    if moments.weights is None:
        return
    dtype = number_type(next(iter(parameters.values())).dtype)
    if moments.weights[dtype] != weights_checksums(parameters.items())[dtype]:
        raise DataError(
            "the AdamW moments fit this architecture but were saved with other weights; use the moments that were saved "
            "with this student"
        )

"""The resident student: loaded once, stepped and restored for one example after another.

A gradient lives only until its parameter has used it, during the backward pass: what is resident is weights, moments and,
where steps are really taken, a snapshot of the weights. Moments, snapshot and gradients may live in host memory and visit the
device piece by piece (`montessori plan` says which).
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
"""Where 'moments', 'snapshot', 'reference gradient' and 'half gradient' live."""

ON_DEVICE: Placement = {
    "moments": "device",
    "snapshot": "device",
    "reference gradient": "device",
    "half gradient": "device",
}


@dataclass(frozen=True)
class ExampleGradient:
    """What a backward pass on an example found; the norm and the share say nothing if the loss is not finite.

    Attributes:
        loss: before the step, nats per token.
        norm: of the unweighted gradient.
        dominated_share: of all coordinates, those in which the weighted gradient decides AdamW's denominator.
    """

    loss: float
    norm: float
    dominated_share: float


class ResidentStudent:
    """A model, its moments and the one step they make possible.

    Attributes:
        losses: of the model as it stands.
        device: where it computes.
        parameters: what a step moves, by name.
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
        """Take over `model`, already on `device` and of the type the steps are to be taken in.

        Args:
            model: weights that ask for no gradient (a LoRA student's base) stay as they are.
            moments: of the weights that do.
            adamw: the step.
            device: where the model is.
            mixed: compute the example's gradient with bf16 activations; weights and reference losses keep their type.
            placement: what lives in host memory instead.

        Raises:
            DataError: the moments are of another model.
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
        """Move the weights by what momentum alone does."""
        for name, parameter in self.parameters.items():
            self._step(name, parameter, None)

    def take_step(self, batch: Batch) -> ExampleGradient:
        """Move the weights by one step on an example. A loss that is not finite moves nothing."""
        return self._backward(batch, self._step)

    def perturb(self) -> None:
        """Move the weights by what rounding them may have done: see `perturb_weights`."""
        perturb_weights(self.parameters)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to the snapshot, bit for bit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._snapshot[name], non_blocking=True)

    def project_step(self, batch: Batch, directions: Sequence[Direction]) -> tuple[ExampleGradient, list[float]]:
        """The example's gradient, and <direction, step on the example> of each direction; the step is not taken.

        Args:
            batch: the example.
            directions: each like the parameters, by name.
        """
        projections: list[list[float]] = []

        def project(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor, tally: GradientTally) -> None:
            projections.append(self._project(name, directions, gradient, tally))

        found = self._backward(batch, project)
        return found, _sums(projections, len(directions))

    @torch.no_grad()
    def project_null_step(self, directions: Sequence[Direction]) -> list[float]:
        """<direction, null step> of each direction."""
        return _sums([self._project(name, directions, None) for name in self.parameters], len(directions))

    def gradient_of(
        self, accumulate: Callable[[], None], onto: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The sum of the gradients of all backward passes that `accumulate` makes, by name.

        Args:
            accumulate: makes the passes.
            onto: gradients that they are added to, in place; None starts a new one.
        """
        total = onto or {
            name: self._stored(torch.zeros_like(p), "reference gradient") for name, p in self.parameters.items()
        }

        def add(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
            total[name] += gradient.to(total[name].device)

        with _gradients_used_by(self.parameters, add):
            accumulate()
        return total

    @torch.no_grad()
    def halve(self, gradients: Direction) -> dict[str, torch.Tensor]:
        """A copy of gradients in bf16, half the size where it is fp32: enough for a standard error."""
        return {
            name: self._stored(gradient.to(torch.bfloat16, copy=True), "half gradient")
            for name, gradient in gradients.items()
        }

    def drop_snapshot(self) -> None:
        """Free the snapshot: no step will be taken again."""
        self._snapshot.clear()

    def _backward(
        self, batch: Batch, use: Callable[[str, torch.nn.Parameter, torch.Tensor, GradientTally], None]
    ) -> ExampleGradient:
        tally = GradientTally()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed):
            loss = example_loss(self.losses, batch)
        value = float(loss.detach())
        if math.isfinite(value):
            reached: set[str] = set()

            def reach(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
                reached.add(name)
                use(name, parameter, gradient, tally)

            with _gradients_used_by(self.parameters, reach):
                loss.backward()
            # An expert that no token was sent to has no gradient. The other examples of a training batch reach it, and so
            # does the null step: its momentum moves it all the same.
            with torch.no_grad():
                for name in self.parameters.keys() - reached:
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
        along = [direction[name] for direction in directions]
        return self._adamw.project(along, gradient, self._first[name], self._second[name], self.device, tally)

    def _stored(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        tensor = tensor.contiguous()
        if self._placement[kind] == "device":
            return tensor.to(self.device)
        on_host = tensor.cpu()
        return on_host.pin_memory() if self.device.type == "cuda" else on_host


def _sums(projections: Sequence[Sequence[float]], count: int) -> list[float]:
    """[count] Sums over [parameters][count]; NaN where one of them is not finite."""
    if not all(math.isfinite(value) for of_parameter in projections for value in of_parameter):
        return [math.nan] * count
    return [math.fsum(of_parameter[i] for of_parameter in projections) for i in range(count)]


@torch.no_grad()
def perturb_weights(parameters: Mapping[str, torch.Tensor]) -> None:
    """Move each weight to a neighbouring number of its type with probability 1/12, up or down: the variance of rounding."""
    for number, parameter in enumerate(parameters.values()):
        generator = torch.Generator(parameter.device).manual_seed(number)
        drawn = torch.rand(parameter.shape, generator=generator, device=parameter.device)
        infinity = torch.full_like(parameter, torch.inf)
        parameter.copy_(
            torch.where(
                drawn < 1 / 24,
                torch.nextafter(parameter, infinity),
                torch.where(drawn > 23 / 24, torch.nextafter(parameter, -infinity), parameter),
            )
        )


@contextmanager
def _gradients_used_by(
    parameters: Mapping[str, torch.nn.Parameter], use: Callable[[str, torch.nn.Parameter, torch.Tensor], None]
) -> Any:
    """Within, a backward pass hands each gradient to `use` as soon as it is complete, and forgets it."""

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
    unknown = sorted(set(parameters) ^ set(moments.first))
    wrong = [n for n, p in parameters.items() if n in moments.first and moments.first[n].shape != p.shape]
    if unknown or wrong:
        raise DataError(
            f"the AdamW moments are of another model: {len(unknown)} parameters have no counterpart (e.g. {unknown[:2]}), "
            f"{len(wrong)} differ in shape; use the moments that were saved with this student"
        )
    if moments.weights is None:
        return
    loaded = number_type(next(iter(parameters.values())).dtype)
    if moments.weights[loaded] != weights_checksums(parameters.items())[loaded]:
        raise DataError(
            "the AdamW moments fit this architecture but were saved with other weights; use the moments that were saved "
            "with this very student"
        )

"""One AdamW step as a function of immutable moments: there is no optimizer state to restore.

The operations and their order are those of `torch.optim.AdamW` (single-tensor), so that the result is the same to the
last bit in fp32. Tensors are processed in chunks: on a CPU a chunk stays in the cache through all operations, on a GPU
it bounds the copies from host memory. All operations are elementwise, so chunking changes no bit.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 25}  # elements
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Elements of a block whose step is projected, by type of device."""


class GradientTally:
    """Norm of an example's gradient, and the number of coordinates in which it dominates AdamW's denominator.

    A step adds its chunks; neither number depends on their order.
    """

    def __init__(self) -> None:
        self._norms: list[torch.Tensor] = []
        self._dominated: list[torch.Tensor] = []

    def add(self, gradient: torch.Tensor, past: torch.Tensor, second: torch.Tensor) -> None:
        """Add a chunk.

        Args:
            gradient: [chunk], unweighted.
            past: beta2 v, [chunk]; overwritten.
            second: beta2 v + (1 - beta2) (w g)^2, [chunk].
        """
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        self._dominated.append((second > past.mul_(2)).count_nonzero())

    @property
    def norm(self) -> float:
        """Euclidean norm of the unweighted gradient; squares are summed in fp64."""
        return math.sqrt(math.fsum(norm * norm for norm in _values(self._norms)))

    @property
    def dominated(self) -> int:
        """Number of coordinates in which (1 - beta2) (w g)^2 exceeds beta2 v."""
        return int(sum(_values(self._dominated)))


class ScaledMoments(NamedTuple):
    """A step on a gradient g is -length (past + g) / (sqrt(past_square + g^2) + epsilon)."""

    past: torch.Tensor
    past_square: torch.Tensor
    epsilon: float
    length: float


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of one step, and the number of the next step (1 for a cold start).

    `example_weight` multiplies the gradient first: Eq. 1 has 1, a training batch of 32 gives each example 1/32.
    """

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int
    example_weight: float = 1.0

    def step_(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        tally: GradientTally | None = None,
    ) -> None:
        """Update `weight` by one step, in place; do not change the moments before the step, `first` and `second`.

        Args:
            weight: [any shape].
            gradient: like `weight`; None is a zero gradient, the null step.
            first: exp_avg, like `weight`.
            second: exp_avg_sq, like `weight`.
            tally: where the gradient is counted.
        """
        for g, m, v, w in _chunks(weight.device, weight, gradient, first, second, weight):
            if self.weight_decay:
                w.mul_(1 - self.learning_rate * self.weight_decay)
            numerator, denominator = self._fraction(g, m, v, tally)
            w.addcdiv_(numerator, denominator, value=-self._rate)

    def project(
        self,
        gradients: Iterable[torch.Tensor],
        first: torch.Tensor,
        second: torch.Tensor,
        projected: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Project the steps on several examples, over a block of coordinates that fits in the cache.

        The step is without weight decay, which does not depend on the gradient. Its numerator and denominator are divided by
        the factors of the gradient, so that the moments are scaled once for all examples. An example's result does not depend
        on the other examples.

        Args:
            gradients: [examples][block], unweighted; each is used before the next is requested.
            first: exp_avg, [block].
            second: exp_avg_sq, [block].
            projected: returns [numbers] the projection of a step, [block]; linear.

        Returns:
            [examples, numbers + 2] in fp64: the projection, the squared norm of the gradient, and the number of coordinates
            in which (1 - beta2) (w g)^2 exceeds beta2 v.
        """
        past, past_square, epsilon, length = self.scaled(first, second)
        step_of = fused_step() if first.is_cuda else _step_in_cache
        sums = []
        for gradient in gradients:
            step, norm, dominated = step_of(gradient, past, past_square, epsilon)
            sums.append(torch.cat([projected(step), torch.stack([norm, dominated])]))
        total = torch.stack(sums).double()
        total[:, :-2] *= -length
        return total

    def scaled(self, first: torch.Tensor, second: torch.Tensor) -> ScaledMoments:
        """Return the parts of a step whose numerator and denominator are divided by the factors of the gradient."""
        weight = self.example_weight
        scale = weight * ((1 - self.beta2) / (1 - self.beta2**self.step)) ** 0.5  # of the gradient in the denominator
        return ScaledMoments(
            first * (self.beta1 / ((1 - self.beta1) * weight)),
            second * (self.beta2 / ((1 - self.beta2) * weight**2)),
            self.epsilon / scale,
            self._rate * (1 - self.beta1) * weight / scale,
        )

    @property
    def own_share(self) -> float:
        """Factor of an example's squared gradient that, added to `second`, gives its denominator: (1 - beta2) w^2 / beta2."""
        return (1 - self.beta2) * self.example_weight**2 / self.beta2

    def linear_direction(self, gradient: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the direction u for which <u, g> is about <gradient, null step - step> for an example's gradient g.

        The denominator is that of an example whose squared gradient is the mean of many. With that of the null step, the step
        would have no bound where no training example had a gradient: in the embeddings of new tokens.

        Args:
            gradient: of the reference loss, [any shape].
            second: exp_avg_sq, and `own_share` of the mean squared gradient of an example; like `gradient`.
        """
        denominator = (second * (self.beta2 / (1 - self.beta2**self.step))).sqrt_().add_(self.epsilon)
        return gradient / denominator * (self._rate * (1 - self.beta1) * self.example_weight)

    @property
    def _rate(self) -> float:
        return self.learning_rate / (1 - self.beta1**self.step)

    def _fraction(
        self, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, tally: GradientTally | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weighted = g if self.example_weight == 1.0 else g * self.example_weight
        numerator = m.lerp(weighted, 1 - self.beta1)
        past = v * self.beta2
        denominator = past.addcmul(weighted, weighted, value=1 - self.beta2)
        if tally is not None:
            tally.add(g, past, denominator)
        return numerator, denominator.sqrt_().div_((1 - self.beta2**self.step) ** 0.5).add_(self.epsilon)


def step_with_counts(
    gradient: torch.Tensor, past: torch.Tensor, past_square: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a step without its length, see `ScaledMoments`, and what `AdamW.project` counts of its gradient."""
    own_square = gradient * gradient
    step = (past + gradient) / ((own_square + past_square).sqrt() + epsilon)
    return step, own_square.sum(), (own_square > past_square).sum().to(gradient.dtype)


@cache
def fused_step() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return `step_with_counts` compiled for the GPU: kernels for single operations would read and write much more memory.

    Where it cannot be compiled (Triton needs a C compiler on the node), it is as it is written.
    """
    compiled = torch.compile(step_with_counts, dynamic=True)
    try:
        # Sums are split for the size of the first tensors; later ones have other sizes, but rarely more elements.
        gradient, past, past_square = torch.rand(3, BLOCK["cuda"], device="cuda")
        compiled(gradient, past, past_square, 1e-8)
    except Exception as error:
        log.warning("first order takes longer on this node, because its step cannot be compiled: %s", error)
        return step_with_counts
    return compiled


def _step_in_cache(
    gradient: torch.Tensor, past: torch.Tensor, past_square: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do the same as `step_with_counts` in fewer buffers, which stay in the cache of a CPU."""
    own_square = gradient * gradient
    norm, denominator = own_square.sum(), own_square + past_square
    dominated = torch.gt(own_square, past_square, out=own_square).sum()
    return (past + gradient).div_(denominator.sqrt_().add_(epsilon)), norm, dominated


def _values(scalars: list[torch.Tensor]) -> list[float]:
    return torch.stack(scalars).tolist() if scalars else []


def _chunks(
    device: torch.device, like: torch.Tensor, gradient: torch.Tensor | None, *others: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield chunks of a gradient (None: zeros like `like`) and of the others, on `device` and in the dtype of `like`."""
    if gradient is None:
        gradient = torch.zeros_like(like)
    size = _CHUNK[device.type]
    flat = gradient.reshape(-1), *(tensor.view(-1) for tensor in others)
    for chunks in zip(*(tensor.split(size) for tensor in flat), strict=True):
        yield tuple(chunk.to(device, like.dtype, non_blocking=True) for chunk in chunks)

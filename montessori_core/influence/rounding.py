"""The noise that rounding alone adds to an influence: what changes when all weights move by their rounding error."""

import math
from collections.abc import Mapping

import torch

from montessori_core.influence.reference import Loss, influence_by_example

_CHUNK = 1 << 24  # weights


def rounding_noise(student: Loss, perturbed: Loss, reduction: str) -> float:
    """Return two standard deviations of the rounding noise of an influence, nats.

    Args:
        student: losses of the student.
        perturbed: losses after a perturbation of the weights by their rounding error, which changes the rounding of all
            activations, too. Each reference example is one draw of the activations' noise; the noise of the weights is
            common to all examples.
        reduction: reduction of the reference loss.
    """
    differences = influence_by_example(student, perturbed, reduction)
    independent = float(differences.square().mean().sqrt()) / math.sqrt(len(differences))
    return 2.0 * max(abs(float(differences.mean())), independent)


@torch.no_grad()
def perturb_weights(parameters: Mapping[str, torch.Tensor]) -> None:
    """Move each weight to an adjacent floating-point number with probability 1/12: the variance of rounding.

    Only the random numbers, four bytes a weight, are in memory for a whole parameter.
    """
    for number, parameter in enumerate(parameters.values()):
        generator = torch.Generator(parameter.device).manual_seed(number)
        uniform = torch.rand(parameter.shape, generator=generator, device=parameter.device)
        for weights, drawn in zip(parameter.view(-1).split(_CHUNK), uniform.view(-1).split(_CHUNK), strict=True):
            infinity = torch.full_like(weights, torch.inf)
            up, down = torch.nextafter(weights, infinity), torch.nextafter(weights, -infinity)
            weights.copy_(torch.where(drawn < 1 / 24, up, torch.where(drawn > 23 / 24, down, weights)))

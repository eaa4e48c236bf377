"""Random directions keep inner products of steps and gradients."""

import pytest
import torch

from montessori_core.influence.projections import RandomDirections

CPU = torch.device("cpu")
PARAMETERS = 64


def project(size: int) -> tuple[float, float, int]:
    """Return the inner product of a step and a gradient, that of their projections, and the size of these.

    As in training, gradients vary in size a thousandfold, and steps are gradients over their size.
    """
    torch.manual_seed(0)
    sizes = {f"layer{number}": torch.logspace(-6, -3, 48 * 32).view(48, 32)[torch.randperm(48)] for number in range(64)}
    sizes["norm"] = torch.full((32,), 1e-4)
    common = {name: torch.randn_like(scale) * scale for name, scale in sizes.items()}
    gradient = {name: common[name] + torch.randn_like(scale) * scale for name, scale in sizes.items()}
    step = {name: common[name] / scale + torch.randn_like(scale) for name, scale in sizes.items()}
    directions = RandomDirections({name: scale**2 for name, scale in sizes.items()}, size, CPU)
    projected = 0.0
    for name, scale in sizes.items():
        rows, second = slice(0, len(scale) if scale.dim() > 1 else 1), (scale**2).view(-1, 32)
        kept = directions.onto(name, rows, second)(step[name].flatten())
        projected += float(kept @ directions.gradient(name, rows, gradient[name].view(-1, 32), second))
    return sum(float((step[name] * gradient[name]).sum()) for name in sizes), projected, directions.size


def test_random_directions_keep_inner_products() -> None:
    true, few, few_numbers = project(2_000)
    _, many, many_numbers = project(30_000)
    assert few == pytest.approx(true, rel=0.3)
    assert many == pytest.approx(true, rel=0.1)
    assert few_numbers < 3_000 < many_numbers < 40_000


def test_as_many_directions_as_parameters_lose_nothing() -> None:
    true, projected, numbers = project(10**9)
    assert projected == pytest.approx(true, rel=1e-4)
    assert numbers == 64 * 48 * 32 + 32


def test_blocks_of_rows_add_up() -> None:
    """A parameter is projected block by block, in blocks of another height on a GPU."""
    second = torch.rand(50, 20)
    directions, step = RandomDirections({"w": second}, 64, CPU), torch.randn(50, 20)
    whole = directions.onto("w", slice(0, 50), second)(step.flatten())
    parts = [directions.onto("w", rows, second[rows])(step[rows].flatten()) for rows in (slice(0, 7), slice(7, 50))]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_student_without_moments_has_directions() -> None:
    directions = RandomDirections({"w": torch.zeros(50, 20), "b": torch.zeros(20)}, 64, CPU)
    step = torch.randn(50, 20)
    kept = directions.onto("w", slice(0, 50), torch.zeros(50, 20))(step.flatten())
    assert kept.isfinite().all()
    assert kept.abs().max() > 0

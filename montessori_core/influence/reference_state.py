"""Losses and gradients of a reference set, which do not depend on the examples: computed once, then read by all workers."""

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from montessori_core.errors import DataError
from montessori_core.files import commit
from montessori_core.influence.projections import AlongDirections
from montessori_core.influence.reference import Loss, ReferenceSet
from montessori_core.influence.rounding import rounding_noise
from montessori_core.influence.student import ResidentStudent
from montessori_core.influence.token_rows import TokenRows
from montessori_core.locks import take_lock

Estimator = Literal["exact", "first_order", "linear"]
Place = Callable[[torch.Tensor, str, str], torch.Tensor]
"""Moves a gradient of a kind and a parameter to its home, see `ResidentStudent.place`."""
_FILE = "reference.safetensors"


@dataclass(frozen=True)
class ReferenceGradient:
    """The gradient of the reference loss at the null step; for a linear step, `AdamW.linear_direction` of it.

    Attributes:
        full: of all reference examples, by parameter, see `ResidentStudent.round_gradients`.
        half: the part of a random half of them, in bf16; for the standard error.
        null_projections: <gradient, null step> of both; zero for a linear step, which is relative to the null step.
        rows: of tokens, by parameter; for a linear step.
    """

    full: dict[str, torch.Tensor]
    half: dict[str, torch.Tensor]
    null_projections: list[float]
    rows: Mapping[str, TokenRows]


@dataclass(frozen=True)
class ReferenceState:
    """A student and its null step on the reference set.

    Attributes:
        student_loss: reference loss before any step.
        null_step_loss: reference loss after the null step.
        noise_floor: two standard deviations of the rounding noise of an exact influence, nats.
        gradient: None for the exact estimator.
    """

    student_loss: Loss
    null_step_loss: Loss
    noise_floor: float
    gradient: ReferenceGradient | None

    @staticmethod
    def measure(
        student: ResidentStudent, reference: ReferenceSet, estimator: Estimator, reduction: str
    ) -> "ReferenceState":
        """Evaluate the student, its perturbation and its null step; restore the student.

        Raises:
            DataError: the student's loss on the reference set is not finite.
        """
        student_loss = reference.evaluate(student.losses)
        if not student_loss.summed.isfinite().all():
            non_finite = (~student_loss.summed.isfinite()).nonzero()[:, 0].tolist()
            raise DataError(
                f"the student's loss is not finite on {len(non_finite)} of {len(reference)} reference examples (the first is "
                f"number {non_finite[0] + 1}); the student probably diverged: lower warmup.learning_rate, or give another "
                "student"
            )
        student.perturb()
        noise_floor = rounding_noise(student_loss, reference.evaluate(student.losses), reduction)
        student.restore()
        student.take_null_step()
        if estimator == "exact":
            null_step_loss, gradient = reference.evaluate(student.losses), None
        else:
            null_step_loss, gradient = _measure_gradient(student, reference, estimator, reduction)
        student.restore()
        return ReferenceState(student_loss, null_step_loss, noise_floor, gradient)

    def write(self, path: Path) -> None:
        """Write the state, atomically; numbers keep all bits."""
        tensors = {
            "student": self.student_loss.summed,
            "null_step": self.null_step_loss.summed,
            "tokens": self.student_loss.tokens,
            "noise_floor": torch.tensor(self.noise_floor, dtype=torch.float64),
        }
        if self.gradient is not None:
            tensors["null_projections"] = torch.tensor(self.gradient.null_projections, dtype=torch.float64)
            for kind, gradient in (("full", self.gradient.full), ("half", self.gradient.half)):
                tensors |= {f"{kind}.{name}": tensor for name, tensor in gradient.items()}
            for name, rows in self.gradient.rows.items():
                tensors |= {f"rows.{name}.{part}": tensor for part, tensor in vars(rows).items()}
        with commit(path) as temporary:
            save_file(tensors, temporary)

    @staticmethod
    def read(path: Path, place: Place) -> "ReferenceState":
        """Read a state that `write` wrote; `place` moves a gradient to the home of its kind."""
        tensors = load_file(path)
        gradient = None
        if "null_projections" in tensors:
            full, half = (
                {
                    name: place(tensors.pop(f"{kind}.{name}"), home, name)
                    for name in [key.removeprefix(f"{kind}.") for key in tensors if key.startswith(f"{kind}.")]
                }
                for kind, home in (("full", "reference gradient"), ("half", "half gradient"))
            )
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for key in [key for key in tensors if key.startswith("rows.")]:
                name, _, part = key.removeprefix("rows.").rpartition(".")
                parts.setdefault(name, {})[part] = tensors.pop(key)
            rows = {name: TokenRows(**tensors_of_rows) for name, tensors_of_rows in parts.items()}
            gradient = ReferenceGradient(full, half, tensors["null_projections"].tolist(), rows)
        student_loss, null_step_loss = (Loss(tensors[name], tensors["tokens"]) for name in ("student", "null_step"))
        return ReferenceState(student_loss, null_step_loss, float(tensors["noise_floor"]), gradient)


def shared_state(folder: Path, place: Place, measure: Callable[[], ReferenceState]) -> ReferenceState:
    """Read the state from a folder; the first worker measures and writes it, while the others wait.

    Args:
        folder: shared by workers that have the same student, reference set and settings, and by no others.
        place: see `ReferenceState.read`.
        measure: measures the state.
    """
    path = folder / _FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with _locked(folder / "lock"):
            if not path.exists():
                state = measure()
                state.write(path)
                return state
    return ReferenceState.read(path, place)  # without the lock: all workers read at the same time


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, where the file system has locks. Without them, workers do the same work and write the same bytes."""
    with path.open("a") as lock:
        take_lock(lock, fcntl.LOCK_EX)
        yield


def _measure_gradient(
    student: ResidentStudent, reference: ReferenceSet, estimator: Estimator, reduction: str
) -> tuple[Loss, ReferenceGradient]:
    """Return the reference loss at the student's weights, after the null step, and its gradient."""
    summed = torch.zeros(len(reference), dtype=torch.float64)

    def add_losses(half: list[int]) -> None:
        summed.add_(reference.backward(student.losses, reduction, half))

    first, second = reference.halves()
    # A pass adds one n-th of each of its examples' gradients, which are nearly orthogonal: n times the sum of the squares of
    # all passes is about the mean square of an example.
    square_weight = float(len(reference)) if estimator == "linear" else 0.0
    sums, moments = student.zeros(), student.moments_of_tokens()
    student.add_gradients(lambda: add_losses(first), sums, square_weight)
    half = student.copy_in_bf16(sums)
    student.add_gradients(lambda: add_losses(second), sums, square_weight)
    loss = Loss(summed, reference.tokens)
    if estimator == "linear":
        rows = student.token_rows(moments, sums, half)
        student.linearise_(sums)
        student.linearise_(half)
        return loss, ReferenceGradient(sums, half, [0.0, 0.0], rows)
    full = student.round_gradients(sums)
    null_projections = student.project_null_step(AlongDirections([full, half])).tolist()
    return loss, ReferenceGradient(full, half, null_projections, {})

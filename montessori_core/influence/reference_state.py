"""Losses and gradients of a reference set, which do not depend on the examples: computed once, then read by all workers."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from montessori_core.errors import DataError
from montessori_core.files import commit
from montessori_core.influence.reference import Loss, ReferenceSet, rounding_noise
from montessori_core.influence.student import Direction, ResidentStudent

_FILE = "reference.safetensors"


@dataclass(frozen=True)
class ReferenceGradient:
    """The gradient of the reference loss at the null step.

    Attributes:
        full: of all reference examples, by parameter.
        half: the part of a random half of them, in bf16; for the standard error.
        null_projections: <gradient, null step> of both.
    """

    full: Direction
    half: Direction
    null_projections: list[float]


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
        student: ResidentStudent, reference: ReferenceSet, estimator: Literal["exact", "first_order"], reduction: str
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
                f"number {non_finite[0] + 1}); the student probably diverged: lower the warm-up's learning rate"
            )
        student.perturb()
        noise_floor = rounding_noise(student_loss, reference.evaluate(student.losses), reduction)
        student.restore()
        student.take_null_step()
        null_step_loss = reference.evaluate(student.losses)
        gradient = _measure_gradient(student, reference, reduction) if estimator == "first_order" else None
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
        with commit(path) as temporary:
            save_file(tensors, temporary)

    @staticmethod
    def read(path: Path, student: ResidentStudent) -> "ReferenceState":
        """Read a state that `write` wrote for this student; gradients go to their homes."""
        tensors = load_file(path)
        gradient = None
        if "null_projections" in tensors:
            full, half = (
                {name: student.place(tensors.pop(f"{kind}.{name}"), home) for name in student.parameters}
                for kind, home in (("full", "reference gradient"), ("half", "half gradient"))
            )
            gradient = ReferenceGradient(full, half, tensors["null_projections"].tolist())
        student_loss, null_step_loss = (Loss(tensors[name], tensors["tokens"]) for name in ("student", "null_step"))
        return ReferenceState(student_loss, null_step_loss, float(tensors["noise_floor"]), gradient)


def shared_state(folder: Path, student: ResidentStudent, measure: Callable[[], ReferenceState]) -> ReferenceState:
    """Read the state from a folder; the first worker measures and writes it, while the others wait.

    Args:
        folder: shared by workers that have the same student, reference set and settings, and by no others.
        student: the student.
        measure: measures the state.
    """
    path = folder / _FILE
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if path.exists():
            return ReferenceState.read(path, student)
        state = measure()
        state.write(path)
        return state


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, where the file system has locks. Without them, workers do the same work and write the same bytes."""
    with path.open("a") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _measure_gradient(student: ResidentStudent, reference: ReferenceSet, reduction: str) -> ReferenceGradient:
    """Return the gradient of the reference loss at the student's weights, after the null step."""
    first, second = reference.halves()
    full = student.gradient_of(lambda: reference.backward(student.losses, reduction, first))
    half = student.copy_in_bf16(full)
    student.gradient_of(lambda: reference.backward(student.losses, reduction, second), onto=full)
    return ReferenceGradient(full, half, student.project_null_step([full, half]))

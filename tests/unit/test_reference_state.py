"""The state of a reference set that workers share."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from montessori_core.influence.reference import Loss
from montessori_core.influence.reference_state import ReferenceGradient, ReferenceState, shared_state


def test_one_worker_measures_and_the_others_read_at_the_same_time(tmp_path: Path) -> None:
    """A reference gradient of an 8B student has 32 GB: a hundred workers must not wait for one another's reading."""
    before, after = (Loss(torch.rand(4, dtype=torch.float64), torch.full((4,), 7)) for _ in range(2))
    gradient = ReferenceGradient({"weight": torch.rand(2, 3)}, {"weight": torch.rand(2, 3).bfloat16()}, [0.1, 0.2], {})
    measured = []
    readers = threading.Barrier(3, timeout=60)

    def measure() -> ReferenceState:
        measured.append(ReferenceState(before, after, 1e-6, gradient))
        return measured[0]

    def place(tensor: torch.Tensor, kind: str, name: str) -> torch.Tensor:
        if kind == "reference gradient":
            readers.wait()
        return tensor

    with ThreadPoolExecutor(4) as workers:
        states = list(workers.map(lambda _: shared_state(tmp_path, place, measure), range(4)))
    assert len(measured) == 1
    for state in states:
        assert state.gradient is not None
        assert state.gradient.full["weight"].equal(gradient.full["weight"])
        assert state.gradient.half["weight"].equal(gradient.half["weight"])
        assert state.null_step_loss.summed.equal(after.summed)

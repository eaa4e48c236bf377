"""Plan the memory of an influence worker: sizes of its tensors, and which are on the device (`montessori plan`).

Weights, activations of one pass and one gradient at a time must be on the device. Moments, snapshot and reference gradients
are read once per example, chunk by chunk, so they may be in (pinned) host memory, at the cost of the copies. As many of
them as fit stay on the device, those that save the most copying per byte first.
"""

from dataclasses import dataclass
from typing import Literal

from montessori_core.influence.losses import LOGITS_AT_A_TIME
from montessori_core.influence.student import ON_DEVICE, Home, Placement
from montessori_core.models.shape import Shape

USABLE = 0.92
"""Share of the device's memory that a plan uses; the rest is for the CUDA context and for fragmentation."""


@dataclass(frozen=True)
class Need:
    """A group of tensors: its name, bytes, and home."""

    name: str
    size: int
    home: Home


@dataclass(frozen=True)
class MemoryPlan:
    """Home of each group of tensors.

    Attributes:
        needs: all groups of tensors.
        device_limit: bytes of the device.
    """

    needs: tuple[Need, ...]
    device_limit: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return sum(need.size for need in self.needs if need.home == "device")

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return sum(need.size for need in self.needs if need.home == "host")

    @property
    def fits(self) -> bool:
        """Whether the tensors that must be on the device fit there."""
        return self.device <= self.device_limit * USABLE

    @property
    def placement(self) -> Placement:
        """The placement for `ResidentStudent`."""
        homes = {need.name: need.home for need in self.needs}
        return {kind: homes.get(kind, "device") for kind in ON_DEVICE}


def plan_memory(
    shape: Shape,
    estimator: Literal["exact", "first_order", "linear"],
    dtype: Literal["float32", "mixed", "bfloat16"],
    max_length: int,
    reference_batch_tokens: int,
    device_limit: int,
) -> MemoryPlan:
    """Plan the memory of one worker.

    Args:
        shape: shape of the student.
        estimator: 'exact' needs the snapshot; 'first_order' needs the reference gradient, the gradient of half the
            reference set in bf16, and the snapshot until it has both; 'linear' needs both gradients and the rows of tokens.
        dtype: see `config.Influence`.
        max_length: tokens of the longest example.
        reference_batch_tokens: tokens of a batch of reference examples.
        device_limit: bytes of the device.
    """
    width = 2 if dtype == "bfloat16" else 4
    activation = 2 if dtype in ("bfloat16", "mixed") else 4
    logits = min(max(max_length, reference_batch_tokens) * shape.vocabulary, LOGITS_AT_A_TIME) * 4
    kept_per_token = shape.layers * shape.kept_per_layer
    backward = max_length * kept_per_token * activation
    if estimator == "first_order":
        # Inputs and output gradients of the linear layers, for as many tokens as the longest example has.
        factors_per_token = shape.layers * (8 * shape.hidden + 3 * shape.intermediate) + shape.vocabulary
        factors = max_length * factors_per_token * activation
        backward = max(backward + factors, reference_batch_tokens * kept_per_token * width)
    if estimator == "linear":
        backward = max(max_length, reference_batch_tokens) * kept_per_token * width
    forward = reference_batch_tokens * (4 * shape.hidden + 3 * shape.intermediate) * width
    needs = [
        Need("weights", shape.parameters * width, "device"),
        Need("one gradient", shape.largest * width, "device"),
        Need("activations", max(backward, forward), "device"),
        Need("logits", 3 * logits, "device"),
    ]
    movable = {"first moment": width, "second moment": width}
    if estimator == "first_order":
        movable |= {"reference gradient": width, "half gradient": 2}
    if estimator == "linear":  # the first worker alone, which measures the reference set, needs moments
        movable = {"reference gradient": width, "half gradient": 2, "second moment": width, "first moment": width}
    movable["snapshot"] = width
    before = len(needs)
    for name, bytes_each in movable.items():
        size = bytes_each * shape.trained
        used = sum(need.size for need in needs if need.home == "device")
        needs.append(Need(name, size, "device" if used + size <= device_limit * USABLE else "host"))
    if estimator == "linear":
        # Two directions and the rows of tokens take the place of what measured the reference set.
        kept = activation * (2 * shape.trained + 8 * shape.vocabulary * shape.hidden)
        excess = kept - sum(need.size for need in needs[before:] if need.home == "device")
        needs.append(Need("directions, beyond these", max(0, excess), "device"))
    return MemoryPlan(tuple(needs), device_limit)

"""Plan the memory of an influence worker: sizes of its tensors, and which are on the device (`montessori plan`).

Weights, activations of one pass and one gradient at a time must be on the device. Moments, snapshot and reference gradients
are read once per example, chunk by chunk, so they may be in (pinned) host memory, at the cost of the copies. As many of
them as fit stay on the device, those that save the most copying per byte first.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from montessori_core.errors import UserError
from montessori_core.influence.losses import LOGITS_AT_A_TIME
from montessori_core.influence.reference_state import Estimator
from montessori_core.influence.student import ON_DEVICE, Home, Placement
from montessori_core.models.shape import GB, Shape

Planned = Estimator | Literal["steps"]
Precision = Literal["float32", "mixed", "bfloat16"]

log = logging.getLogger(__name__)

USABLE = 0.92
"""Share of the device's memory that a plan uses; the rest is for the CUDA context and for fragmentation."""

_DEVICE_REMEDY = (
    "lower influence.reference_batch_tokens or student.max_length, train LoRA matrices (student.lora), set influence.dtype: "
    "bfloat16, or use a GPU with more memory"
)
_HOST_REMEDY = (
    "raise memory_gb of influence in cluster.resources, train LoRA matrices (student.lora), or use a GPU with more memory, "
    "where more of this fits"
)

_ACTIVATIONS, _BF16_COPIES, _WRITTEN = "activations", "bf16 copies, beyond these", "copy of gradients, to write them"
_AT_MOST = (_ACTIVATIONS, _BF16_COPIES, _WRITTEN)
"""Needs that the longest example or the first worker alone has."""


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

    def check(self, host_limit: int) -> None:
        """Check that the plan fits the device, and host memory of `host_limit` bytes.

        What depends on the data may need less than planned: if only that is too much, there is a warning.

        Raises:
            UserError: it does not; the message names the largest needs and the settings that lower them.
        """
        for home, needed, limit, remedy in (
            ("device", self.device, int(self.device_limit * USABLE), _DEVICE_REMEDY),
            ("host", self.host, host_limit, _HOST_REMEDY),
        ):
            if needed > limit:
                needs = sorted((need for need in self.needs if need.home == home), key=lambda need: -need.size)
                largest = ", ".join(f"{need.name} {need.size / GB:.1f}" for need in needs[:4])
                message = (
                    f"influence needs {needed / GB:.1f} GB of {home} memory and may use {limit / GB:.1f} GB (the largest, "
                    f"in GB: {largest}); {remedy}; montessori plan --student shows the effect"
                )
                if sum(need.size for need in needs if need.name not in _AT_MOST) > limit:
                    raise UserError(message)
                log.warning("with the longest examples, %s", message)

    @property
    def placement(self) -> Placement:
        """The placement for `ResidentStudent`."""
        homes = {need.name: need.home for need in self.needs}
        return {kind: homes.get(kind, "device") for kind in ON_DEVICE}


def plan_memory(
    shape: Shape,
    estimator: Planned,
    dtype: Precision,
    max_length: int,
    reference_batch_tokens: int,
    device_limit: int,
) -> MemoryPlan:
    """Plan the memory of one worker.

    Args:
        shape: shape of the student.
        estimator: 'exact' needs the snapshot; 'first_order' needs the reference gradient, the gradient of half the
            reference set in bf16, and the snapshot until it has both; 'linear' needs both gradients and the rows of tokens;
            'steps', which are kept for any reference set, need no gradient of one.
        dtype: see `config.Influence`.
        max_length: tokens of the longest example.
        reference_batch_tokens: tokens of a batch of reference examples.
        device_limit: bytes of the device.
    """
    width, activation = _widths(dtype)
    example, batch = _activations(shape, estimator, dtype, max_length, reference_batch_tokens)
    logits = min(max(max_length, reference_batch_tokens) * shape.vocabulary, LOGITS_AT_A_TIME) * 4
    needs = [
        Need("weights", shape.parameters * width, "device"),
        Need("one gradient", shape.largest * width, "device"),
        Need(_ACTIVATIONS, max(example, batch), "device"),
        Need("logits", 3 * logits, "device"),
    ]
    if dtype == "mixed":
        # Autocast casts the weight of each linear layer in the pass over an example, which keeps them until its end.
        copies = 2 * (shape.parameters - shape.looked_up)
        needs.append(Need(_BF16_COPIES, max(0, example + copies - max(example, batch)), "device"))
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
        kept = activation * (2 * shape.trained + 4 * shape.token_rows)
        excess = kept - sum(need.size for need in needs[before:] if need.home == "device")
        needs.append(Need("directions, beyond these", max(0, excess), "device"))
        needs.append(Need("rows of tokens, in fp32", 4 * 4 * shape.token_rows, "host"))
    gradients = [need for need in needs if need.name in ("reference gradient", "half gradient")]
    if copied := sum(need.size for need in gradients if need.home == "device"):  # by the first worker, for all others
        needs.append(Need(_WRITTEN, copied, "host"))
    return MemoryPlan(tuple(needs), device_limit)


def _widths(dtype: Precision) -> tuple[int, int]:
    """Return the bytes of a weight, and of an activation in the pass over an example."""
    return 2 if dtype == "bfloat16" else 4, 4 if dtype == "float32" else 2


def _activations(
    shape: Shape, estimator: Planned, dtype: Precision, max_length: int, reference_batch_tokens: int
) -> tuple[int, int]:
    """Return the bytes of activations in a pass over an example, and in one over a reference batch; see `plan_memory`."""
    width, activation = _widths(dtype)
    kept_per_token = shape.layers * shape.kept_per_layer
    if estimator == "exact":
        forward = reference_batch_tokens * (4 * shape.hidden + 3 * shape.intermediate) * width
        return max_length * kept_per_token * activation, forward
    reference = reference_batch_tokens * kept_per_token * width
    if estimator == "linear":  # a batch of examples has as many tokens
        return max(max_length, reference_batch_tokens) * kept_per_token * activation, reference
    # Inputs and output gradients of the linear layers, for as many tokens as the longest example has.
    factors_per_token = shape.layers * (8 * shape.hidden + 3 * shape.intermediate) + shape.vocabulary
    return max_length * (kept_per_token + factors_per_token) * activation, reference

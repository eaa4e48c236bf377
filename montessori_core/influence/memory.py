"""Plan the memory of an influence worker: sizes of its tensors, and which are on the device (`montessori plan`).

Weights, activations of one pass and one gradient at a time must be on the device. Moments, snapshot and reference gradients
are read once per example, chunk by chunk, so they may be in (pinned) host memory, at the cost of the copies. As many of
them as fit stay on the device, those that save the most copying per byte first.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from montessori_core.config import Dtype, StateDtype
from montessori_core.errors import UserError
from montessori_core.influence.losses import LOGITS_AT_A_TIME
from montessori_core.influence.reference_state import Estimator
from montessori_core.influence.student import ON_DEVICE, Home, Placement
from montessori_core.models.shape import GB, USABLE, Shape

Planned = Estimator | Literal["steps"]
Phase = Literal["loading", "opening", "measuring"]
"""Weights are loaded to host memory; the first worker measures the reference set; then all measure examples."""
PHASES: tuple[Phase, ...] = ("opening", "measuring")
_LOADING: tuple[Phase, ...] = ("loading",)
_OPENING: tuple[Phase, ...] = ("opening",)
_MEASURING: tuple[Phase, ...] = ("measuring",)

log = logging.getLogger(__name__)


_DEVICE_REMEDY = (
    "lower influence.reference_batch_tokens or student.max_length, train LoRA matrices (student.lora), set "
    "influence.state_dtype=bfloat16 or influence.dtype=bfloat16, or use a GPU with more memory"
)
_HOST_REMEDY = (
    "raise memory_gb of influence in cluster.resources, set influence.state_dtype=bfloat16, train LoRA matrices "
    "(student.lora), measure on fewer reference sets at a time, or use a GPU with more memory, where more of this fits"
)

_ACTIVATIONS, _BF16_COPIES, _WRITTEN = "activations", "bf16 copies, beyond these", "copy of gradients, to write them"
_DIRECTIONS = "directions and rows of tokens"
_OF_TARGETS = ("reference gradient", "half gradient")
_AT_MOST = (_ACTIVATIONS, _BF16_COPIES, _WRITTEN)
"""Needs that the longest example or the first worker alone has."""


@dataclass(frozen=True)
class Need:
    """A group of tensors: its name, bytes, home, and when it is in memory."""

    name: str
    size: int
    home: Home
    phases: tuple[Phase, ...] = PHASES

    @property
    def pinned(self) -> bool:
        """Whether it is in pinned host memory on a GPU's machine: what is copied to the GPU again and again."""
        return self.home == "host" and self.name in ON_DEVICE and self.name != "gradient sum"

    def home_while(self, phase: Phase) -> Home | None:
        """Return where it is in this phase, if it is in memory."""
        if phase not in self.phases:
            return None
        if self.home == "host, then device":
            return "host" if phase == "opening" else "device"
        return self.home


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
        """Bytes on the device, in the phase with more of them."""
        return _peak(self.needs, "device")

    @property
    def host(self) -> int:
        """Bytes in host memory, in the phase with more of them."""
        return _peak(self.needs, "host")

    @property
    def fits(self) -> bool:
        """Whether the tensors that must be on the device fit there."""
        return self.device <= self.device_limit * USABLE

    def check(self, host_limit: int) -> None:
        """Check that the plan fits the device, and host memory of `host_limit` bytes, after the weights are loaded.

        What depends on the data may need less than planned: if only that is too much, there is a warning.

        Raises:
            UserError: it does not; the message names the largest needs and the settings that lower them.
        """
        limits: list[tuple[Home, int, int, str]] = [
            ("device", self.device, int(self.device_limit * USABLE), _DEVICE_REMEDY),
            ("host", _peak(self.needs, "host", PHASES), host_limit, _HOST_REMEDY),
        ]
        for home, needed, limit, remedy in limits:
            if needed > limit:
                phase = max(PHASES, key=lambda phase: _sum(self.needs, home, phase))
                needs = [need for need in self.needs if need.home_while(phase) == home]
                needs.sort(key=lambda need: -need.size)
                largest = ", ".join(f"{need.name} {need.size / GB:.1f}" for need in needs[:4])
                message = (
                    f"influence needs {needed / GB:.1f} GB of {home} memory and may use {limit / GB:.1f} GB (the largest, "
                    f"in GB: {largest}); {remedy}; montessori plan --student shows the effect"
                )
                if _peak([need for need in self.needs if need.name not in _AT_MOST], home, PHASES) > limit:
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
    dtypes: tuple[Dtype, StateDtype],
    max_length: int,
    reference_batch_tokens: int,
    device_limit: int,
    targets: int = 1,
) -> MemoryPlan:
    """Plan the memory of one worker: the first of a stage, which also measures the reference set.

    Args:
        shape: shape of the student.
        estimator: 'exact' needs the snapshot for each example; 'first_order' needs the reference gradient, the gradient of
            half the reference set in bf16, and the snapshot until it has both; 'linear' needs both gradients and the rows of
            tokens; 'steps', which are kept for any reference set, need no gradient of one.
        dtypes: see `dtype` and `state_dtype` of `config.Influence`.
        max_length: tokens of the longest example.
        reference_batch_tokens: tokens of a batch of reference examples.
        device_limit: bytes of the device.
        targets: number of reference sets.
    """
    dtype, state_dtype = dtypes
    width, state_width = (2 if dtype == "bfloat16" else 4), (2 if "bfloat16" in (dtype, state_dtype) else 4)
    needs = [
        Need("weights, while they are loaded", shape.parameters * width, "host", _LOADING),
        *_weights(shape, estimator, dtype),
        *_passes(shape, estimator, dtype, max_length, reference_batch_tokens),
        Need("one gradient", shape.largest * width, "device"),
    ]
    if estimator == "linear":
        direction_width = 2 if dtype == "mixed" else state_width
        rows = shape.token_rows
        needs.append(Need(_DIRECTIONS, direction_width * (2 * shape.trained + 4 * rows), "device", _MEASURING))
        needs.append(Need("rows of tokens, in fp32", 4 * 4 * rows, "host"))
        needs.append(Need("second moments of tokens", 4 * rows, "host", _OPENING))
    for name, bytes_each, phases in _movable(estimator, width, state_width, targets):
        size = bytes_each * shape.trained * (targets if name in _OF_TARGETS else 1)
        fitting = [phase for phase in phases if _sum(needs, "device", phase) + size <= device_limit * USABLE]
        homes = {need.name: need.home for need in needs}
        # What is kept of a sum in host memory moves with the moments, when the snapshot is gone.
        waits = len(fitting) < len(phases) or (name == "reference gradient" and homes.get("gradient sum") == "host")
        home: Home = "device"
        if waits:
            home = "host, then device" if "measuring" in fitting else "host"
            if "measuring" in phases:  # memory of the host is allocated before a sum is freed
                phases = PHASES
        needs.append(Need(name, size, home, phases))
    gradients = [need for need in needs if need.name in _OF_TARGETS]
    # By the first worker, for all others, a set after the other.
    if copied := sum(need.size for need in gradients if need.home == "device") // targets:
        needs.append(Need(_WRITTEN, copied, "host", _OPENING))
    return MemoryPlan(tuple(needs), device_limit)


def _weights(shape: Shape, estimator: Planned, dtype: Dtype) -> list[Need]:
    """Return what the weights need; linear layers may be cast after opening, see `ResidentStudent.end_steps`."""
    cast = 2 * shape.linear if dtype == "mixed" and estimator != "exact" else 0
    weights = shape.parameters * (2 if dtype == "bfloat16" else 4)
    if not cast:
        return [Need("weights", weights, "device")]
    return [Need("weights", weights, "device", _OPENING), Need("weights, cast", weights - cast, "device", _MEASURING)]


def _movable(
    estimator: Planned, width: int, state_width: int, targets: int
) -> list[tuple[str, int, tuple[Phase, ...]]]:
    """Return the tensors like the trained parameters that may be in host memory: kind, bytes of a number, and when.

    Those come first that save the most copying.
    """
    if estimator == "linear":  # the first worker alone has moments; then directions take the place of gradients
        kinds = ("reference gradient", width), ("half gradient", 2), ("second moment", width), ("first moment", width)
        return [(name, size, _OPENING) for name, size in (*kinds, ("snapshot", width))]
    moments = [("first moment", state_width, PHASES), ("second moment", state_width, PHASES)]
    if estimator == "exact":
        return [*moments, ("snapshot", width, PHASES)]
    snapshot, half = ("snapshot", width, _OPENING), ("half gradient", 2, PHASES)
    if estimator == "steps":
        return [*moments, snapshot]
    if state_width == width:
        return [*moments, ("reference gradient", width, PHASES), half, snapshot]
    # The gradient of one set takes the place of its sum; those of other sets are beside it.
    kept = ("reference gradient", state_width, _MEASURING if targets == 1 else PHASES)
    return [*moments, ("gradient sum", width, _OPENING), kept, half, snapshot]


def _passes(shape: Shape, estimator: Planned, dtype: Dtype, max_length: int, reference_batch_tokens: int) -> list[Need]:
    """Return what passes over reference batches and examples keep at once."""
    width, activation = 2 if dtype == "bfloat16" else 4, 4 if dtype == "float32" else 2
    kept_per_token = shape.layers * shape.kept_per_layer
    example_tokens, example = max_length, max_length * kept_per_token * activation
    reference = reference_batch_tokens * kept_per_token * width
    if estimator == "exact":
        reference = reference_batch_tokens * (4 * shape.hidden + 3 * shape.intermediate) * width  # a forward pass
    elif estimator == "linear":  # a batch of examples has as many tokens as one of reference examples
        example_tokens = max(max_length, reference_batch_tokens)
        example = example_tokens * kept_per_token * activation
    else:
        # Inputs and output gradients of the linear layers, for as many tokens as the longest example has.
        factors_per_token = shape.layers * (8 * shape.hidden + 3 * shape.intermediate) + shape.vocabulary
        example += max_length * factors_per_token * activation
    copies = 0
    if dtype == "mixed":
        # Autocast casts the weight of each linear layer in the pass over an example, which keeps it until its end. Other
        # estimators have cast most of them before.
        copies = 2 * (shape.parameters - shape.looked_up - (0 if estimator == "exact" else shape.linear))
    passes: dict[Phase, tuple[int, int, int]] = {
        "opening": (reference_batch_tokens, reference, 0),
        "measuring": (example_tokens, example, copies),
    }
    if estimator == "exact":  # it also evaluates the reference set for each example
        most = max(example, reference)
        tokens = max(max_length, reference_batch_tokens)
        passes["measuring"] = tokens, most, max(0, example + copies - most)
    elif estimator == "steps":
        passes["opening"] = 0, 0, 0
    needs = []
    for phase, (tokens, activations, copied) in passes.items():
        logits = 3 * 4 * min(tokens * shape.vocabulary, LOGITS_AT_A_TIME)
        for name, size in ((_ACTIVATIONS, activations), ("logits", logits), (_BF16_COPIES, copied)):
            if size:
                needs.append(Need(name, size, "device", (phase,)))
    return needs


def _sum(needs: Iterable[Need], home: Home, phase: Phase) -> int:
    return sum(need.size for need in needs if need.home_while(phase) == home)


def _peak(needs: Sequence[Need], home: Home, phases: tuple[Phase, ...] = _LOADING + PHASES) -> int:
    return max(_sum(needs, home, phase) for phase in phases)

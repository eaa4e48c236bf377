"""What the influence of a student takes in memory, and what goes where (`montessori plan`).

Weights must be on the device; so must the activations of a pass and one gradient at a time. Moments, snapshot and gradients
are read once per example, piece by piece, so they may live in (pinned) host memory at the price of the copies. They
stay on the device in the order in which a byte saves most, for as long as they fit.
"""

from dataclasses import dataclass
from typing import Any, Literal

from montessori_core.influence.losses import LOGITS_AT_A_TIME
from montessori_core.influence.student import ON_DEVICE, Home, Placement

GB = 1e9
_SPARE = 0.92
"""Share of a device's memory that is planned with; the rest is left to the CUDA context and to fragmentation."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory.

    Attributes:
        parameters: all of them.
        trained: those a step moves (all, or a LoRA adapter's).
        largest: elements of the largest of these.
        layers, hidden, intermediate, vocabulary: of the architecture.
    """

    parameters: int
    trained: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @staticmethod
    def of(model: Any) -> "Shape":
        """The shape of a model, which may be on the meta device."""
        whole = model.get_base_model() if hasattr(model, "peft_config") else model
        config = whole.config.get_text_config()
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        return Shape(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(trained),
            largest=max(trained),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class Need:
    """Something that takes memory: bytes, and where it lives."""

    name: str
    size: int
    home: Home


@dataclass(frozen=True)
class MemoryPlan:
    """What lives where.

    Attributes:
        needs: all of it.
        device_limit: bytes the device has.
        fits: what must be on the device does fit there.
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
        """Whether what must be on the device fits there."""
        return self.device <= self.device_limit * _SPARE

    @property
    def placement(self) -> Placement:
        """For `ResidentStudent`."""
        homes = {need.name: need.home for need in self.needs}
        return {kind: homes.get(kind, "device") for kind in ON_DEVICE}


def plan_memory(
    shape: Shape,
    estimator: Literal["exact", "first_order"],
    dtype: Literal["float32", "mixed", "bfloat16"],
    max_length: int,
    reference_batch_tokens: int,
    device_limit: int,
) -> MemoryPlan:
    """Plan one worker.

    Args:
        shape: of the student.
        estimator: 'exact' needs the snapshot; 'first_order' needs the reference gradient, that of half the reference set in
            bf16, and the snapshot until it has them.
        dtype: see `config.Influence`.
        max_length: tokens of the longest example.
        reference_batch_tokens: tokens of a batch of reference examples.
        device_limit: bytes of the device.
    """
    width = 2 if dtype == "bfloat16" else 4
    activation = 2 if dtype in ("bfloat16", "mixed") else 4
    logits = min(max(max_length, reference_batch_tokens) * shape.vocabulary, LOGITS_AT_A_TIME) * 4
    kept_per_token = shape.layers * (8 * shape.hidden + 4 * shape.intermediate)
    learning = max_length * kept_per_token * activation
    if estimator == "first_order":
        learning = max(learning, reference_batch_tokens * kept_per_token * width)
    passing = reference_batch_tokens * (4 * shape.hidden + 3 * shape.intermediate) * width
    needs = [
        Need("weights", shape.parameters * width, "device"),
        Need("one gradient", shape.largest * width, "device"),
        Need("activations", max(learning, passing), "device"),
        Need("logits", 3 * logits, "device"),
    ]
    movable = {"moments": 2 * width, "snapshot": width}
    if estimator == "first_order":
        movable = {"moments": 2 * width, "reference gradient": width, "half gradient": 2, "snapshot": width}
    for name, bytes_each in movable.items():
        size = bytes_each * shape.trained
        taken = sum(need.size for need in needs if need.home == "device")
        needs.append(Need(name, size, "device" if taken + size <= device_limit * _SPARE else "host"))
    return MemoryPlan(tuple(needs), device_limit)

"""Plan the memory of a teacher update (`montessori plan --teacher`): sizes of the tensors in one process on a GPU.

Forward and backward passes use bf16 copies of the weights. Only trained weights have fp32 masters, accumulated gradients and
AdamW's moments. The reference needs no second teacher.
"""

from dataclasses import dataclass

from montessori_core.models.shape import Shape

_NF4 = (
    4 + 8 / 64 + 32 / (64 * 256)
) / 8  # bytes of a weight: 4 bits, and a scale for 64 of them that is quantized itself
_SCORED, _VOCABULARY = 4096, 32768  # largest tile of logits in TRL's fused head


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes of a process, by kind of tensor."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return self.weights + self.gradients + self.optimizer + self.activations


def plan_update(
    shape: Shape, stage: int, processes: int, pair_tokens: int, quantization: str | None = None
) -> UpdateMemory:
    """Plan the memory of one process.

    Args:
        shape: shape of the teacher; `trained` are all weights, or those of an adapter.
        stage: ZeRO stage, 1 to 3: partitions the optimizer, also gradients, also weights.
        processes: number of processes, each with a GPU.
        pair_tokens: tokens of a micro-batch of pairs; a prompt counts once.
        quantization: see `TeacherUpdate.quantization`; embeddings and the output layer keep bf16.
    """
    in_bf16 = 2 * shape.vocabulary * shape.hidden if quantization else shape.parameters
    in_four_bits = max(0, shape.parameters - in_bf16)
    inputs_of_layers = shape.layers * shape.hidden
    logits = 4 * min(pair_tokens, _SCORED) * min(shape.vocabulary, _VOCABULARY)
    return UpdateMemory(
        weights=(2 * in_bf16 + int(_NF4 * in_four_bits)) // (processes if stage == 3 else 1),
        gradients=2 * shape.trained // (processes if stage >= 2 else 1) + 4 * shape.trained // processes,
        optimizer=12 * shape.trained // processes,
        activations=2 * pair_tokens * (inputs_of_layers + 2 * shape.kept_per_layer) + 2 * logits,
    )

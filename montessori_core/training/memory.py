"""Plan the memory of a teacher update (`montessori plan --teacher`): sizes of the tensors in one process on a GPU.

Forward and backward passes use bf16 copies of the weights. Only trained weights have fp32 masters, accumulated gradients and
AdamW's moments. The reference needs no second teacher. Terms of DeepSpeed are those of its version 0.19.
"""

from dataclasses import dataclass

from montessori_core.models.shape import Shape

_NF4 = (
    4 + 8 / 64 + 32 / (64 * 256)
) / 8  # bytes of a weight: 4 bits, and a scale for 64 of them that is quantized itself
_SCORED, _VOCABULARY = 4096, 32768  # largest tile of logits in TRL's fused head
BUCKET = 50_000_000
"""Elements of gradients that are reduced together; a larger gradient is reduced alone."""
_SUB_GROUP = 1_000_000_000  # elements of a process that AdamW updates together in stage 3


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes of a process, by kind of tensor.

    Attributes:
        weights, gradients, optimizer: partitions of the process.
        buckets: gradients that are being reduced.
        temporary: activations of a pass, or what AdamW's step allocates when they are freed: the larger of the two.
    """

    weights: int
    gradients: int
    buckets: int
    optimizer: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return self.weights + self.gradients + self.buckets + self.optimizer + self.temporary


def plan_update(
    shape: Shape,
    stage: int,
    processes: int,
    pair_tokens: int,
    quantization: str | None = None,
    offload: bool = False,
) -> UpdateMemory:
    """Plan the memory of one process.

    Args:
        shape: shape of the teacher; `trained` are all weights, or those of an adapter.
        stage: ZeRO stage, 1 to 3: partitions the optimizer, also gradients, also weights.
        processes: number of processes, each with a GPU.
        pair_tokens: tokens of a micro-batch of pairs; a prompt counts once.
        quantization: see `TeacherUpdate.quantization`; embeddings and the output layer keep bf16.
        offload: whether the optimizer is in host memory, as are the gradients of stage 3.
    """
    in_bf16 = 2 * shape.vocabulary * shape.hidden if quantization else shape.parameters
    in_four_bits = max(0, shape.parameters - in_bf16)
    inputs_of_layers = shape.layers * shape.hidden
    logits = 4 * min(pair_tokens, _SCORED) * min(shape.vocabulary, _VOCABULARY)
    activations = 2 * pair_tokens * (inputs_of_layers + 2 * shape.kept_per_layer) + 2 * logits
    updated = shape.trained // processes
    # The root of the second moment; in stage 3 also a copy of the gradient, but both of one sub-group at a time.
    step = 8 * min(updated, _SUB_GROUP) if stage == 3 else 4 * updated
    # Stage 1 accumulates all gradients, and drops those in bf16 one by one.
    accumulated = {1: 4 * shape.trained, 2: 4 * updated, 3: 0 if offload else 4 * updated}[stage]
    return UpdateMemory(
        weights=(2 * in_bf16 + int(_NF4 * in_four_bits)) // (processes if stage == 3 else 1),
        gradients=2 * shape.trained // (processes if stage >= 2 else 1) + accumulated,
        # Two buffers of bf16, or one of fp32; what is reduced in fp32, and the bf16 gradient of a large parameter.
        buckets=4 * BUCKET + 6 * max(BUCKET, shape.largest),
        optimizer=0 if offload else 12 * updated,
        temporary=max(activations, 0 if offload else step),
    )

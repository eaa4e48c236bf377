"""How vLLM shares the GPUs of a job: tensor parallelism within a copy of the model, and copies. Works without torch.

A copy on fewer GPUs wastes no time on communication, so a copy takes as few GPUs as hold it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_core.config import Vllm
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.models.fetch import full_model
from montessori_core.models.fingerprints import count_weights

DEFAULT_SHARE = 0.9  # of a GPU's memory; vLLM's default is 0.9 or a little more
_WEIGHTS_SHARE = 0.7  # of vLLM's memory; the rest is for activations and the cache
_SHORTEST = 1024  # tokens; a shorter limit saves nothing


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that decide how it is shared.

    Attributes:
        weights: bytes of the weights in bfloat16.
        heads, key_heads: attention heads of queries, and of keys and values; 0 without attention.
        token: bytes of the keys and values of a token in bfloat16, if every layer has full attention.
    """

    weights: int
    heads: int
    key_heads: int
    token: int

    @staticmethod
    def of(folder: Path) -> "ModelSize":
        """Read the sizes of a model on disk, or of an adapter's base model."""
        folder = full_model(folder)
        return ModelSize.from_config(read_json(folder / "config.json") or {}, count_weights(folder))

    @staticmethod
    def from_config(config: Mapping[str, Any], parameters: int) -> "ModelSize":
        """Return the sizes of a model with this config.json and number of parameters."""
        config = config.get("text_config") or config
        heads = int(config.get("num_attention_heads") or config.get("n_head") or 0)
        key_heads = int(config.get("num_key_value_heads") or heads)
        hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
        size = int(config.get("head_dim") or (hidden // heads if heads else 0))
        layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
        return ModelSize(2 * parameters, heads, key_heads, 2 * 2 * layers * key_heads * size)

    def divides(self, gpus: int) -> bool:
        """Return whether the model can be shared by this number of GPUs; key heads may be copied."""
        return self.heads % gpus == 0 and (self.key_heads % gpus == 0 or gpus % self.key_heads == 0)


@dataclass(frozen=True)
class Parallelism:
    """GPUs of a copy of the model, and number of copies."""

    tensor: int
    data: int


def choose_parallelism(size: ModelSize, gpus: int, memory: int, settings: Vllm) -> Parallelism:
    """Return how a job shares its GPUs.

    Args:
        size: sizes of the model.
        gpus: number of GPUs; 0 on a CPU.
        memory: bytes of a GPU.
        settings: settings that are not derived.

    Raises:
        UserError: a setting does not fit the model or the GPUs.
    """
    tensor = settings.tensor_parallel
    if tensor is None:
        possible = [number for number in range(1, gpus // (settings.data_parallel or 1) + 1) if size.divides(number)]
        room = _WEIGHTS_SHARE * (settings.memory_share or DEFAULT_SHARE) * memory
        tensor = next((number for number in possible if size.weights / number <= room), max(possible, default=1))
    elif not size.divides(tensor):
        heads = f"{size.heads} attention heads, {size.key_heads} of keys"
        raise UserError(f"cluster.vllm.tensor_parallel={tensor} does not divide the teacher's {heads}; set a divisor")
    data = settings.data_parallel or max(1, gpus // tensor)
    if tensor * data > gpus if gpus else tensor > 1:  # copies may share a CPU
        raise UserError(
            f"cluster.vllm: tensor_parallel {tensor} x data_parallel {data} need {tensor * data} GPUs, and a generation job "
            f"has {gpus}; lower them or raise cluster.resources.generation.gpus_per_node"
        )
    return Parallelism(tensor, data)


def choose_length(longest: int, written: int, positions: int | None, setting: int | None) -> int:
    """Return vLLM's `max_model_len`: room for the longest prompt and its continuation.

    Jobs with prompts of similar lengths get the same power of two.

    Args:
        longest: tokens of the longest prompt, fewer than the model's positions.
        written: most tokens of a continuation.
        positions: positions of the model; None: not limited.
        setting: `cluster.vllm.max_model_len`.

    Raises:
        UserError: the longest prompt does not fit into the setting.
    """
    length = setting or max(_SHORTEST, 1 << (longest + written - 1).bit_length())
    length = length if positions is None else min(length, positions)
    if longest >= length:
        raise UserError(
            f"a prompt has {longest} tokens, but cluster.vllm.max_model_len allows {setting} for prompt and output; raise it "
            "or shorten the prompts"
        )
    return length

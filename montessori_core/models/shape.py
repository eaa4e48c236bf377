"""Dimensions of a model that determine its memory."""

from dataclasses import dataclass
from typing import Any

from montessori_core.errors import UserError
from montessori_core.formatting import first_names

GB = 1e9  # bytes
USABLE = 0.92
"""Share of a device's memory that a plan uses; the rest is for the CUDA context and for fragmentation."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model that determine the memory of its training.

    Attributes:
        parameters: number of all parameters.
        trained: number of trained parameters (all, or those of a LoRA adapter).
        largest: elements of the largest trained tensor.
        layers, hidden, vocabulary: dimensions of the architecture.
        intermediate: inner dimension of all experts together that compute one token; of a dense model, that of its only one.
        experts: number of routed experts that compute one token; 0 for a dense model.
        looked_up: elements of embeddings that are not the vocabulary projection, too.
        linear: elements of `parameters_of_linear_layers`.
        token_rows: trained elements of embeddings and vocabulary projection.
    """

    parameters: int
    trained: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    looked_up: int
    linear: int
    token_rows: int
    experts: int = 0

    @property
    def kept_per_layer(self) -> int:
        """Numbers that a layer keeps of a token in the forward pass, for the backward pass."""
        return (8 + 2 * self.experts) * self.hidden + 4 * self.intermediate  # experts copy a token and its output

    @staticmethod
    def of(model: Any) -> "Shape":
        """Return the shape of a model, which may be on the meta device.

        Raises:
            UserError: the model has no single hidden size or number of layers, such as BLT, which is several models.
        """
        from montessori_core.models.linear_layers import (
            parameters_of_linear_layers,  # with torch, which the driver lacks
        )

        causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
        config = causal_lm.config.get_text_config()
        if missing := [
            name for name in ("num_hidden_layers", "hidden_size", "vocab_size") if not hasattr(config, name)
        ]:
            raise UserError(
                f"models of type {config.model_type!r} have no {first_names(missing)} in config.json, so that their memory "
                "cannot be planned; use a model of another type"
            )
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        embeddings, projection = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
        tables = [projection] if embeddings is projection else [projection, embeddings]
        return Shape(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(trained),
            largest=max(trained),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=_intermediate(config),
            vocabulary=config.vocab_size,
            looked_up=sum(table.numel() for table in tables[1:]),
            linear=sum(p.numel() for p in parameters_of_linear_layers(model)),
            token_rows=sum(table.numel() for table in tables if table.requires_grad),
            experts=_experts(config),
        )


def _experts(config: Any) -> int:
    """Return how many routed experts compute a token."""
    return _first_of(config, "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")


def _intermediate(config: Any) -> int:
    """Return the inner dimension of all that computes one token in a feed-forward layer."""
    dense = _first_of(config, "intermediate_size", "ffn_hidden_size") or 4 * config.hidden_size
    if not _experts(config):
        return dense
    expert = _first_of(config, "moe_intermediate_size") or dense
    always = _first_of(config, "shared_expert_intermediate_size", "shared_intermediate_size")  # Qwen 2 MoE; Granite MoE
    always += expert * _first_of(config, "n_shared_experts", "moe_num_shared_experts")
    routed = _experts(config) * expert + always
    if getattr(config, "enable_moe_block", False):  # Gemma 4 adds experts to the dense layer
        return dense + routed
    return max(dense if expert != dense else 0, routed)


def _first_of(config: Any, *names: str) -> int:
    """Return the first of these settings that a configuration, or its section of feed-forward layers, has; else 0.

    Of a setting with a value for each layer it is the largest.
    """
    sections = config, getattr(config, "ffn_config", None)  # DBRX
    value = next(filter(None, (getattr(part, name, None) for part in sections for name in names)), 0)
    return max(value) if isinstance(value, list | tuple) else value  # Gemma 3n

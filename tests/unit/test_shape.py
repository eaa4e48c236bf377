"""The shape of a model, which its memory is planned from."""

import pytest
import torch
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    BltConfig,
    DbrxConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from montessori_core.errors import UserError
from montessori_core.models.shape import Shape

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 20}
ATTENTION = {"kv_n_heads": 2, "rope_theta": 1e4}
DBRX = {"ffn_hidden_size": 8, "moe_top_k": 2, "hidden_size": 16}


@pytest.mark.parametrize(
    ("config", "experts", "intermediate"),
    [
        (LlamaConfig(**SIZES, intermediate_size=20), 0, 20),
        (MixtralConfig(**SIZES, intermediate_size=8, num_experts_per_tok=2), 2, 16),
        (Qwen2MoeConfig(**SIZES, **ROUTED, shared_expert_intermediate_size=12), 2, 28),
        (DeepseekV3Config(**SIZES, **ROUTED, n_shared_experts=1, n_group=1, topk_group=1), 2, 24),
        (AriaTextConfig(**SIZES, intermediate_size=8, moe_topk=2, moe_num_shared_experts=2), 2, 32),
        (DbrxConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=32, ffn_config=DBRX, attn_config=ATTENTION), 2, 16),
        (
            Gemma3nTextConfig(
                **SIZES,
                intermediate_size=[20, 24],
                vocab_size_per_layer_input=32,
                laurel_rank=2,
                num_kv_shared_layers=0,
            ),
            0,
            24,
        ),
        (
            Gemma4TextConfig(
                **SIZES,
                enable_moe_block=True,
                num_experts=4,
                top_k_experts=2,
                moe_intermediate_size=8,
                intermediate_size=20,
            ),
            2,
            36,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else None,
)
def test_shape_counts_what_computes_a_token(config: PreTrainedConfig, experts: int, intermediate: int) -> None:
    with torch.device("meta"):
        shape = Shape.of(AutoModelForCausalLM.from_config(config))
    assert (shape.experts, shape.intermediate) == (experts, intermediate)


def test_model_of_several_models_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BltConfig())
    with pytest.raises(UserError, match=r"type 'blt' have no hidden_size, num_hidden_layers in .*of another type"):
        Shape.of(model)

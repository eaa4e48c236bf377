"""Tiny random models with recurrent layers, one for each kind of state that transformers has.

Jamba has Mamba layers of the first version, Granite 4 of the second; Qwen 3.5 has gated delta rules, LFM2 short convolutions,
and Falcon-H1 attention and recurrence in one layer. Those of `UNCACHED` keep their states outside the cache of transformers,
or in a cache of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    xLSTMConfig,
)

_ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LAYERS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3, **_ENDS}
_HYBRID: dict[str, Any] = {
    **_LAYERS,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_ALTERNATING = ["linear_attention", "full_attention"] * 2
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

CACHED: dict[str, Callable[[], Any]] = {
    "mamba": lambda: MambaConfig(**_LAYERS, state_size=4),
    "mamba2": lambda: Mamba2Config(**_LAYERS, state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=16),
    "jamba": lambda: JambaConfig(
        **_HYBRID,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "granite-hybrid": lambda: GraniteMoeHybridConfig(
        **_HYBRID, **_MAMBA2, **_EXPERTS, layer_types=_ALTERNATING, shared_intermediate_size=64
    ),
    "falcon-h1": lambda: FalconH1Config(**_HYBRID, **_MAMBA2, mamba_d_ssm=128),
    "qwen3.5": lambda: Qwen3_5TextConfig(
        **_HYBRID,
        layer_types=_ALTERNATING,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "lfm2": lambda: Lfm2Config(**_HYBRID, layer_types=["conv", "full_attention"] * 2),
}
UNCACHED: dict[str, Callable[[], Any]] = {
    "recurrent-gemma": lambda: RecurrentGemmaConfig(
        **_HYBRID | {"num_key_value_heads": 1}, lru_width=64, attention_window_size=8
    ),
    "minimax": lambda: MiniMaxConfig(**_HYBRID, **_EXPERTS, layer_types=_ALTERNATING, block_size=8),
    "rwkv": lambda: RwkvConfig(
        hidden_size=64, num_hidden_layers=2, attention_hidden_size=64, intermediate_size=96, **_ENDS
    ),
    "xlstm": lambda: xLSTMConfig(hidden_size=64, num_hidden_layers=2, num_heads=4, **_ENDS),
}


def recurrent_model(name: str, vocabulary: int) -> Any:
    """Return a model in float32 with random weights."""
    torch.manual_seed(0)
    config = (CACHED | UNCACHED)[name]()
    config.vocab_size = vocabulary
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

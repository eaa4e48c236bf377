"""How vLLM shares GPUs, and how long its sequences may be."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from montessori_core.config import Synthesis, Vllm
from montessori_core.errors import UserError
from montessori_core.synthesis.generation import open_engine
from montessori_core.synthesis.vllm_parallelism import ModelSize, Parallelism, choose_length, choose_parallelism

GB = 10**9
SMALL = ModelSize(weights=270 * 10**6, heads=9, key_heads=3, token=0)  # SmolLM2-135M
LLAMA_8B = ModelSize(weights=16 * GB, heads=32, key_heads=8, token=0)
LLAMA_70B = ModelSize(weights=141 * GB, heads=64, key_heads=8, token=0)


@pytest.mark.parametrize(
    ("size", "gpus", "memory", "expected"),
    [
        (SMALL, 0, 0, (1, 1)),
        (SMALL, 2, 24, (1, 2)),  # two GPUs do not divide nine heads
        (LLAMA_8B, 1, 24, (1, 1)),
        (LLAMA_8B, 4, 24, (2, 2)),  # 16 GB of weights leave no room for a cache on 24 GB
        (LLAMA_8B, 8, 80, (1, 8)),
        (LLAMA_70B, 8, 80, (4, 2)),
        (LLAMA_70B, 6, 80, (4, 1)),
        (LLAMA_70B, 2, 80, (2, 1)),  # does not fit: vLLM says by how much
    ],
)
def test_copy_takes_few_gpus_that_divide_heads(
    size: ModelSize, gpus: int, memory: int, expected: tuple[int, int]
) -> None:
    assert choose_parallelism(size, gpus, memory * GB, Vllm()) == Parallelism(*expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tensor_parallel": 4}, (4, 2)),
        ({"data_parallel": 2}, (1, 2)),
        ({"tensor_parallel": 2, "data_parallel": 3}, (2, 3)),
        ({"memory_share": 0.2}, (2, 4)),
    ],
)
def test_settings_replace_derived_parallelism(settings: dict[str, Any], expected: tuple[int, int]) -> None:
    assert choose_parallelism(LLAMA_8B, 8, 80 * GB, Vllm(**settings)) == Parallelism(*expected)


@pytest.mark.parametrize(
    ("size", "gpus", "settings", "message"),
    [
        (
            SMALL,
            2,
            {"tensor_parallel": 2},
            "tensor_parallel=2 does not divide the teacher's 9 attention heads, 3 of keys",
        ),
        (LLAMA_8B, 4, {"tensor_parallel": 4, "data_parallel": 2}, "need 8 GPUs, and a generation job has 4"),
        (LLAMA_8B, 2, {"data_parallel": 3}, "need 3 GPUs, and a generation job has 2"),
        (LLAMA_8B, 0, {"tensor_parallel": 2}, "need 2 GPUs, and a generation job has 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    size: ModelSize, gpus: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_parallelism(size, gpus, 80 * GB, Vllm(**settings))


@pytest.mark.parametrize(
    ("longest", "positions", "setting", "expected"),
    [
        (200, None, None, 1024),
        (1500, 131072, None, 4096),
        (3073, 131072, None, 8192),
        (1500, 2048, None, 2048),
        (1500, 131072, 3000, 3000),
    ],
)
def test_length_is_that_of_prompts_and_answers(
    longest: int, positions: int | None, setting: int | None, expected: int
) -> None:
    assert choose_length(longest, 1024 if longest > 1000 else 100, positions, setting) == expected


def test_too_long_prompt_names_its_limit() -> None:
    with pytest.raises(UserError, match="600 tokens, but cluster.vllm.max_model_len allows 600 .* raise it or shorten"):
        choose_length(600, 10, 2048, 600)


def test_sizes_are_read_from_a_folder(smollm2: Path, tmp_path: Path) -> None:
    size = ModelSize.of(smollm2)
    assert (size.weights, size.heads, size.key_heads) == (2 * 134_515_008, 9, 3)
    assert size.token == 2 * 2 * 30 * 3 * 64
    config = json.loads((smollm2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    (tmp_path / "model.safetensors").symlink_to(smollm2 / "model.safetensors")
    assert ModelSize.of(tmp_path) == size


def test_engine_options_are_vllms(tiny_llama: Path) -> None:
    with pytest.raises(ValidationError, match=r"engine_options.max_model_len: set cluster.vllm.max_model_len"):
        Synthesis(engine_options={"max_model_len": 4096})
    for name in ("trust_remote_code", "load_format", "worker_cls"):
        with pytest.raises(ValidationError, match=f"engine_options.{name}: "):
            Synthesis(engine_options={name: True})
    with pytest.raises(ValidationError, match="engine_options are vLLM's, but engine is transformers"):
        Synthesis(engine="transformers", engine_options={"max_num_seqs": 8})
    with pytest.raises(UserError, match="engine_options are vLLM's, which is not installed here"):
        open_engine("auto", str(tiny_llama), None, options={"max_num_seqs": 8})

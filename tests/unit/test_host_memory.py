"""Host memory of an influence job: few bytes beyond the tensors, and the limit of the job."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from montessori_core.influence.host_memory import host_memory_limit, pack, pinned_tensors

LLAMA_3_8B = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8)
QWEN_2_5_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)


@pytest.mark.parametrize("config", [LLAMA_3_8B, QWEN_2_5_7B], ids=["llama", "qwen"])
@pytest.mark.parametrize("width", [2, 4])
def test_pinned_blocks_are_hardly_larger_than_tensors(config: LlamaConfig | Qwen2Config, width: int) -> None:
    """Pinned one by one, and rounded up to powers of two, they would take 1.1 and 1.9 times their bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [width * parameter.numel() for parameter in model.parameters()]
    blocks, _ = pack(sizes)
    assert all(math.log2(block).is_integer() for block in blocks)
    assert sum(sizes) <= sum(blocks) < 1.01 * sum(sizes)
    assert sum(1 << (size - 1).bit_length() for size in sizes) > 1.09 * sum(sizes)


def test_tensors_in_shared_blocks_do_not_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {str(n): torch.randn(n % 7 + 1, 3 * n + 1, generator=generator) for n in range(40)}
    values |= {"number": torch.ones(()), "bf16": torch.randn(5, 7, generator=generator).bfloat16()}
    sizes: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    formats = {name: (value.shape, value.dtype) for name, value in values.items()}
    placed = {name: tensor.copy_(values[name]) for name, tensor in pinned_tensors(formats, allocate).items()}
    assert all(placed[name].is_contiguous() and placed[name].equal(values[name]) for name in values)
    assert len(sizes) < len(values) / 2


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/slurm/job_7/step_0\n", "slurm/job_7/memory.max"),
        ("0::/\n", "memory.max"),
        ("4:cpu,cpuacct:/x\n3:memory:/slurm/job_7\n0::/\n", "memory/slurm/job_7/memory.limit_in_bytes"),
    ],
    ids=["of a group above", "in a container", "version 1"],
)
def test_host_memory_limit_is_that_of_control_group(tmp_path: Path, membership: str, file: str) -> None:
    named = tmp_path / "membership"
    named.write_text(membership)
    machine = host_memory_limit(tmp_path, named)
    assert machine > 1 << 28
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("max\n")
    assert host_memory_limit(tmp_path, named) == machine
    (tmp_path / file).write_text("1000000\n")
    assert host_memory_limit(tmp_path, named) == 1_000_000

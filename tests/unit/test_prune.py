"""Pruned models: what they compute, what they keep, and which are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.smollm3 import SmolLM3Config
from transformers.models.t5 import T5Config

from flows.cli.prune import parse_layers
from montessori_core.errors import UserError
from montessori_core.models.fetch import fingerprint
from montessori_core.models.fingerprints import hash_model
from montessori_core.models.load import load_model
from montessori_core.models.prune import prune_model
from support.runs import invoke

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=3),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=3, sliding_window_pattern=3),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "gpt2": GPT2Config(n_layer=6, n_embd=32, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2),
}


def save(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **options)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None]).logits


def skip(layer: torch.nn.Module) -> None:
    """Make a layer return what it is given."""

    def return_input(_: object, given: tuple[Any, ...], output: Any) -> Any:
        return (given[0], *output[1:]) if isinstance(output, tuple) else given[0]

    layer.register_forward_hook(return_input)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_pruned_model_computes_what_the_other_layers_do(config: PretrainedConfig, tmp_path: Path) -> None:
    original = save(config, tmp_path / "original")
    parameters = prune_model(original, {1, 2, 4}, tmp_path / "pruned")
    pruned = load_model(str(tmp_path / "pruned"), torch.float32)
    assert pruned.config.num_hidden_layers == 3
    assert sum(parameter.numel() for parameter in pruned.parameters()) == parameters
    skipping = load_model(str(original), torch.float32)
    before = logits(skipping)
    layers = skipping.transformer.h if config.model_type == "gpt2" else skipping.model.layers
    for layer in (1, 2, 4):
        skip(layers[layer])
    torch.testing.assert_close(logits(pruned), logits(skipping))
    assert not torch.allclose(logits(pruned), before, atol=1e-4)


def test_settings_of_layers_follow_them(tmp_path: Path) -> None:
    for name in ("qwen2", "smollm3"):
        prune_model(save(MODELS[name], tmp_path / name), {1, 2}, tmp_path / f"{name}-pruned")
    qwen2, smollm3 = (json.loads((tmp_path / f"{n}-pruned/config.json").read_text()) for n in ("qwen2", "smollm3"))
    assert qwen2["layer_types"] == ["full_attention"] + ["sliding_attention"] * 3
    assert qwen2["max_window_layers"] == 1
    assert smollm3["no_rope_layers"] == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_are_copied_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    original = save(MODELS["llama"], tmp_path / "original", dtype)
    prune_model(original, range(1, 5), tmp_path / "pruned")
    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "pruned"))
    assert "lm_head.weight" not in after  # tied
    assert len(after) < len(before)
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, before[name.replace("layers.1.", "layers.5.")])
    assert json.loads((tmp_path / "pruned/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_sharded_model_is_pruned_like_a_whole_one(tmp_path: Path) -> None:
    whole = save(MODELS["untied"], tmp_path / "whole")
    sharded = save(MODELS["untied"], tmp_path / "sharded", max_shard_size="20KB")
    assert not (sharded / "model.safetensors").exists()
    for folder in (whole, sharded):
        prune_model(folder, {0, 3, 5}, folder.with_suffix(".pruned"))
    assert hash_model(tmp_path / "sharded.pruned") == hash_model(tmp_path / "whole.pruned")
    assert torch.equal(
        *(logits(load_model(str(tmp_path / f"{name}.pruned"), torch.float32)) for name in ("sharded", "whole"))
    )


def test_prune_command_keeps_the_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    code, output = invoke("model", "prune", str(tiny_llama), "--layers", "1", "--out", str(out), cwd=tmp_path)
    assert code == 0, output
    assert f"{sum(p.numel() for p in load_model(str(out), torch.float32).parameters()):,} parameters remain" in output
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_llama / name).read_bytes()
    prune_model(tiny_llama, {1}, tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(out) == hash_model(out) != fingerprint(tiny_llama)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layers to remove; name them, for example 12-19 (the model has 2 layers, 0 to 1)"),
        (["--layers", "1-2"], "there is no layer 2: the model has 2 layers, 0 to 1"),
        (["--layers", "0-1"], "all layers would be removed; keep at least one"),
        (["--layers", "1-x"], "--layers: '1-x' is neither a number nor a range"),
        (["--layers", "1-0"], "--layers: '1-0' is neither a number nor a range"),
    ],
)
def test_prune_command_refuses_layers(layers: list[str], message: str, tiny_llama: Path, tmp_path: Path) -> None:
    code, output = invoke("model", "prune", str(tiny_llama), "--out", str(tmp_path / "pruned"), *layers, cwd=tmp_path)
    assert code == 1
    assert message in " ".join(output.split())
    assert not list(tmp_path.iterdir())


def test_prune_refuses_folders(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; name a new folder"):
        prune_model(tiny_llama, {1}, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="a LoRA adapter"):
        prune_model(tmp_path, {1}, tmp_path / "pruned")
    deeper = shutil.copytree(tiny_llama, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="the weights do not hold model.layers.0 to model.layers.2"):
        prune_model(deeper, {1}, tmp_path / "pruned")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(num_layers=6), "t5 is no causal language model"),
        (Gemma3Config(), "its configuration has no num_hidden_layers"),
        (LlamaConfig(**SIZES, quantization_config={"quant_method": "fp8"}), "is quantised"),
        (
            Qwen3MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=8, decoder_sparse_step=2),
            r"layer 1 would become layer 0.*another role",
        ),
        (
            GPT2Config(n_layer=6, n_embd=32, n_head=4, vocab_size=64, scale_attn_by_inverse_layer_idx=True),
            r"layer 1 would become layer 0.*scal",
        ),
    ],
    ids=["encoder and decoder", "image model", "quantised", "experts in every second", "scaled by number"],
)
def test_prune_refuses_architectures(config: PretrainedConfig, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        prune_model(tmp_path / "model", {0}, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_parse_layers_reads_ranges() -> None:
    assert parse_layers("3, 7,12-14") == {3, 7, 12, 13, 14}

"""Weights that are missing from a model's files, or that the model does not use, are refused: they would be random."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from montessori_core.config import Lora
from montessori_core.errors import UserError
from montessori_core.models.adapters import ADAPTER
from montessori_core.models.load import load_model, with_lora
from montessori_core.models.weight_names import check_weight_files

Weights = dict[str, Any]
NORM = "model.layers.1.input_layernorm.weight"


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def inner(weights: Weights) -> Weights:
    return {name.replace(".0.", ".0._orig_mod."): tensor for name, tensor in weights.items()}


def one_layer(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(model: Path, edit: Callable[[Weights], Weights]) -> None:
    save_file(edit(load_file(model / "model.safetensors")), model / "model.safetensors", metadata={"format": "pt"})


def misspelled(weights: Weights) -> Weights:
    return {name.replace("q_proj", "query"): tensor for name, tensor in weights.items()}


WRAPPED = {
    "DDP": renamed("module."),
    "torch.compile": renamed("_orig_mod."),
    "FSDP": renamed("_fsdp_wrapped_module."),
    "PEFT": renamed("base_model.model."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrappers_are_refused_before_jobs(model: Path, wrapper: str) -> None:
    check_weight_files(model)
    change(model, WRAPPED[wrapper])
    with pytest.raises(UserError, match=f"20 of 20 weights have names that {wrapper} gives them: .*embed_tokens"):
        check_weight_files(model)


@pytest.mark.parametrize(("edit", "message"), [(inner, "9 of 20 .* torch.compile"), (one_layer, r"1 of .*layers\.1;")])
def test_partly_wrong_files_are_refused_before_jobs(
    model: Path, edit: Callable[[Weights], Weights], message: str
) -> None:
    change(model, edit)
    with pytest.raises(UserError, match=message):
        check_weight_files(model)


def test_index_and_files_must_agree(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    check_weight_files(model)
    index["weight_map"]["lm_head.weight"] = "model-1.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"1 weights are in .* but not in both: lm_head.weight"):
        check_weight_files(model)
    index["weight_map"]["lm_head.weight"] = "model-2.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-2.safetensors of .* are missing"):
        check_weight_files(model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            renamed("module."),
            "21 of 21 weights are not in its files: lm_head.weight, .*; 20 weights in its files are not",
        ),
        (one_layer, r"9 of 21 weights are not in its files: model\.layers\.1"),
        (misspelled, r"2 of 21 weights are not in its files.*2 weights in its files are not in the model: .*query"),
        (lambda weights: weights | {"model.extra": torch.zeros(2)}, "1 weights in its files are not in the model"),
        (lambda weights: weights | {NORM: torch.zeros(3)}, rf"another shape.*{NORM}: \[3\] instead of \[64\]"),
        (lambda weights: {k: v for k, v in weights.items() if "embed" not in k}, "2 of 21 .*embed_tokens"),
    ],
    ids=["wrapper", "layer", "misspelled", "extra", "shape", "tied pair"],
)
def test_random_or_unused_weights_are_refused(model: Path, edit: Callable[[Weights], Weights], message: str) -> None:
    change(model, edit)
    with pytest.raises(UserError, match=message):
        load_model(str(model), torch.float32)


def test_output_layer_beside_tied_embeddings_is_refused(model: Path) -> None:
    change(model, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1.0})
    with pytest.raises(UserError, match=r"tie_word_embeddings.*two different ones"):
        load_model(str(model), torch.float32)


@pytest.mark.parametrize(
    "edit",
    [
        lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)},
        lambda weights: {name.removeprefix("model."): tensor for name, tensor in weights.items()},
    ],
    ids=["tied twice", "inverse frequencies", "base model"],
)
def test_harmless_differences_are_accepted(model: Path, tiny_llama: Path, edit: Callable[[Weights], Weights]) -> None:
    change(model, edit)
    check_weight_files(model)
    expected = load_model(str(tiny_llama), torch.float32).state_dict()
    for name, tensor in load_model(str(model), torch.float32).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_adapter_without_all_matrices_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    adapted = with_lora(load_model(str(tiny_llama), torch.float32), Lora(rank=2))
    adapted.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / ADAPTER).read_text()) | {"base_model_name_or_path": str(tiny_llama)}
    (tmp_path / ADAPTER).write_text(json.dumps(settings))
    load_model(str(tmp_path), torch.float32)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.0.self_attn.q_proj.lora_B" not in name}, file
    )
    with pytest.raises(UserError, match=r"1 weights are in one of the two only, such as .*q_proj\.lora_B"):
        load_model(str(tmp_path), torch.float32)

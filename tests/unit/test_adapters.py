"""Adapters: merged to generate with, and refused on another model than theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from montessori_core.config import Lora
from montessori_core.errors import UserError
from montessori_core.models.adapters import adapted_model, adapter_rank, check_adapter
from montessori_core.models.fetch import fingerprint
from montessori_core.models.fingerprints import write_fingerprint
from montessori_core.models.load import load_merged, load_model, lora_config, with_lora
from montessori_core.models.templates import CHATML, with_template


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny Llama with random weights."""
    model = with_lora(load_model(str(tiny_llama), torch.float32), Lora(rank=4, alpha=8))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rebase(adapter: Path, base: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.arange(3, 40)[None]).logits
    return result


def test_merged_model_has_logits_of_adapter(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    merged, adapted = load_merged(str(adapter), torch.float32), logits(load_model(str(adapter), torch.float32))
    assert not hasattr(merged, "peft_config")
    assert torch.allclose(logits(merged), adapted, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_model(str(tmp_path / "merged"), torch.float32)), logits(merged))
    assert (logits(load_model(str(tiny_llama), torch.float32)) - adapted).abs().max() > 0.1


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"intermediate_size": 96}])
def test_adapter_of_another_model_is_refused(
    adapter: Path, tiny_llama: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    """PEFT ignores matrices of missing layers."""
    other = LlamaForCausalLM(LlamaConfig(**json.loads((tiny_llama / "config.json").read_text()) | change))
    other.save_pretrained(tmp_path / "other")
    rebase(adapter, tmp_path / "other")
    with pytest.raises(UserError, match=r"the adapter in .*adapter was trained on another model than .*other'"):
        load_model(str(adapter), torch.float32)


def test_training_with_other_rank_is_refused(adapter: Path, tiny_llama: Path) -> None:
    assert (adapted_model(adapter), adapter_rank(adapter)) == (str(tiny_llama.resolve()), 4)
    check_adapter(adapter, None, "teacher_update.lora")
    check_adapter(adapter, Lora(rank=4, alpha=8), "teacher_update.lora")
    check_adapter(tiny_llama, Lora(), "teacher_update.lora")
    with pytest.raises(UserError, match=r"teacher_update.lora: rank 16, alpha 32, but .* has rank 4, alpha 8"):
        check_adapter(adapter, Lora(), "teacher_update.lora")


def test_adapter_of_moved_run_has_base_of_that_run(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Links to a model with another chat template are in the run; so is that adapter, when another run starts from it."""
    run, moved, copy, next_run = (tmp_path / name for name in ("run", "moved", "copy", "next"))
    base = with_template(tiny_llama, CHATML, run / "models" / "student")
    rebase(adapter, base)
    trained = run / "iteration-1" / "student"
    shutil.copytree(adapter, trained)
    write_fingerprint(trained, fingerprint(base))
    (run / "config.yaml").touch()
    before = fingerprint(trained)
    assert adapted_model(trained) == str(base)
    shutil.copytree(run, copy, symlinks=True)
    assert adapted_model(copy / "iteration-1" / "student") == str(copy / "models" / "student")
    run.rename(moved)
    assert fingerprint(moved / "iteration-1" / "student") == before
    started = with_template(moved / "iteration-1" / "student", CHATML, next_run / "models" / "student")
    (next_run / "config.yaml").touch()
    assert adapted_model(started) == str(moved / "models" / "student")


def test_damaged_adapter_settings_are_named(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json: not the settings of a LoRA adapter"):
        load_model(str(adapter), torch.float32)


@pytest.mark.parametrize(
    ("target", "message"), [("q_prj", "the model has no layer 'q_prj'"), ("lm_head", "'lm_head' is the output layer")]
)
def test_layers_that_cannot_be_adapted_are_named(tiny_llama: Path, target: str, message: str) -> None:
    with pytest.raises(UserError, match=f"teacher_update.lora.targets: {message}"):
        lora_config(load_model(str(tiny_llama), torch.float32), Lora(targets=("v_proj", target)), "teacher_update.lora")

"""QLoRA: DPO of an adapter on weights in 4 bits."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from montessori_core.errors import UserError
from montessori_core.models import flops
from montessori_core.models.adapters import adapted_model
from montessori_core.models.load import load_model, load_tokenizer
from support import ROOT
from support.preference_pairs import LORA_RECIPE, update
from support.row_programs import logged

QUANTIZED = LORA_RECIPE.model_copy(update={"quantization": "nf4"})


def margins(part: Path) -> list[float]:
    return logged(part, "rewards/margins")


@pytest.fixture
def bitsandbytes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes, which is in no lock, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, "bitsandbytes>=0.46"], check=True)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{folder}")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_without_bitsandbytes_says_what_to_install(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"needs bitsandbytes, .* pip install 'montessori\[qlora\]'"):
        load_model(str(tiny_llama), torch.float32, "nf4")


@pytest.mark.slow
def test_update_equals_that_of_the_dequantized_weights(tiny_llama: Path, tmp_path: Path, bitsandbytes: None) -> None:
    from bitsandbytes.functional import dequantize_4bit

    quantized, dequantized = (load_model(str(tiny_llama), torch.float32, kind) for kind in ("nf4", None))
    in_four_bits = 0
    with torch.no_grad():
        for small, whole in zip(quantized.parameters(), dequantized.parameters(), strict=True):
            if small.dtype == torch.uint8:
                in_four_bits += 1
                whole.copy_(dequantize_4bit(small.data, small.quant_state))
    assert in_four_bits == 7 * dequantized.config.num_hidden_layers
    counts = []
    for model in (quantized, dequantized):
        flops.read_and_reset()
        with torch.no_grad():
            model(input_ids=torch.ones(1, 5, dtype=torch.long))
        counts.append(flops.read_and_reset())
    assert counts[0] == counts[1] > 0
    dequantized.save_pretrained(tmp_path / "dequantized")
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path / "dequantized")

    first = update(tmp_path / "first", tiny_llama, QUANTIZED)
    assert adapted_model(first) == str(tiny_llama.resolve())
    assert margins(first)[-1] > 0.2
    assert margins(first) == pytest.approx(margins(update(tmp_path / "whole", tmp_path / "dequantized")), rel=1e-3)
    second = update(tmp_path / "second", first, QUANTIZED)
    assert margins(second)[0] == pytest.approx(0.0, abs=1e-4)
    assert margins(second)[-1] > 0.1
    still = update(tmp_path / "still", first, QUANTIZED.model_copy(update={"learning_rate": 1e-12}))
    for name, weight in load_file(first / "adapter_model.safetensors").items():  # TRL would round it to bf16
        assert torch.allclose(load_file(still / "adapter_model.safetensors")[name], weight, rtol=1e-7, atol=1e-10), name
    several = QUANTIZED.model_copy(update={"epochs": 2})  # the reference reads the pairs before training
    assert margins(update(tmp_path / "several", tiny_llama, several, 2))[:4] == pytest.approx(margins(first), rel=1e-3)

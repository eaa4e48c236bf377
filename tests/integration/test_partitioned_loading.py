"""ZeRO-3 partitions weights as they load; a model's files are checked as without it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from cluster.fanout import ShardsFailed
from montessori_core import programs
from montessori_core.config import TeacherUpdate, Warmup, Zero
from montessori_core.errors import UserError
from montessori_core.models.load import load_model
from montessori_core.program import Row
from support import ROOT
from support.preference_pairs import LORA_RECIPE, update
from support.row_programs import run_in_job

Weights = dict[str, Any]
ALL_WEIGHTS = TeacherUpdate(batch_size=2, micro_batch_size=1)
EMBEDDINGS = "model.embed_tokens.weight"
EXTRA = r"2 weights in its files are not in the model: model\.layers\.0\.self_attn\.q_proj\.bias"


def biases(weights: Weights) -> Weights:
    return weights | {f"model.layers.{number}.self_attn.q_proj.bias": torch.ones(64) for number in range(2)}


def other_output_layer(weights: Weights) -> Weights:
    return weights | {"lm_head.weight": weights[EMBEDDINGS] + 1.0}


def same_output_layer(weights: Weights) -> Weights:
    return weights | {"lm_head.weight": weights[EMBEDDINGS].clone()}


def longer(weights: Weights) -> Weights:
    name = "model.layers.0.mlp.up_proj.weight"
    return weights | {name: torch.cat([weights[name], weights[name][:8]])}


def edited(model: Path, edit: Callable[[Weights], Weights], folder: Path) -> Path:
    """Write a model whose file has other weights."""
    shutil.copytree(model, folder)
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("edit", "recipe", "processes", "message"),
    [
        (biases, ALL_WEIGHTS, 1, EXTRA),
        pytest.param(biases, LORA_RECIPE, 1, EXTRA, marks=pytest.mark.slow),
        (other_output_layer, ALL_WEIGHTS, 1, r"tie_word_embeddings.*two different ones"),
        pytest.param(
            longer, ALL_WEIGHTS, 2, r"another shape.*\[136, 64\] instead of \[128, 64\]", marks=pytest.mark.slow
        ),
    ],
    ids=["unused", "unused, of an adapter's base", "output layer", "shape"],
)
def test_teacher_that_would_lose_weights_is_refused(
    tiny_llama: Path,
    tmp_path: Path,
    edit: Callable[[Weights], Weights],
    recipe: TeacherUpdate,
    processes: int,
    message: str,
) -> None:
    teacher = edited(tiny_llama, edit, tmp_path / "teacher")
    if recipe is LORA_RECIPE:  # an adapter of this base, as of an earlier iteration
        adapter = update(tmp_path / "first", tiny_llama)
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(teacher)}))
        (adapter / "fingerprint.json").unlink()
        teacher = adapter
    with pytest.raises(ShardsFailed, match=message):
        update(tmp_path / "stage", teacher, recipe, 3, processes)


@pytest.mark.slow
def test_student_that_would_lose_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    student = edited(tiny_llama, biases, tmp_path / "student")
    rows: list[Row] = [
        {"instruction": "Name it.", "response": f"Object {n}", "response_finished": True} for n in range(2)
    ]
    recipe = Warmup(batch_size=2, micro_batch_size=1).shared()
    settings = programs.Sft(max_length=128, lora=None, recipe=recipe, zero=Zero(stage=3), seed=0, save_moments=False)
    with pytest.raises(ShardsFailed, match=EXTRA):
        run_in_job(tmp_path / "stage", programs.SFT, settings, {"student": student}, rows)


@pytest.mark.slow
def test_output_layer_equal_to_embeddings_is_accepted(tiny_llama: Path, tmp_path: Path) -> None:
    """Files of models trained by other programs have it."""
    teacher = edited(tiny_llama, same_output_layer, tmp_path / "teacher")
    expected = load_file(update(tmp_path / "expected", tiny_llama, ALL_WEIGHTS, 3) / "model.safetensors")
    trained = load_file(update(tmp_path / "stage", teacher, ALL_WEIGHTS, 3) / "model.safetensors")
    assert trained.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in trained.items())


def test_refused_model_leaves_zero_3_on(tiny_llama: Path, tmp_path: Path) -> None:
    configuration = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=EXTRA):
        load_model(str(edited(tiny_llama, biases, tmp_path / "model")), torch.float32)
    assert is_deepspeed_zero3_enabled()
    del configuration
    assert not is_deepspeed_zero3_enabled()


CHECK = """
import sys
from pathlib import Path
import transformers.models.llama.modeling_llama
from montessori_core.models.load import check_before_partitioning

def megabytes(name):
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024

before = megabytes("VmRSS")
check_before_partitioning("model", Path(sys.argv[1]))
print(megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(("output_layer", "most"), [(False, 40), (True, 110)])
def test_check_reads_no_other_weights(tmp_path: Path, output_layer: bool, most: int) -> None:
    """Every process of a node makes it. The file has 230 MB; its embeddings and output layer, 34 MB each, may be compared."""
    sizes = {"hidden_size": 512, "intermediate_size": 8192, "num_attention_heads": 8, "vocab_size": 16384}
    config = LlamaConfig(num_hidden_layers=4, tie_word_embeddings=True, dtype="float32", **sizes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    if not output_layer:
        del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, "-c", CHECK, tmp_path], env=environment, text=True)
    assert float(output.splitlines()[-1]) < most
    (tmp_path / "model.safetensors").unlink()  # pytest keeps the folder

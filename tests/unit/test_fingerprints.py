"""Fingerprints of models: they cover tensors, tokenizer and settings, but not how or where these were written."""

import hashlib
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from montessori_core.errors import DataError
from montessori_core.models.fingerprints import hash_model, hash_tensors
from montessori_core.models.load import load_tokenizer

SAVE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for kind in (AutoModelForCausalLM, AutoTokenizer):
    kind.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_fingerprint_ignores_the_environment(tiny_llama: Path, tmp_path: Path) -> None:
    saved = [tmp_path / "online", tmp_path / "offline"]
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", SAVE, tiny_llama, saved[0]], env=environment, check=True)
    for kind in (AutoModelForCausalLM, AutoTokenizer):  # in an offline environment
        kind.from_pretrained(tiny_llama).save_pretrained(saved[1])
    written = [(folder / "tokenizer_config.json").read_text() for folder in saved]
    assert written[0] != written[1]  # or the test would prove nothing
    assert hash_model(saved[0]) == hash_model(saved[1]) == hash_model(tiny_llama)


def test_fingerprint_ignores_files_around_the_model(model: Path) -> None:
    before = hash_model(model)
    (model / "training_log.json").write_text("[]")
    (model / "README.md").write_text("A model.")
    save_file({"w.first": torch.ones(2)}, model / "adamw.safetensors")
    edit(model / "config.json", lambda config: config.update(transformers_version="9.0", use_cache=False))
    edit(model / "config.json", lambda config: config.update(torch_dtype=config.pop("dtype")))
    assert hash_model(model) == before


def test_fingerprint_ignores_shards_and_metadata(model: Path) -> None:
    before = hash_model(model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    shards = {"b.safetensors": names[:5], "a.safetensors": names[5:]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, model / file, metadata={"format": "pt", "by": file})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hash_model(model) == before


def test_fingerprint_ignores_older_spellings(model: Path) -> None:
    before = hash_model(model)
    edit(
        model / "tokenizer.json",
        lambda content: content["model"].update(merges=list(map(" ".join, content["model"]["merges"]))),
    )
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    edit(model / "tokenizer_config.json", lambda content: content.update(chat_template=template))
    assert hash_model(model) == before


def _change_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][7] += 1e-3
    save_file(tensors, model / "model.safetensors")


def _reshape_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(2, -1)
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        _change_weight,
        _reshape_weight,
        lambda model: edit(model / "tokenizer.json", lambda content: content["model"]["merges"][3].reverse()),
        lambda model: (model / "chat_template.jinja").write_text("{{ messages }}"),
        lambda model: edit(model / "generation_config.json", lambda content: content.update(eos_token_id=3)),
        lambda model: edit(model / "config.json", lambda content: content.update(rms_norm_eps=1e-3)),
        lambda model: edit(model / "tokenizer_config.json", lambda content: content.update(eos_token="<|im_start|>")),
        lambda model: (model / "tokenizer_config.json").unlink(),
        lambda model: (model / "modules.json").write_text('[{"idx": 0, "path": ""}]'),  # of sentence-transformers
    ],
    ids=["weight", "shape", "merge", "template", "eos id", "epsilon", "eos token", "missing file", "list"],
)
def test_fingerprint_depends_on_weights_and_tokenizer(model: Path, change: Callable[[Path], object]) -> None:
    before = hash_model(model)
    change(model)
    assert hash_model(model) != before


def test_fingerprint_of_adapter_ignores_base_path(tmp_path: Path) -> None:
    save_file({"lora": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "/somewhere"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = hash_model(tmp_path)
    elsewhere = {"base_model_name_or_path": "/else/where", "target_modules": ["v_proj", "q_proj"]}
    edit(tmp_path / "adapter_config.json", lambda content: content.update(elsewhere))
    assert hash_model(tmp_path) == before
    edit(tmp_path / "adapter_config.json", lambda content: content.update(r=8))
    assert hash_model(tmp_path) != before


def test_hash_tensors_equals_single_hashes(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    expected = [(name, "F32", list(tensor.shape), hashes[name]) for name, tensor in tensors.items()]
    assert sorted(hash_tensors(model / "model.safetensors")) == sorted(expected)


@pytest.mark.parametrize("size", [0, 5, 100, 200_000])
def test_hash_model_refuses_truncated_weights(model: Path, size: int) -> None:
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(size)
    with pytest.raises(DataError, match=r"model.safetensors: .*damaged"):
        hash_model(model)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_hash_model_refuses_damaged_settings(model: Path, content: str) -> None:
    (model / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config.json: .*damaged"):
        hash_model(model)


def test_saved_tokenizer_does_not_depend_on_environment(tiny_llama: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path)
    assert not {"local_files_only", "is_local"} & set(json.loads((tmp_path / "tokenizer_config.json").read_text()))

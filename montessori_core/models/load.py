"""Load models and tokenizers, never running code from a model's repository."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from montessori_core.config import Lora
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.models import flops
from montessori_core.models.adapters import adapted_model, is_adapter
from montessori_core.models.fetch import fetch_model
from montessori_core.models.fingerprints import weight_shapes, without_environment
from montessori_core.models.templates import LLAMA3_STYLE_TEMPLATE
from montessori_core.models.weight_names import check_loaded

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Model types of which PEFT refuses to adapt `out_proj`: Mamba's kernels read its weight, and would not see the adapter."""


def load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer. Without a chat template it gets the paper's (Figure 7), without a padding token its end token.

    Raises:
        UserError: the tokenizer cannot be loaded, has no end-of-text token, or loses the spaces between words.
    """
    from transformers import AutoTokenizer

    folder = fetch_model(model)
    try:
        # mistral_format: the tokenizer of mistral-common, which vLLM brings, renders no prompts of an unfinished turn.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
    except Exception as error:  # of a damaged file, and of a package that is not installed
        raise UserError(f"the tokenizer of {model!r} cannot be loaded: {describe_load_error(error)}") from error
    written = tokenizer.decode(tokenizer("Write a function", add_special_tokens=False)["input_ids"])
    if " " not in written.strip():
        raise UserError(
            f"the tokenizer of {model!r} loses the spaces between words, since its class does not fit tokenizer.json; set "
            "tokenizer_class: PreTrainedTokenizerFast in its tokenizer_config.json"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA3_STYLE_TEMPLATE
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {model!r} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Of tokenizers that set it, such as Llama 3's, it removes spaces before punctuation, also in code: "a != b".
    tokenizer.clean_up_tokenization_spaces = False
    return without_environment(tokenizer)


def load_model(model: str, dtype: Any, quantization: str | None = None) -> "PreTrainedModel":
    """Load a causal language model from safetensors.

    For the folder of a LoRA adapter, load the base model and apply the adapter; only the adapter requires gradients.

    Args:
        model: hub id or folder.
        dtype: of the weights.
        quantization: 'nf4' keeps the weights of linear layers, except the output layer, in 4 bits (QLoRA; Dettmers et al.,
            2023); these cannot be trained.

    Raises:
        UserError: the model cannot be loaded, weights are missing or not used, an adapter does not fit its base model, or
            bitsandbytes is not installed.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    folder = fetch_model(model)
    if is_adapter(folder):
        return _load_adapter(folder, dtype, quantization)
    if is_deepspeed_zero3_enabled() and quantization is None:
        check_before_partitioning(model, folder)
    loaded = _read(model, folder, dtype=dtype, quantization_config=quantization and _four_bits(dtype))
    _check_tied(model, loaded)
    _freeze(loaded)
    if quantization is not None:
        _keep_gradients(loaded)
    counted: PreTrainedModel = flops.count(loaded)
    return counted


def _read(model: str, folder: Path, **options: Any) -> Any:
    """Load a model with options of transformers.

    Raises:
        UserError: it cannot be loaded, or weights are missing or not used.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below
            **options,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} cannot be loaded: {describe_load_error(error)}") from error
    check_loaded(model, len(loaded.state_dict()), info)
    return loaded


def check_before_partitioning(model: str, folder: Path) -> None:
    """Check the weights of a model that ZeRO-3 is about to partition, without reading them.

    transformers (5.24) drops weights that a partitioned model does not have, does not report those of another shape, and
    finds any two partitions equal, so that it ties weights that differ. It does not partition quantized models.

    Raises:
        UserError: see `load_model`.
    """
    if (read_json(folder / "config.json") or {}).get("quantization_config"):
        return
    with unpartitioned():
        empty = _read(model, folder, dtype="auto", device_map="meta")
        if _is_untied(empty):
            # Are they equal? Weights in the configured dtype are mapped into memory: these two alone are read.
            _check_tied(model, _read(model, folder, dtype="auto"))


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Load models without ZeRO-3, also in a training that partitions weights as they load."""
    from transformers.integrations import deepspeed

    configuration = deepspeed._hf_deepspeed_config_weak_ref  # no function returns the object
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configuration


def _four_bits(dtype: Any) -> Any:
    """Return the settings of weights in 4 bits; products are computed in `dtype`, on GPUs in bf16."""
    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError(
            "teacher_update.quantization needs bitsandbytes, which is not installed here: pip install 'montessori[qlora]', "
            "or set quantization: null"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else dtype,
    )


def _keep_gradients(quantized: "PreTrainedModel") -> None:
    """Prevent bitsandbytes, on a CPU, from converting weights in the first pass without gradients.

    It would convert them for good, to a form that passes no gradients on.
    """
    for layer in quantized.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _freeze(loaded: "PreTrainedModel") -> None:
    """Freeze the parameters that the model's class freezes, such as the routing bias of Ernie 4.5's experts.

    transformers (5.24) lets every loaded parameter require a gradient, except under ZeRO-3.
    """
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        defined = type(loaded)(loaded.config)
    for name, parameter in defined.named_parameters():
        if not parameter.requires_grad:
            loaded.get_parameter(name).requires_grad_(False)


def _check_tied(model: str, loaded: "PreTrainedModel") -> None:
    """Check that embeddings are the output layer if config.json says so.

    transformers keeps two different ones of a file; vLLM, and any program that saves the model again, would lose one.

    Raises:
        UserError: the files have two different ones.
    """
    if not _is_untied(loaded):
        return
    embeddings, output = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    if output.weight.shape != embeddings.weight.shape or not bool((output.weight == embeddings.weight).all()):
        raise UserError(
            f"model {model!r}: config.json says that the output layer is the embeddings (tie_word_embeddings), but its files "
            "have two different ones, and programs use one or the other; set tie_word_embeddings to false in config.json, or "
            "save the model without the output layer"
        )


def _is_untied(loaded: "PreTrainedModel") -> bool:
    """Return whether config.json says that embeddings are the output layer, but the loaded model has two."""
    output = loaded.get_output_embeddings()
    tied = getattr(loaded.config, "tie_word_embeddings", False)
    return bool(tied and output is not None and output.weight is not loaded.get_input_embeddings().weight)


def load_merged(model: str, dtype: Any) -> "PreTrainedModel":
    """Load a model to generate with or to save; an adapter is merged into its base model.

    An adapter that is not merged makes decoding on a CPU 42 % slower (SmolLM2), and its log-probabilities in bfloat16 are no
    closer to those in float32.

    Raises:
        UserError: see `load_model`.
    """
    loaded = load_model(model, dtype)
    merged: PreTrainedModel = loaded.merge_and_unload() if hasattr(loaded, "peft_config") else loaded
    return merged


def _load_adapter(folder: Path, dtype: Any, quantization: str | None) -> "PreTrainedModel":
    from peft import PeftModel, get_peft_model_state_dict

    base = load_model(adapted_model(folder), dtype, quantization)
    misfit = f"the adapter in {folder} was trained on another model than {adapted_model(folder)!r}"
    try:
        model: PreTrainedModel = PeftModel.from_pretrained(base, folder, is_trainable=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{misfit}: {error}") from error
    # PEFT ignores weights that the model does not have, and draws those that the file does not have at random.
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved, adapted = ({name for name in names if ".lora_" in name} for names in (weight_shapes(folder), loaded))
    if different := sorted(saved ^ adapted):
        raise UserError(f"{misfit}: {len(different)} weights are in one of the two only, such as {different[0]}")
    return model


def describe_load_error(error: Exception) -> str:
    """Return the message of transformers, without its advice to run code from a model's repository."""
    if "trust_remote_code" not in str(error):
        return str(error)
    return "it needs code from its repository, which is never run; use a model that transformers has a class for"


def with_lora(model: "PreTrainedModel", lora: Lora) -> "PreTrainedModel":
    """Add LoRA matrices to a student's layers; a student that has an adapter keeps it.

    Raises:
        UserError: the model has no layers with the configured names.
    """
    from peft import get_peft_model

    if hasattr(model, "peft_config"):
        return model
    adapted = get_peft_model(model, lora_config(model, lora, "student.lora"))
    adapted.enable_input_require_grads()  # gradient checkpointing needs an input that requires gradients
    return adapted


def lora_config(model: "PreTrainedModel", lora: Lora, setting: str) -> "LoraConfig":
    """Return PEFT's configuration of a new adapter for a model.

    Args:
        model: the model.
        lora: settings of the adapter.
        setting: their name in the configuration.

    Raises:
        UserError: the model has no layers with the configured names, or an adapter of one of them cannot be trained: of the
            output layer by TRL, of Mamba's `out_proj` by PEFT, of embeddings that are the output layer too.
    """
    from peft import LoraConfig

    names = {name for name, _ in model.named_modules()}
    output = next(name for name, layer in model.named_modules() if layer is model.get_output_embeddings())
    embeddings = model.get_input_embeddings()
    tied = model.get_output_embeddings().weight is embeddings.weight
    embedding = next(name for name, layer in model.named_modules() if layer is embeddings)
    excluded = ["out_proj", "conv1d"] if model.config.get_text_config().model_type in _MAMBA else None
    for target in lora.targets:
        adapted = {name for name in names if f".{name}".endswith(f".{target}")}
        if not adapted:
            raise UserError(f"{setting}.targets: the model has no layer {target!r}")
        if output in adapted:
            raise UserError(f"{setting}.targets: {target!r} is the output layer, which TRL cannot adapt; leave it out")
        if tied and embedding in adapted:
            raise UserError(
                f"{setting}.targets: {target!r} shares its weights with the output layer, which merging the adapter would "
                "change as well; leave it out"
            )
        if excluded and target.rpartition(".")[2] in excluded:
            raise UserError(f"{setting}.targets: PEFT cannot adapt {target!r} of a Mamba model; leave it out")
    targets = list(lora.targets) or "all-linear"
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM"
    )


def load_with_tokenizer(model: str, dtype: Any) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel"]:
    """Load a tokenizer and its model.

    Raises:
        UserError: one of them cannot be loaded, or they do not belong together.
    """
    tokenizer, loaded = load_tokenizer(model), load_model(model, dtype)
    check_tokenizer(tokenizer, loaded)
    return tokenizer, loaded


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Check that the model's vocabulary includes all tokens that a text may have.

    Special tokens that the chat template does not name are in no text, such as that of images in Gemma 3 270M and 1B.

    Raises:
        UserError: it does not.
    """
    vocabulary = model.config.get_text_config().vocab_size
    text = f"{tokenizer.bos_token}{tokenizer.eos_token}{tokenizer.pad_token}{tokenizer.chat_template}"
    added = tokenizer.added_tokens_decoder.items()
    unused = [number for number, token in added if number >= vocabulary and token.special and token.content not in text]
    if len(tokenizer) - len(unused) > vocabulary:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has {vocabulary}: they do not belong together; put "
            "the model's own tokenizer files into its folder"
        )

"""Load models and tokenizers, never running code from a model's repository."""

from typing import TYPE_CHECKING, Any

from montessori_core.config import Lora
from montessori_core.errors import UserError
from montessori_core.models import flops
from montessori_core.models.chat import LLAMA3_STYLE_TEMPLATE
from montessori_core.models.fetch import adapted_model, fetch_model
from montessori_core.models.fingerprints import ADAPTER, without_environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer. Without a chat template it gets the paper's (Figure 7), without a padding token its end token.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(fetch_model(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {model!r} cannot be loaded: {describe_load_error(error)}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LLAMA3_STYLE_TEMPLATE
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {model!r} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return without_environment(tokenizer)


def load_model(model: str, dtype: Any) -> "PreTrainedModel":
    """Load a causal language model from safetensors.

    For the folder of a LoRA adapter, load the base model and apply the adapter; only the adapter requires gradients.

    Raises:
        UserError: the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    folder = fetch_model(model)
    if (folder / ADAPTER).exists():
        from peft import PeftModel

        base = load_model(adapted_model(folder), dtype)
        return PeftModel.from_pretrained(base, folder, is_trainable=True)
    try:
        counted: PreTrainedModel = flops.count(
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        )
        return counted
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} cannot be loaded: {describe_load_error(error)}") from error


def describe_load_error(error: Exception) -> str:
    """Return the message of transformers, without its advice to run code from a model's repository."""
    if "trust_remote_code" not in str(error):
        return str(error)
    return "it needs code from its repository, which is never run; use a model that transformers has a class for"


def with_lora(model: "PreTrainedModel", lora: Lora) -> "PreTrainedModel":
    """Add LoRA matrices to a model's layers; a model that has an adapter keeps it.

    Raises:
        UserError: the model has no layers with the configured names.
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
    adapted.enable_input_require_grads()  # gradient checkpointing needs an input that requires gradients
    return adapted


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Check that the model's vocabulary includes all tokens of the tokenizer.

    Raises:
        UserError: it does not.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has {vocabulary}: they do not belong together; put "
            "the model's own tokenizer files into its folder"
        )

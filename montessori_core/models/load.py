"""Load models and tokenizers. No code of a model's repository is ever run."""

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
    return without_environment(tokenizer)


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

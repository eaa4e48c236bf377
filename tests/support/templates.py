"""Chat templates of six kinds, for SmolLM2's tokenizer, and those of real models."""

import re
from pathlib import Path
from typing import Any

from montessori_core.models.templates import LLAMA3_STYLE_TEMPLATE

TRIMMING = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
EMPTY_SYSTEM = (
    "<|im_start|>system\n<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_END = (  # like Gemma
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {
    "its own": None,
    "trimming": TRIMMING,
    "empty system": EMPTY_SYSTEM,
    "other end": OTHER_END,
    "no end": NO_END,
    "paper": LLAMA3_STYLE_TEMPLATE,
}
"""By name; None is the tokenizer's own."""


def real_template(tokenizer: Any, name: str) -> Any:
    """Give a tokenizer the chat template of a model, as TRL ships it, and the control tokens that the template names."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    names = set(re.findall(r"<[|｜][^<>\s'\"]+?[|｜]>|<[a-z]+_of_[a-z]+>", template))
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": sorted(names)})
    tokenizer.chat_template = template
    return tokenizer

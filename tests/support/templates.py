"""Chat templates of six kinds, for SmolLM2's tokenizer."""

from montessori_core.models.chat import LLAMA3_STYLE_TEMPLATE

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

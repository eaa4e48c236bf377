"""Load a model in a generation engine: vLLM on GPUs, transformers on CPUs."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from montessori_core.config import Vllm
from montessori_core.errors import UserError
from montessori_core.synthesis.engine import Engine

_DEFAULT, _NO_OPTIONS = Vllm(), dict[str, Any]()


def open_engine(
    engine: str, model: str, tokenizer: Any, gpus: Vllm = _DEFAULT, options: Mapping[str, Any] = _NO_OPTIONS
) -> Engine:
    """Load `model` in the named engine; 'auto' is vLLM if it is installed, else transformers.

    Args:
        engine: 'auto', 'vllm' or 'transformers'.
        model: folder or name of the model.
        tokenizer: its tokenizer.
        gpus: how vLLM uses the GPUs.
        options: further options of vLLM's engine.

    Raises:
        UserError: there are options, and vLLM is not installed.
    """
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "vllm":
        from montessori_core.synthesis.vllm_engine import VllmEngine

        return VllmEngine(model, tokenizer, gpus, options)
    if options:
        raise UserError("synthesis.engine_options are vLLM's, which is not installed here; remove them")
    from montessori_core.synthesis.transformers_engine import TransformersEngine

    return TransformersEngine(model, tokenizer)

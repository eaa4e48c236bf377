"""fp32 masters: the weights that AdamW moves, while a GPU computes with their bf16 copies.

DeepSpeed makes the masters from the bf16 copies and saves the copies; at the paper's rates either loses most of what a
training moved. All functions go parameter by parameter, so that no process holds a second whole model beside its share.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def trained_parameters(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Return name and parameter of all that a DeepSpeed engine trains."""
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def whole(engine: Any, parameter: torch.nn.Parameter, state: str | None = None) -> torch.Tensor:
    """Return a parameter's fp32 master, or AdamW's `state` of it, whatever the ZeRO stage. All processes must call it.

    Args:
        engine: DeepSpeed's.
        parameter: of its module.
        state: 'exp_avg' or 'exp_avg_sq'; None for the master.

    Raises:
        RuntimeError: DeepSpeed holds no such state.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:  # fp32, see deepspeed_config
        tensor = engine.optimizer.state[parameter][state] if state else parameter
    else:
        tensor = safe_get_full_optimizer_state(parameter, state) if state else safe_get_full_fp32_param(parameter)
    if tensor is None:
        raise RuntimeError(f"DeepSpeed holds no {state or 'fp32 master'} of a trained parameter")
    return tensor.detach().float().reshape(getattr(parameter, "ds_shape", parameter.shape))


def gather_masters(engine: Any) -> dict[str, torch.Tensor]:
    """Collect the fp32 masters on rank 0's host; empty elsewhere. All processes must call it.

    Of a LoRA model these are the matrices. Buffers that belong to a model's files come with them.
    """
    masters = {}
    for name, parameter in trained_parameters(engine):
        master = whole(engine, parameter)
        if torch.distributed.get_rank() == 0:
            masters[name] = master.cpu()
    if torch.distributed.get_rank() == 0:
        saved = engine.module.state_dict().keys()
        masters |= {name: buffer.cpu() for name, buffer in engine.module.named_buffers() if name in saved}
    return masters


class MastersCallback(TrainerCallback):
    """Starts a bf16 training from a model's fp32 weights: DeepSpeed has made its masters from their bf16 copies."""

    def __init__(self, trainer: Any, model: Path) -> None:
        self._trainer, self._model = trainer, model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer, in all processes, once DeepSpeed has the model."""
        from deepspeed.utils import safe_set_full_fp32_param

        engine = self._trainer.model_wrapped
        if not engine.bfloat16_enabled():
            return
        parameters = dict(trained_parameters(engine))
        for file in self._model.glob("*.safetensors"):
            with safe_open(file, framework="pt") as weights:
                for name in parameters.keys() & set(weights.keys()):
                    if weights.get_slice(name).get_dtype() == "F32":
                        safe_set_full_fp32_param(parameters[name], weights.get_tensor(name))

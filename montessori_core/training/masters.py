"""fp32 masters: the weights that AdamW moves, while a GPU computes with their bf16 copies.

DeepSpeed makes the masters from the bf16 copies and saves the copies; at the paper's rates either loses most of what a
training moved. All functions go parameter by parameter, so that no process holds a second whole model beside its share.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.fingerprints import ADAPTER
from montessori_core.models.load import load_model

log = logging.getLogger(__name__)


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
    """Starts a bf16 training from a model's own weights: DeepSpeed has made its masters from their bf16 copies."""

    def __init__(self, trainer: Any, model: Path) -> None:
        self._trainer, self._model = trainer, model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer, in all processes, once DeepSpeed has the model.

        Raises:
            RuntimeError: a trained weight is not among the model's.
        """
        engine = self._trainer.model_wrapped
        if not engine.bfloat16_enabled():
            return
        # A file holds tied weights under one of their names.
        named = engine.module.named_parameters(remove_duplicate=False)
        parameters = {_name_in_files(name): parameter for name, parameter in named if parameter.requires_grad}
        if hasattr(engine.module, "peft_config") and not (self._model / ADAPTER).exists():
            return  # a new adapter: its matrices were drawn, not read
        if not _copy_from_files(self._model, parameters):
            _copy_from_model(self._model, parameters, args)


def _name_in_files(name: str) -> str:
    """Return the name of a parameter as it is stored: the matrices of a LoRA adapter leave out the adapter's."""
    return name.replace(".default", "")


def _copy_from_files(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> bool:
    """Set masters to the weights of the same name in safetensors; return whether no weight lost precision.

    Weights in bf16 are their own copies.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    left, others = {id(parameter) for parameter in parameters.values()}, set()
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == MOMENTS_FILE:
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                dtype = file.get_slice(name).get_dtype()
                if name not in parameters:
                    others.add(dtype)
                    continue
                left.discard(id(parameters[name]))
                if dtype != "BF16":
                    safe_set_full_fp32_param(parameters[name], file.get_tensor(name).float())
    return not left or others <= {"BF16"}


def _copy_from_model(folder: Path, parameters: dict[str, torch.nn.Parameter], args: TrainingArguments) -> None:
    """Set masters to the weights of the model as transformers loads it, for files whose names or shapes it changes.

    Every process holds the model in host memory meanwhile, whatever the ZeRO stage.
    """
    from deepspeed.utils import safe_set_full_fp32_param
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    log.info("the files of %s have other names than the model's weights: reading all of them", folder)
    unset_hf_deepspeed_config()  # or ZeRO-3 would partition it
    try:
        loaded = load_model(str(folder), torch.float32)
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)
    weights = {_name_in_files(name): weight for name, weight in loaded.named_parameters(remove_duplicate=False)}
    if missing := sorted(parameters.keys() - weights.keys()):
        raise RuntimeError(f"{folder}: no weights for {len(missing)} trained parameters, e.g. {missing[0]}")
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, weights[name].detach())

"""fp32 masters: the weights that AdamW updates, while a GPU computes with their bf16 copies.

DeepSpeed initialises the masters from the bf16 copies and saves the copies. At the paper's learning rates each of the two
loses most of the update. Parameters are processed one at a time, so that no GPU holds a second full model.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.adapters import is_adapter
from montessori_core.models.load import load_model, unpartitioned

log = logging.getLogger(__name__)


def trained_parameters(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Return name and parameter of all trained parameters of a DeepSpeed engine."""
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def frozen_parameters(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return name and full value of all other parameters that are saved with a model: none for a LoRA model.

    DeepSpeed rounds them to bf16 where it trains bf16 copies. Then rank 0 reads them from the model's files, where they may
    have other names, and the other ranks return nothing. All processes must read them.
    """
    from deepspeed.runtime.zero import GatheredParameters

    if hasattr(engine.module, "peft_config"):
        return
    frozen = {name: parameter for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    if frozen and engine.bfloat16_enabled():
        if torch.distributed.get_rank() == 0:
            with unpartitioned():
                model = load_model(engine.module.name_or_path, torch.float32)
            yield from ((name, model.get_parameter(name).detach()) for name in frozen)
        return
    for name, parameter in frozen.items():
        with GatheredParameters(parameter):
            yield name, parameter.detach().float()


def full_fp32(engine: Any, parameter: torch.nn.Parameter, state: str | None = None) -> torch.Tensor:
    """Return the full fp32 master of a parameter, or its AdamW state, for any ZeRO stage. All processes must call it.

    Args:
        engine: the DeepSpeed engine.
        parameter: a parameter of its module.
        state: 'exp_avg' or 'exp_avg_sq'; None for the master.

    Raises:
        RuntimeError: DeepSpeed has no such state.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:  # fp32, see deepspeed_config
        tensor = engine.optimizer.state[parameter][state] if state else parameter
    else:
        tensor = safe_get_full_optimizer_state(parameter, state) if state else safe_get_full_fp32_param(parameter)
    if tensor is None:
        raise RuntimeError(f"DeepSpeed has no {state or 'fp32 master'} for a trained parameter")
    return tensor.detach().float().reshape(getattr(parameter, "ds_shape", parameter.shape))


def gather_masters(engine: Any) -> dict[str, torch.Tensor]:
    """Gather the fp32 masters in rank 0's host memory; other ranks return nothing. All processes must call it.

    For a LoRA model these are the adapter's matrices. The result includes the frozen parameters and buffers that are saved
    with a model.
    """
    masters = {}
    # Before the others: to read them may take a full model's memory.
    frozen = {name: value.cpu().clone() for name, value in frozen_parameters(engine)}
    for name, parameter in trained_parameters(engine):
        master = full_fp32(engine, parameter)
        if torch.distributed.get_rank() == 0:
            masters[name] = master.cpu()
    if torch.distributed.get_rank() == 0:
        masters |= frozen
        saved = engine.module.state_dict().keys()
        masters |= {name: buffer.cpu() for name, buffer in engine.module.named_buffers() if name in saved}
    return masters


class MastersCallback(TrainerCallback):
    """Set the masters of a bf16 training to the model's fp32 weights: DeepSpeed initialises them from the bf16 copies."""

    def __init__(self, trainer: Any, model: Path) -> None:
        self._trainer, self._model = trainer, model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the masters, in all processes, after DeepSpeed's initialisation.

        Raises:
            RuntimeError: the model has no weight for a trained parameter.
        """
        engine = self._trainer.model_wrapped
        if not engine.bfloat16_enabled():
            return
        # A file has tied weights under one of their names.
        named = engine.module.named_parameters(remove_duplicate=False)
        parameters = {_name_in_files(name): parameter for name, parameter in named if parameter.requires_grad}
        if hasattr(engine.module, "peft_config") and not is_adapter(self._model):
            return  # a new adapter, initialised at random
        if not _copy_from_files(self._model, parameters):
            _copy_from_model(self._model, parameters)


def _name_in_files(name: str) -> str:
    """Return the name of a parameter in files, where matrices of a LoRA adapter omit the adapter's name."""
    return name.replace(".default", "")


def _copy_from_files(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> bool:
    """Set masters to the weights of the same name in safetensors; return whether all masters have full precision.

    Weights in bf16 are equal to their copies.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    missing, other_dtypes = {id(parameter) for parameter in parameters.values()}, set()
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == MOMENTS_FILE:
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                dtype = file.get_slice(name).get_dtype()
                if name not in parameters:
                    other_dtypes.add(dtype)
                    continue
                missing.discard(id(parameters[name]))
                if dtype != "BF16":
                    safe_set_full_fp32_param(parameters[name], file.get_tensor(name).float())
    return not missing or other_dtypes <= {"BF16"}


def _copy_from_model(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Set masters to the weights of the loaded model, for files whose names or shapes transformers converts.

    Every process holds the full model in host memory, at any ZeRO stage.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    log.info("%s: names in the files differ from those of the model's weights: loading the full model", folder)
    with unpartitioned():
        model = load_model(str(folder), torch.float32)
    weights = {_name_in_files(name): weight for name, weight in model.named_parameters(remove_duplicate=False)}
    if missing := sorted(parameters.keys() - weights.keys()):
        raise RuntimeError(f"{folder}: no weights for {len(missing)} trained parameters, e.g. {missing[0]}")
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, weights[name].detach())

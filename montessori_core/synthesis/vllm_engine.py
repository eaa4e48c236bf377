"""Generation with vLLM: the engine for GPUs."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from montessori_core.config import Sampling, Vllm
from montessori_core.errors import UserError
from montessori_core.formatting import closest_name
from montessori_core.models import flops
from montessori_core.models.adapters import adapter_rank, is_adapter
from montessori_core.models.control_tokens import encode_rendered
from montessori_core.models.fetch import fetch_model, full_model
from montessori_core.models.positions import positions_of
from montessori_core.models.rendering import end_tokens
from montessori_core.processor import generation_dtype
from montessori_core.program import NotOpened
from montessori_core.synthesis.engine import Progress, Request, Step
from montessori_core.synthesis.vllm_copies import ModelCopies, ModelCopy, Work
from montessori_core.synthesis.vllm_parallelism import ModelSize, choose_length, choose_parallelism

log = logging.getLogger(__name__)

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


class VllmEngine:
    """Copies of a model on the GPUs of the job, or on the CPU with a CPU build of vLLM.

    vLLM loads the base model of an adapter, and applies the adapter to every request: nothing is merged or written. It
    loads at the first requests, whose lengths decide how long a sequence may be; much longer ones load it again.
    """

    def __init__(self, model: str, tokenizer: Any, gpus: Vllm, options: Mapping[str, Any]) -> None:
        """Prepare to load `model`; see `open_engine`.

        Raises:
            UserError: a setting does not fit the model or the GPUs, or vLLM has no such option.
        """
        _check_options(options)
        on_gpus = bool(torch.cuda.device_count())
        if not on_gpus:
            # By default vLLM binds threads to cores, which may be those of other jobs, and takes 40 % of the memory.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        folder = fetch_model(model)
        self._weights, self.positions = flops.weights_of(folder), positions_of(folder)
        memory = current_platform.get_device_total_memory() if on_gpus else 0  # without CUDA in this process
        self._parallelism = choose_parallelism(ModelSize.of(folder), torch.cuda.device_count(), memory, gpus)
        log.info("vLLM: tensor_parallel %d, data_parallel %d", self._parallelism.tensor, self._parallelism.data)
        self._adapter = LoRARequest("teacher", 1, str(folder)) if is_adapter(folder) else None
        self._setting = gpus.max_model_len
        self._arguments: dict[str, Any] = {
            "model": str(full_model(folder)),
            "trust_remote_code": False,
            "dtype": "bfloat16" if on_gpus else generation_dtype(),
            "seed": 0,
            "tensor_parallel_size": self._parallelism.tensor,
            "enable_prefix_caching": True,  # read a prompt once for all its samples
            "enforce_eager": not on_gpus,  # on a CPU compilation costs more than it saves
            **_room_for_adapter(folder),
            **({} if gpus.memory_share is None else {"gpu_memory_utilization": gpus.memory_share}),
            **options,
        }
        self._tokenizer = tokenizer
        self._ends = sorted(end_tokens(tokenizer))  # vLLM adds those of generation_config.json
        self._copies: ModelCopy | ModelCopies | None = None
        self._length = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: str | None) -> Iterator[Step]:
        """See `Engine.generate`. There are no drafts: vLLM's random generator cannot start in the middle.

        Raises:
            UserError: a prompt is too long for `cluster.vllm.max_model_len`.
            NotOpened: vLLM does not load the model.
            ProcessLost: a process of vLLM has ended.
        """
        if not requests:
            return
        texts = {request.prompt for request in requests}
        prompts = {text: encode_rendered(self._tokenizer, text)[0] for text in texts}
        copies = self._open(max(map(len, prompts.values())), sampling.max_tokens)
        flops.record_operations(self._weights, sum(map(len, prompts.values())))
        progress = Progress([0.0] * len(requests), sampling.max_tokens)
        work = Work(
            [prompts[request.prompt] for request in requests],
            [_parameters(sampling, stop, request.seed, self._ends) for request in requests],
        )
        for finished in copies.generate(work):
            for _, generated in finished:
                progress.end(generated.tokens)
                flops.record_operations(self._weights, generated.tokens)
            yield Step(dict(finished), dict, progress.done(()))

    def _open(self, longest: int, written: int) -> ModelCopy | ModelCopies:
        """Load the model with room for sequences of these lengths, unless it has."""
        length = choose_length(longest, written, self.positions, self._setting)
        if self._copies is not None and length <= self._length:
            return self._copies
        if self._copies is not None:
            self._copies.close()
            self._copies = None
        arguments, self._length = {**self._arguments, "max_model_len": length}, length
        try:
            if self._parallelism.data > 1:
                self._copies = ModelCopies(arguments, self._adapter, self._parallelism)
            else:
                self._copies = ModelCopy(arguments, self._adapter)
        except Exception as error:  # vLLM has errors of many types, and most causes are in its other processes
            raise NotOpened(
                f"vLLM does not load the model, with max_model_len {length}: {type(error).__name__}: {error}. The job's log "
                "has the cause. If memory is short, lower cluster.vllm.max_model_len or raise gpus_per_node of generation in "
                "cluster.resources"
            ) from error
        return self._copies


def _check_options(options: Mapping[str, Any]) -> None:
    """Check that vLLM's engine has these options.

    Raises:
        UserError: it does not have one.
    """
    names = [field.name for field in fields(EngineArgs)]
    for name in options:
        if name not in names:
            hint = closest_name(name, names)
            raise UserError(f"synthesis.engine_options.{name}: vLLM {vllm.__version__} has no such option{hint}")


def _room_for_adapter(folder: Path) -> dict[str, Any]:
    """Return the arguments with which vLLM can apply the adapter in a folder; none for a full model.

    Raises:
        UserError: its rank is larger than vLLM's largest.
    """
    if not is_adapter(folder):
        return {}
    rank = adapter_rank(folder)
    if rank > max(_RANKS):
        raise UserError(
            f"the adapter in {folder} has rank {rank}, and vLLM applies at most {max(_RANKS)}; set "
            "synthesis.engine: transformers"
        )
    return {"enable_lora": True, "max_lora_rank": min(room for room in _RANKS if room >= rank)}


def _parameters(sampling: Sampling, stop: str | None, seed: int, ends: list[int]) -> SamplingParams:
    return SamplingParams(
        **sampling.model_dump(),  # vLLM has the same names
        stop=[stop] if stop else None,
        stop_token_ids=ends,
        include_stop_str_in_output=True,
        seed=seed % 2**31,
    )

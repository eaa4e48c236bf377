"""Generation with vLLM: the engine for GPUs."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from montessori_core.config import Sampling
from montessori_core.errors import UserError
from montessori_core.models import flops
from montessori_core.models.adapters import adapter_rank, is_adapter
from montessori_core.models.chat import encode_rendered, end_tokens
from montessori_core.models.fetch import fetch_model, full_model
from montessori_core.processor import generation_dtype
from montessori_core.synthesis.generation import Generated, Progress, Request, Step

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for


class VllmEngine:
    """A model on all GPUs of the job (tensor parallel), or on the CPU with a CPU build of vLLM.

    vLLM loads the base model of an adapter, and applies the adapter to every request: nothing is merged or written.
    """

    def __init__(self, model: str, tokenizer: Any) -> None:
        if not torch.cuda.is_available():
            # By default vLLM reserves one core and 40 % of the memory.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(os.environ.get('OMP_NUM_THREADS', '2')) - 1}")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        folder = fetch_model(model)
        self._weights = flops.weights_of(folder)
        self._adapter = LoRARequest("teacher", 1, str(folder)) if is_adapter(folder) else None
        self._llm = LLM(
            model=str(full_model(folder)),
            trust_remote_code=False,
            dtype="bfloat16" if torch.cuda.is_available() else generation_dtype(),
            seed=0,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            enable_prefix_caching=True,  # read a prompt once for all its samples
            enforce_eager=not torch.cuda.is_available(),  # on a CPU compilation costs more than it saves
            **_room_for_adapter(folder),
        )
        self._tokenizer = tokenizer
        self._ends = sorted(end_tokens(tokenizer))  # vLLM adds those of generation_config.json

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: str | None) -> Iterator[Step]:
        """See `Engine.generate`. There are no drafts: vLLM's random generator cannot start in the middle."""
        texts = {request.prompt for request in requests}
        prompts = {text: encode_rendered(self._tokenizer, text)[0] for text in texts}
        names = self._llm.enqueue(
            [{"prompt_token_ids": prompts[request.prompt]} for request in requests],
            [_parameters(sampling, stop, request.seed, self._ends) for request in requests],
            lora_request=self._adapter,
            use_tqdm=False,
        )
        flops.record_operations(self._weights, sum(map(len, prompts.values())))
        index = {name.partition("-")[0]: place for place, name in enumerate(names)}  # vLLM appends random characters
        progress = Progress([0.0] * len(requests), sampling.max_tokens)
        while self._llm.llm_engine.has_unfinished_requests():
            outputs = self._llm.llm_engine.step()
            finished = {index[output.request_id]: _read(output.outputs[0]) for output in outputs}
            for generated in finished.values():
                progress.end(generated.tokens)
                flops.record_operations(self._weights, generated.tokens)
            yield Step(finished, dict, progress.done(()))


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
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        stop=[stop] if stop else None,
        stop_token_ids=ends,
        include_stop_str_in_output=True,
        seed=seed % 2**31,
    )


def _read(completion: Any) -> Generated:
    reason = "length" if completion.finish_reason == "length" else "stop"
    return Generated(completion.text, len(completion.token_ids), reason, list(completion.token_ids))

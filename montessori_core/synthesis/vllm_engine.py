"""Generation with vLLM: the engine for GPUs."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams

from montessori_core.config import Sampling
from montessori_core.models import flops
from montessori_core.models.chat import encode_rendered
from montessori_core.models.fetch import fetch_model
from montessori_core.processor import generation_dtype
from montessori_core.synthesis.generation import Generated, Progress, Request, Step


class VllmEngine:
    """A model on all GPUs of the job (tensor parallel), or on the CPU with a CPU build of vLLM."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        if not torch.cuda.is_available():
            # By default vLLM reserves one core and 40 % of the memory.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(os.environ.get('OMP_NUM_THREADS', '2')) - 1}")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        folder = fetch_model(model)
        self._weights = flops.weights_of(folder)
        self._llm = LLM(
            model=str(folder),
            trust_remote_code=False,
            dtype="bfloat16" if torch.cuda.is_available() else generation_dtype(),
            seed=0,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            enable_prefix_caching=True,  # read a prompt once for all its samples
            enforce_eager=not torch.cuda.is_available(),  # on a CPU compilation costs more than it saves
        )
        self._tokenizer = tokenizer

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: str | None) -> Iterator[Step]:
        """See `Engine.generate`. There are no drafts: vLLM's random generator cannot start in the middle."""
        texts = {request.prompt for request in requests}
        prompts = {text: encode_rendered(self._tokenizer, text)[0] for text in texts}
        names = self._llm.enqueue(
            [{"prompt_token_ids": prompts[request.prompt]} for request in requests],
            [_parameters(sampling, stop, request.seed) for request in requests],
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


def _parameters(sampling: Sampling, stop: str | None, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        stop=[stop] if stop else None,
        include_stop_str_in_output=True,
        seed=seed % 2**31,
    )


def _read(completion: Any) -> Generated:
    reason = "length" if completion.finish_reason == "length" else "stop"
    return Generated(completion.text, len(completion.token_ids), reason, list(completion.token_ids))

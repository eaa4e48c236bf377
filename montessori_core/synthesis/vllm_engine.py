"""Generation with vLLM: the engine for GPUs."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams

from montessori_core import flops
from montessori_core.config import Sampling
from montessori_core.models import fetch_model
from montessori_core.synthesis.generation import Generated, Request

_CHUNK = 1024  # requests handed over together: enough to fill any GPU, few enough to report progress


class VllmEngine:
    """A model over all GPUs the job was given (tensor parallel), or on the CPU with a CPU build of vLLM."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        if not torch.cuda.is_available():
            # By default vLLM keeps one core for itself and takes 40 % of the memory for its cache.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(os.environ.get('OMP_NUM_THREADS', '2')) - 1}")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        folder = fetch_model(model)
        self._weights = flops.weights_of(folder)
        self._llm = LLM(
            model=str(folder),
            trust_remote_code=False,
            dtype="bfloat16",
            seed=0,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            enable_prefix_caching=True,  # a prompt is read once for all its samples
            enforce_eager=not torch.cuda.is_available(),  # compiling takes longer than a CPU run gains
        )
        self._tokenizer = tokenizer

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, stop: str | None, report: Callable[[int], None]
    ) -> list[list[Generated]]:
        """See `Engine.generate`."""
        results: list[list[Generated]] = []
        for start in range(0, len(requests), _CHUNK):
            results += self._generate_chunk(requests[start : start + _CHUNK], sampling, stop)
            report(len(results))
        return results

    def _generate_chunk(
        self, requests: Sequence[Request], sampling: Sampling, stop: str | None
    ) -> list[list[Generated]]:
        prompts, parameters = [], []
        for request in requests:
            ids = self._encode(request.prompt)
            for seed in request.seeds:
                prompts.append({"prompt_token_ids": ids})
                parameters.append(
                    SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        presence_penalty=sampling.presence_penalty,
                        repetition_penalty=sampling.repetition_penalty,
                        max_tokens=sampling.max_tokens,
                        stop=[stop] if stop else None,
                        include_stop_str_in_output=True,
                        seed=seed % 2**31,
                    )
                )
        outputs = iter(self._llm.generate(prompts, parameters, use_tqdm=False))
        results = [[_read(next(outputs).outputs[0]) for _ in request.seeds] for request in requests]
        read = {request.prompt: len(self._encode(request.prompt)) for request in requests}
        written = sum(generated.tokens for samples in results for generated in samples)
        flops.spend(self._weights, sum(read.values()) + written)
        return results

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids


def _read(completion: Any) -> Generated:
    return Generated(
        completion.text, len(completion.token_ids), "length" if completion.finish_reason == "length" else "stop"
    )

"""Build prompts, run a generation engine, and generation that it is compared with."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from montessori_core.config import Sampling, Synthesis
from montessori_core.data.sources import Task
from montessori_core.synthesis.engine import Generated, Request, Step
from montessori_core.synthesis.prompts import Prompt
from montessori_core.synthesis.sampler import draw_from_nucleus
from montessori_core.synthesis.strategies.opened import OpenStrategy
from montessori_core.synthesis.strategies.strategy import Material
from montessori_core.synthesis.transformers_engine import TransformersEngine


def build_prompts(
    count: int,
    style: str,
    settings: Synthesis,
    seed_pool: Sequence[Task],
    synthetic_pool: Sequence[Task],
    seed: int,
    first: int = 0,
) -> list[Prompt]:
    """Build prompts of a strategy that has read no documents; see `OpenStrategy.prompts`."""
    return OpenStrategy(Material(style, settings, seed_pool, synthetic_pool)).prompts(count, seed, first)


def continuations(steps: Iterable[Step]) -> list[Generated]:
    """Run all steps of an engine; return [requests] continuations."""
    finished: dict[int, Generated] = {}
    for step in steps:
        finished |= step.finished
    return [finished[index] for index in range(len(finished))]


def continue_without_cache(
    model: Any, tokenizer: Any, request: Request, sampling: Sampling, stop: str | None
) -> Generated:
    """Continue a single request, without a cache."""
    prompt: list[int] = tokenizer(request.prompt)["input_ids"]
    draws = np.random.Generator(np.random.Philox(request.seed)).random(sampling.max_tokens)
    drawn: list[int] = []
    while len(drawn) < sampling.max_tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + drawn]), use_cache=False).logits[0, -1]
        for token in {*prompt, *drawn}:
            logits[token] *= sampling.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        logits[list(set(drawn))] -= sampling.presence_penalty
        probabilities = (logits / sampling.temperature).softmax(-1)
        draw = torch.tensor(draws[len(drawn) : len(drawn) + 1])
        token = int(draw_from_nucleus(probabilities[None], sampling.top_p, draw))
        if token == tokenizer.eos_token_id:
            text = tokenizer.decode(drawn, skip_special_tokens=True)
            return Generated(text, len(drawn), "stop", [*drawn, token])
        drawn.append(token)
        text = tokenizer.decode(drawn, skip_special_tokens=True)
        if stop and stop in text:
            return Generated(text[: text.index(stop) + len(stop)], len(drawn), "stop", drawn)
    return Generated(text, len(drawn), "length", drawn)


def run_interrupted(
    engine: TransformersEngine, requests: list[Request], sampling: Sampling, stop: str | None
) -> list[Generated]:
    """Run an engine, stopping it every eleven steps and resuming from its drafts."""
    finished: dict[int, Generated] = {}
    while left := [index for index in range(len(requests)) if index not in finished]:
        for step in islice(engine.generate([requests[index] for index in left], sampling, stop), 11):
            finished |= {left[place]: generated for place, generated in step.finished.items()}
        for place, tokens in step.drafts().items():
            requests = list(requests)
            requests[left[place]] = replace(requests[left[place]], drawn=tuple(tokens))
    return [finished[index] for index in range(len(requests))]

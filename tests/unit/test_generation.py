"""Generation: the paper's decoding, drawn from seeds; prompts from draws of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from montessori_core.config import DataSource, Sampling, Synthesis
from montessori_core.models import load_tokenizer
from montessori_core.sources import Task, read_tasks
from montessori_core.synthesis.generation import Request, open_engine
from montessori_core.synthesis.prompts import CLOSE, build_prompts
from montessori_core.synthesis.transformers_engine import SeededSampler, TransformersEngine, draw_from_nucleus

SEEDS = [Task(f"seed-{i}", f"Task number {i} with {{braces}} and % signs") for i in range(20)]
SYNTHETIC = [Task(f"synthetic-{i}", f"Synthetic task {i}") for i in range(5)]


def test_prompt_shows_six_seeds_and_two_synthetic_tasks_shuffled() -> None:
    prompts = build_prompts(50, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=0)
    for prompt in prompts:
        ids = [task.id for task in prompt.demonstrations]
        assert len(set(ids)) == 8
        assert sum(name.startswith("synthetic") for name in ids) == 2
        assert all(f"<instruction>{task.text}</instruction>" in prompt.text for task in prompt.demonstrations)
    assert len({tuple(task.id for task in prompt.demonstrations) for prompt in prompts}) == 50
    assert len({[t.id.startswith("synthetic") for t in prompt.demonstrations].index(True) for prompt in prompts}) > 3


def test_seeds_take_the_place_of_absent_synthetic_tasks() -> None:
    (prompt,) = build_prompts(1, "completion", Synthesis(), SEEDS, [], seed=0)
    assert len(prompt.demonstrations) == 8
    assert prompt.text.endswith("<instruction>")


def test_a_prompt_depends_on_its_number_alone() -> None:
    many = build_prompts(10, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=3)
    assert build_prompts(4, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=3, first=6) == many[6:]
    assert build_prompts(4, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=4, first=6) != many[6:]


def test_nucleus_is_the_smallest_set_that_reaches_its_mass() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.05, 0.3, 0.05]]).repeat(1000, 1)
    draws = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    chosen = draw_from_nucleus(probabilities, 0.75, draws)
    counts = torch.bincount(chosen, minlength=5).tolist()
    assert counts == pytest.approx([0, 625, 0, 375, 0], abs=1)  # .5 and .3 of .8


@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_wide_and_narrow_nuclei_are_drawn_alike(top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((6, 5000), generator=generator) * torch.tensor([0.01, 0.1, 1.0, 3.0, 8.0, 0.5])[:, None]
    probabilities = logits.softmax(-1)
    draws = torch.rand(6, generator=generator, dtype=torch.float64)
    for row in range(6):
        order = np.argsort(-probabilities[row].numpy(), kind="stable")
        mass = np.cumsum(probabilities[row].double().numpy()[order])
        nucleus = int(np.searchsorted(mass, min(top_p, mass[-1]))) + 1
        expected = order[np.searchsorted(mass[:nucleus], float(draws[row]) * mass[nucleus - 1], side="right")]
        chosen = draw_from_nucleus(probabilities, top_p, draws)[row]
        assert probabilities[row, chosen] == pytest.approx(float(probabilities[row, expected]), rel=1e-5)


def test_penalties_count_what_vllm_counts() -> None:
    prompt, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])  # token 0 is padding
    sampling = Sampling(temperature=1.0, top_p=1.0, presence_penalty=0.5, repetition_penalty=2.0, max_tokens=4)
    sampler = SeededSampler(prompt, mask, [7], sampling)
    scores = torch.tensor([[1.0, 1.0, -1.0, 1.0, 1.0]])
    sampler._remember(prompt, 0, scores)
    sampler._remember(torch.tensor([[0, 1, 2, 3]]), 1, scores)
    assert sampler._penalize(scores).tolist() == [[1.0, 0.5, -2.0, 0.0, 1.0]]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> TransformersEngine:
    opened = open_engine("transformers", str(smollm2), load_tokenizer(str(smollm2)))
    assert isinstance(opened, TransformersEngine)
    return opened


def test_engine_draws_each_sample_from_its_seed(engine: Any) -> None:
    seeds = read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    (prompt,) = build_prompts(1, "completion", Synthesis(), seeds, [], seed=0)
    sampling = Sampling(max_tokens=24, presence_penalty=0.0)
    requests = [Request(prompt.text, (1, 2, 1, 3))]
    done: list[int] = []
    (first,) = engine.generate(requests, sampling, CLOSE, done.append)
    (again,) = engine.generate(requests, sampling, CLOSE, done.append)
    assert first == again
    assert first[0] == first[2]
    assert len({sample.text for sample in first}) == 3
    assert done == [1, 1]
    for sample in first:
        if sample.finish_reason == "stop":
            assert sample.text.endswith(CLOSE) or CLOSE not in sample.text
        else:
            assert sample.tokens == 24


def test_reading_a_prompt_once_for_all_samples_changes_nothing(smollm2: Path, engine: Any) -> None:
    """Near-greedy sampling equals transformers' own greedy search, prompts of different length in one batch."""
    tokenizer = load_tokenizer(str(smollm2))
    texts = ["The capital of France is", "Water boils at one hundred degrees, and it freezes at"]
    sampling = Sampling(temperature=1e-4, top_p=1e-6, presence_penalty=0.0, max_tokens=8)
    found = engine.generate([Request(text, (1, 2)) for text in texts], sampling, None, lambda done: None)
    for text, samples in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        greedy = engine._model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected = tokenizer.decode(greedy, skip_special_tokens=True)
        assert [sample.text for sample in samples] == [expected, expected]

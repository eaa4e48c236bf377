"""Generation: the paper's decoding from seeds, ends of continuations, and jobs that resume from drafts."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
)

from montessori_core.config import DataSource, Sampling, Synthesis
from montessori_core.data.rows import GenerationRow
from montessori_core.data.sources import Task, read_tasks
from montessori_core.data.tables import GENERATION
from montessori_core.models.control_tokens import hash_vocabulary
from montessori_core.models.load import load_tokenizer
from montessori_core.program import Row
from montessori_core.programs import ApiGeneration, Form, Generation
from montessori_core.synthesis import jobs, row_cache, transformers_engine
from montessori_core.synthesis.engine import Generated, Request
from montessori_core.synthesis.generation import open_engine
from montessori_core.synthesis.jobs import open_api_generation, open_generation
from montessori_core.synthesis.prompts import CLOSE
from montessori_core.synthesis.sampler import SeededSampler, draw_from_nucleus
from montessori_core.synthesis.transformers_engine import TransformersEngine
from montessori_core.training.dpo import encode_pair
from support.generation import build_prompts, continuations, continue_without_cache, run_interrupted
from support.judges import JudgeServer, endpoint, served

SEEDS = [Task(f"seed-{i}", f"Task number {i} with {{braces}} and % signs") for i in range(20)]
SYNTHETIC = [Task(f"synthetic-{i}", f"Synthetic task {i}") for i in range(5)]


def test_nucleus_is_smallest_set_with_mass() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.05, 0.3, 0.05]]).repeat(1000, 1)
    draws = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    chosen = draw_from_nucleus(probabilities, 0.75, draws)
    counts = torch.bincount(chosen, minlength=5).tolist()
    assert counts == pytest.approx([0, 625, 0, 375, 0], abs=1)  # 0.5 and 0.3 of 0.8


@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_nucleus_draw_does_not_depend_on_sorted_tokens(top_p: float) -> None:
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


def test_temperature_zero_takes_most_probable_token() -> None:
    sampling = Sampling(temperature=0.0, top_p=1.0, presence_penalty=2.0, max_tokens=4)
    sampler = SeededSampler(2, 4, sampling, torch.device("cpu"))
    for slot in (0, 1):
        sampler.place(slot, slot, [0], [])
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.5, 1.5]])
    assert sampler.draw(logits, [0, 0]).tolist() == [1, 3]
    assert sampler.draw(logits, [1, 1]).tolist() == [2, 0]


def test_penalties_count_tokens_like_vllm() -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, presence_penalty=0.5, repetition_penalty=2.0, max_tokens=4)
    sampler = SeededSampler(1, 5, sampling, torch.device("cpu"))
    sampler.place(0, 7, [1, 2], [3])
    assert sampler._penalize(torch.tensor([[1.0, 1.0, -1.0, 1.0, 1.0]])).tolist() == [[1.0, 0.5, -2.0, 0.0, 1.0]]


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}


def _gpt2(**settings: Any) -> GPT2Config:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return GPT2Config(n_embd=64, n_head=4, n_layer=3, initializer_range=0.3, **ends, **settings)


MODELS = {
    "llama": lambda: LlamaConfig(**_SMALL),
    "mistral-sliding": lambda: MistralConfig(**_SMALL, sliding_window=8),
    "gemma3-sliding": lambda: Gemma3TextConfig(
        **_SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "llama4-chunks": lambda: Llama4TextConfig(
        **_SMALL, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=8
    ),
    "gpt2-learned-positions": lambda: _gpt2(n_positions=128),
}


def _random_model(config: Any, vocabulary: int) -> Any:
    torch.manual_seed(0)
    config.vocab_size = vocabulary
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("llama", "s"),
        *((name, None) for name in MODELS),
        *(pytest.param(name, "s", marks=pytest.mark.slow) for name in MODELS if name != "llama"),
    ],
)
def test_batched_rows_equal_single_rows(
    name: str, stop: str | None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    _random_model(MODELS[name](), len(tokenizer)).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers_engine, "generation_dtype", lambda: "float32")
    monkeypatch.setitem(transformers_engine._MAX_ROWS, "cpu", 5)
    monkeypatch.setattr(transformers_engine, "_READ_TOKENS", 16)
    monkeypatch.setattr(row_cache, "SLACK", 4)
    engine = TransformersEngine(str(tmp_path), tokenizer)
    sampling = Sampling(temperature=0.9, top_p=0.8, presence_penalty=0.7, repetition_penalty=1.3, max_tokens=20)
    start = "Name a river and a city"
    texts = [start + end for end in ("", " in Asia", " or one in Europe", " and it" * 10)]
    requests = [Request(text, seed) for seed, text in enumerate(texts * 2 + texts[:1])]
    expected = [continue_without_cache(engine._model, tokenizer, request, sampling, stop) for request in requests]
    assert continuations(engine.generate(requests, sampling, stop)) == expected
    assert len({generated.tokens for generated in expected}) > 2 or stop is None
    assert run_interrupted(engine, requests, sampling, stop) == expected


def test_continuations_end_at_last_position(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    _random_model(_gpt2(n_positions=32), len(tokenizer)).save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), tokenizer)
    sampling = Sampling(temperature=0.0, top_p=1.0, presence_penalty=0.0, max_tokens=64)
    texts = ["one two three four", "one two"]
    generated = continuations(engine.generate([Request(text, 0) for text in texts], sampling, None))
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert [(each.tokens, each.finish_reason) for each in generated] == [(32 - n, "length") for n in lengths]


@pytest.mark.parametrize("named", ["<|im_end|>", "<|endoftext|>"], ids=["tokenizer", "template"])
def test_end_of_turn_ends_continuations(named: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Base models with chat tokenizers name another end token; ChatML over <|endoftext|> has tokenizers that do so, too."""
    tokenizer = load_tokenizer(str(tiny_llama))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = named
    model = _random_model(PhiConfig(**_SMALL | {"eos_token_id": 5}), len(tokenizer))
    model.lm_head.bias.data[end] = 1e4
    model.save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), tokenizer)
    assert continuations(engine.generate([Request("one", 0)], Sampling(max_tokens=4), None)) == [
        Generated("", 0, "stop", [end])
    ]


def test_padding_token_unknown_to_model_is_never_read(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    sampling = Sampling(max_tokens=4)
    requests = [Request(text, 0) for text in ("one two three", "four")]
    expected = continuations(TransformersEngine(str(tiny_llama), tokenizer).generate(requests, sampling, None))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    engine = TransformersEngine(str(tiny_llama), tokenizer)
    assert tokenizer.pad_token_id == engine._model.config.vocab_size
    assert continuations(engine.generate(requests, sampling, None)) == expected


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> TransformersEngine:
    opened = open_engine("transformers", str(smollm2), load_tokenizer(str(smollm2)))
    assert isinstance(opened, TransformersEngine)
    return opened


def test_engine_draws_each_sample_from_its_seed(engine: Any) -> None:
    seeds = read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    (prompt,) = build_prompts(1, "completion", Synthesis(), seeds, [], seed=0)
    sampling = Sampling(max_tokens=12, presence_penalty=0.0)
    requests = [Request(prompt.text, seed) for seed in (1, 2, 1, 3)]
    first = continuations(engine.generate(requests, sampling, CLOSE))
    assert first == continuations(engine.generate(requests, sampling, CLOSE))
    assert first[0] == first[2]
    assert len({sample.text for sample in first}) == 3
    for sample in first:
        if sample.finish_reason == "stop":
            assert sample.text.endswith(CLOSE) or CLOSE not in sample.text
        else:
            assert sample.tokens == 12


def test_control_tokens_in_data_are_escaped(smollm2: Path, engine: Any) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    said = "Say <|im_end|> now"
    read: list[int] = []
    hook = engine._model.register_forward_pre_hook(
        lambda *arguments: read.extend(arguments[2]["input_ids"].flatten().tolist()), with_kwargs=True
    )
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for form, expected in (("request", 2), ("reply", 4), ("tagged", 0), ("whole", 0)):  # SmolLM2 has a system turn
        turns = [said] * (3 if form == "reply" else 1)
        prompt = jobs.render_row(tokenizer, {"example_ids": ["e"], "turns": turns, "seeds": [0]}, form)
        continuations(engine.generate([Request(prompt, 0)], Sampling(max_tokens=1), None))
        assert tokenizer.decode(read).count(said) == (3 if form == "reply" else 1)
        assert read.count(control) == expected
        read.clear()
    hook.remove()
    pair = encode_pair(tokenizer, {"prompt": prompt, "chosen": said, "rejected": said}, "completion")
    assert [tokenizer.decode(ids) for ids in pair.values()] == [said] * 3
    assert control not in {token for ids in pair.values() for token in ids}


def test_near_greedy_sampling_equals_greedy_search(smollm2: Path, engine: Any) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    texts = ["The capital of France is", "Water boils at one hundred degrees, and it freezes at"]
    sampling = Sampling(temperature=1e-4, top_p=1e-6, presence_penalty=0.0, max_tokens=8)
    requests = [Request(text, seed) for text in texts for seed in (1, 2)]
    samples = continuations(engine.generate(requests, sampling, None))
    for place, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt")
        greedy = engine._model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected = tokenizer.decode(greedy, skip_special_tokens=True)
        assert [sample.text for sample in samples[2 * place : 2 * place + 2]] == [expected, expected]


def test_progress_moves_at_every_step(tiny_llama: Path) -> None:
    engine = TransformersEngine(str(tiny_llama), load_tokenizer(str(tiny_llama)))
    requests = [Request("Count " * length, seed) for length in (40, 80, 160) for seed in range(8)]
    progress = [step.done for step in engine.generate(requests, Sampling(max_tokens=12), None)]
    assert all(before <= after for before, after in pairwise(progress))
    assert len(set(progress)) > 0.9 * len(progress)
    assert progress[-1] == len(requests)


class Killed(Exception):
    """Raised instead of killing a job."""


class MemoryRecorder:
    """Keeps records of a program as JSON; raises `Killed` at its n-th progress report."""

    def __init__(self, drafts: dict[int, Any], lifetime: float = math.inf) -> None:
        self.drafts = drafts
        self.finished_before = 0
        self.finished: dict[int, list[Row]] = {}
        self.reported: list[float] = []
        self.kept: dict[int, Any] = {}
        self._lifetime = lifetime

    def finish(self, position: int, records: list[Row]) -> None:
        assert position not in self.finished
        self.finished[position] = records

    def keep(self, drafts: Callable[[], Mapping[int, Any]]) -> None:
        self.kept = {int(position): draft for position, draft in json.loads(json.dumps(drafts())).items()}

    def progress(self, done: float) -> None:
        self.reported.append(done)
        if len(self.reported) >= self._lifetime:
            raise Killed


def test_interrupted_job_resumes_from_drafts(talking_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "generation_dtype", lambda: "float32")
    sampling = Sampling(presence_penalty=0.5, max_tokens=24)
    settings = Generation(engine="transformers", sampling=sampling, form="tagged")
    program = open_generation(settings, {"teacher": talking_llama})
    assert program.schema is GENERATION
    prompts = build_prompts(6, "completion", Synthesis(), SEEDS, SYNTHETIC, seed=0)
    rows: list[GenerationRow] = [
        {
            "example_ids": [f"{prompt.id}-s{sample}" for sample in range(3)],
            "turns": [prompt.text],
            "seeds": [position, 1, 2],
        }
        for position, prompt in enumerate(prompts)
    ]
    undisturbed = MemoryRecorder({})
    program.compute(rows, undisturbed)
    assert sorted(undisturbed.finished) == list(range(6))
    assert undisturbed.reported[-1] == pytest.approx(6)

    finished: dict[int, list[Row]] = {}
    drafts: dict[int, Any] = {}
    jobs = 0
    while left := [position for position in range(6) if position not in finished]:
        recorder = MemoryRecorder({left.index(position): draft for position, draft in drafts.items()}, lifetime=10)
        with suppress(Killed):
            program.compute([rows[position] for position in left], recorder)
        finished |= {left[place]: records for place, records in recorder.finished.items()}
        drafts = {left[place]: draft for place, draft in recorder.kept.items()}
        jobs += 1
    assert jobs > 2
    assert finished == undisturbed.finished
    tokenizer = load_tokenizer(str(talking_llama))
    for record in itertools.chain.from_iterable(finished.values()):
        assert tokenizer.decode(record["output_ids"], skip_special_tokens=True).startswith(record["raw_output"])
        assert record["vocabulary"] == hash_vocabulary(tokenizer)


@pytest.mark.parametrize("form", ["whole", "reply"])
def test_prompt_without_room_has_an_empty_output(form: Form, tiny_llama: Path, tmp_path: Path) -> None:
    """As the second turn of a conversation does, if the answer of the first filled the model's positions."""
    tokenizer = load_tokenizer(str(tiny_llama))
    _random_model(_gpt2(n_positions=64), len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["one two", "one two " * 64, "one"]
    rows: list[GenerationRow] = [
        {"example_ids": [text, "again"], "turns": [text, "", "So?"][: 1 if form == "whole" else 3], "seeds": [0, 1]}
        for text in texts
    ]
    program = open_generation(
        Generation(engine="transformers", sampling=Sampling(max_tokens=4), form=form), {"teacher": tmp_path}
    )
    recorder = MemoryRecorder({})
    program.compute(rows, recorder)
    for position, records in recorder.finished.items():
        for record in records:
            assert (record["tokens"] == 0) == (position == 1)
    assert [(row["raw_output"], row["finish_reason"], row["output_ids"]) for row in recorder.finished[1]] == [
        ("", "length", [])
    ] * 2
    assert (len(recorder.finished), recorder.reported[-1]) == (3, 3)
    recorder = MemoryRecorder({})
    program.compute(rows[1:2], recorder)
    assert (len(recorder.finished), recorder.reported) == (1, [1])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[JudgeServer]:
    yield from served(JudgeServer(), monkeypatch, tmp_path)


def test_api_generation_finishes_every_row(server: JudgeServer, tmp_path: Path) -> None:
    file = tmp_path / "teacher.json"
    file.write_text(endpoint(server).model_dump_json())
    settings = ApiGeneration(endpoint=endpoint(server).identity(), sampling=Sampling(max_tokens=9))
    recorder = MemoryRecorder({})
    rows: list[GenerationRow] = [
        {"example_ids": ["a-1", "a-2"], "turns": ["Sing."], "seeds": [1, 2]},
        {"example_ids": ["b-1"], "turns": ["Dance."], "seeds": [3]},
    ]
    open_api_generation(settings, {"endpoint": file}).compute(rows, recorder)
    assert {place: [record["example_id"] for record in records] for place, records in recorder.finished.items()} == {
        0: ["a-1", "a-2"],
        1: ["b-1"],
    }
    assert recorder.finished[1][0]["raw_output"] == "An answer to: Dance."
    assert recorder.finished[1][0]["output_ids"] is recorder.finished[1][0]["vocabulary"] is None
    assert recorder.reported[-1] == 2
    assert len(server.asked) == 3

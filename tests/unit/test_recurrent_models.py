"""Models with recurrent layers generate as transformers does, and influence on them is exact."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from montessori_core.config import Lora, Sampling
from montessori_core.errors import UserError
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.losses import TokenLosses, make_batch
from montessori_core.influence.projections import AlongDirections
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.models.load import load_tokenizer, lora_config, with_lora
from montessori_core.synthesis import row_cache, transformers_engine
from montessori_core.synthesis.engine import Request
from montessori_core.synthesis.transformers_engine import TransformersEngine
from montessori_core.training.moments import Moments
from support.generation import continuations, continue_without_cache, run_interrupted
from support.recurrent import CACHED, UNCACHED, recurrent_model

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, top_p=1.0, presence_penalty=0.0, max_tokens=12)
START = "Name a river and a city"
TEXTS = [START + end for end in ("", " in Asia", " or one in Europe", " and it" * 10)]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave and join often, and prompts are read in parts."""
    monkeypatch.setattr(transformers_engine, "generation_dtype", lambda: "float32")
    monkeypatch.setitem(transformers_engine._MAX_ROWS, "cpu", 3)
    monkeypatch.setattr(transformers_engine, "_READ_TOKENS", 16)
    monkeypatch.setattr(row_cache, "SLACK", 4)


def open_engine(name: str, tokenizer: Any, folder: Path) -> TransformersEngine:
    recurrent_model(name, len(tokenizer)).save_pretrained(folder)
    return TransformersEngine(str(folder), tokenizer)


@pytest.mark.parametrize("name", [*CACHED, *UNCACHED])
@pytest.mark.usefixtures("small_batches")
def test_batched_rows_equal_single_rows(
    name: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    with caplog.at_level(logging.WARNING, "montessori_core"):
        engine = open_engine(name, tokenizer, tmp_path)
    assert ("reads a row again for every token" in caplog.text) is (name in UNCACHED)
    sampling = Sampling(temperature=0.9, top_p=0.8, presence_penalty=0.7, repetition_penalty=1.3, max_tokens=12)
    requests = [Request(text, seed) for seed, text in enumerate(TEXTS + TEXTS[:1], 10)]
    expected = [continue_without_cache(engine._model, tokenizer, request, sampling, None) for request in requests]
    assert continuations(engine.generate(requests, sampling, None)) == expected
    assert run_interrupted(engine, requests, sampling, None) == expected


@pytest.mark.parametrize("name", [*CACHED, *(name for name in UNCACHED if name != "xlstm")])  # its generate fails
@pytest.mark.usefixtures("small_batches")
def test_greedy_rows_equal_generate(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    engine = open_engine(name, tokenizer, tmp_path)
    drawn = [each.token_ids for each in continuations(engine.generate([Request(t, 0) for t in TEXTS], GREEDY, None))]
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    outputs = [engine._model.generate(input_ids=ids, max_new_tokens=12, do_sample=False) for ids in prompts]
    assert drawn == [output[0, ids.shape[1] :].tolist() for output, ids in zip(outputs, prompts, strict=True)]


@pytest.mark.parametrize(("name", "in_parts"), [("qwen3.5", True), ("falcon-h1", True), ("jamba", False)])
def test_prompts_are_read_once(name: str, in_parts: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """The common beginning too, unless the model forgets its state when several tokens follow."""
    tokenizer = load_tokenizer(str(tiny_llama))
    engine = open_engine(name, tokenizer, tmp_path)
    assert row_cache.find_reading(engine._model) == ("in parts" if in_parts else "whole")
    lengths = [len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS]  # the last token is read to draw
    shared = lengths[0] if in_parts else 0
    read = 0

    def count(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        nonlocal read
        read += options["input_ids"].numel()

    engine._model.register_forward_pre_hook(count, with_kwargs=True)
    requests = [Request(text, seed) for text in TEXTS for seed in range(4)]
    generated = continuations(engine.generate(requests, Sampling(max_tokens=8), None))
    written = sum(len(each.token_ids or []) for each in generated)
    beginning = max(shared, 1)  # a model without it reads a token to learn the shapes
    assert read == written + beginning + sum(length - shared for length in lengths)


def examples(count: int, seed: int) -> list[Encoded]:
    """Return examples of different lengths, which are padded in batches."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, 300, (6 + number % 5,), generator=generator).tolist() for number in range(count)]
    return [Encoded(ids, [IGNORED] * 3 + ids[3:], False) for ids in made]


@pytest.mark.parametrize(
    "name", ["mamba", "jamba", "granite-hybrid", "falcon-h1", "qwen3.5", "recurrent-gemma", "rwkv"]
)
def test_influence_equals_step_of_torch(name: str) -> None:
    """Convolutions, decay rates (A_log) and their biases (dt_bias) take the step like other weights."""
    model = recurrent_model(name, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
    losses = TokenLosses(model)

    def step(batch: list[Encoded]) -> None:
        optimizer.zero_grad()
        losses(make_batch(list(enumerate(batch)), CPU)).mean().backward()
        for parameter in model.parameters():  # an expert that gets no token
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()

    for seed in range(3):
        step(examples(8, seed))
    moments = Moments(
        *(
            {name: optimizer.state[p][key].clone() for name, p in model.named_parameters()}
            for key in ("exp_avg", "exp_avg_sq")
        ),
        3,
    )
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    reference, alone = (ReferenceSet(examples(6, seed=8), tokens, CPU) for tokens in (1024, 1))
    before = reference.evaluate(losses).reduce("example")
    assert alone.evaluate(losses).reduce("example") == pytest.approx(before, rel=1e-6)
    (probed,) = examples(1, seed=9)
    step([probed])
    expected = before - reference.evaluate(losses).reduce("example")

    model.load_state_dict(start)
    optimizer.zero_grad()
    adamw = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.1, 4)
    student = ResidentStudent(model, moments, adamw, CPU)
    assert InfluenceMeter(student, reference).measure(probed).influence_student == pytest.approx(expected, abs=2e-6)

    generator = torch.Generator().manual_seed(1)
    direction = {
        name: torch.randn(parameter.shape, generator=generator) for name, parameter in student.parameters.items()
    }
    batch = make_batch([(0, probed)], CPU)
    student.take_step(batch)
    moved = {name: parameter.detach() - start[name] * (1 - 1e-4) for name, parameter in student.parameters.items()}
    student.restore()
    projected = sum(float((moved[name].double() * direction[name].double()).sum()) for name in moved)
    ((_, projections),) = student.project_steps([batch], AlongDirections([direction]))
    assert projections.tolist() == pytest.approx([projected], rel=1e-3)


def test_output_projection_of_mamba_gets_no_adapter() -> None:
    model = recurrent_model("mamba2", 300)
    adapted = with_lora(model, Lora(rank=4))
    assert {
        name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name
    } == {"in_proj"}
    message = "student.lora.targets: PEFT cannot adapt 'mixer.out_proj' of a Mamba model"
    with pytest.raises(UserError, match=message):
        lora_config(recurrent_model("mamba2", 300), Lora(targets=("mixer.out_proj",)), "student.lora")

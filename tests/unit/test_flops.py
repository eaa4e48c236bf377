"""Floating-point operations: two per weight and token forward and four backward."""

from pathlib import Path

import torch

from montessori_core.config import Lora, Sampling
from montessori_core.influence.losses import TokenLosses, make_batch
from montessori_core.models import flops
from montessori_core.models.chat import encode_example
from montessori_core.models.load import load_model, load_tokenizer, with_lora
from montessori_core.synthesis.engine import Request
from montessori_core.synthesis.transformers_engine import TransformersEngine
from support.generation import continuations

_ATTENTION, _MLP, _NORMS = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 128, 2 * 64  # a layer of the tiny Llama
LAYERS = 2 * (_ATTENTION + _MLP + _NORMS) + 64


def test_flops_are_two_and_six_per_weight(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), torch.float32)
    head = model.config.vocab_size * 64
    ids = torch.arange(10)[None]
    flops.read_and_reset()
    with torch.no_grad():
        model(input_ids=ids)
    assert flops.read_and_reset() == 2 * 10 * (LAYERS + head)
    model(input_ids=ids, labels=ids).loss.backward()
    assert flops.read_and_reset() == 6 * 10 * (LAYERS + head)
    assert flops.read_and_reset() == 0
    with_lora(model, Lora())(input_ids=ids, labels=ids).loss.backward()
    assert flops.read_and_reset() == 4 * 10 * (LAYERS + head)


def test_losses_project_only_labelled_positions(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    model = load_model(str(tiny_llama), torch.float32)
    losses = TokenLosses(model)
    example = encode_example(tokenizer, "Name a river.", "The Danube.", 64)
    flops.read_and_reset()
    with torch.no_grad():
        losses(make_batch([(0, example)], torch.device("cpu")))
    head = model.config.vocab_size * 64
    expected = len(example.input_ids) * LAYERS + example.response_tokens * head
    assert flops.read_and_reset() == 2 * expected


def test_generation_flops_count_shared_prompt_once(tiny_llama: Path) -> None:
    engine = TransformersEngine(str(tiny_llama), load_tokenizer(str(tiny_llama)))
    flops.read_and_reset()
    continuations(engine.generate([Request("one two three", seed) for seed in (1, 2)], Sampling(max_tokens=5), None))
    few = flops.read_and_reset()
    text = "one two three " * 50
    continuations(engine.generate([Request(text, seed) for seed in (1, 2)], Sampling(max_tokens=5), None))
    prompt = len(load_tokenizer(str(tiny_llama))(text, add_special_tokens=False)["input_ids"])
    more = flops.read_and_reset() - few
    assert abs(more / (2 * LAYERS) - prompt) < 10


def test_flops_count_weights_on_disk(tiny_llama: Path, smollm2: Path, tmp_path: Path) -> None:
    """Those of an adapter are its base model's."""
    with_lora(load_model(str(tiny_llama), torch.float32), Lora()).save_pretrained(tmp_path)
    for folder in (tiny_llama, smollm2, tmp_path):
        model = load_model(str(folder), torch.float32)
        flops.read_and_reset()
        with torch.no_grad():
            model(input_ids=torch.arange(3)[None])
        assert flops.read_and_reset() == 2 * 3 * flops.weights_of(folder)

"""Derivatives of example losses along directions: equal to autograd's gradients, for many uses of a parameter."""

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from montessori_core.influence.derivatives import ExampleDerivatives, InseparableError
from montessori_core.influence.gradients import pass_gradients_to
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.influence.projections import as_matrix
from montessori_core.models.chat import IGNORED, Encoded
from support.sizes import SMALL

CPU = torch.device("cpu")
SIZES = SMALL | {"vocab_size": 300}
SEPARABLE = {
    "Llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "Llama, tied weights": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "Llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "Qwen 2, biases of queries": Qwen2Config(**SIZES),
    "Qwen 3, norms of heads": Qwen3Config(**SIZES),
    "Gemma 3, norms of 1 + weight": Gemma3TextConfig(**SIZES),
    "GPT-NeoX, layer norms": GPTNeoXConfig(**{**SIZES, "hidden_size": 32}),
}
INSEPARABLE = {
    "GPT-2, its own layers": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def encoded(lengths: list[int]) -> list[Encoded]:
    draw = random.Random(0)
    made = []
    for length in lengths:
        ids = [draw.randrange(3, 300) for _ in range(length)]
        made.append(Encoded(ids, [IGNORED] * (length // 3) + ids[length // 3 :], False))
    return made


def opened(config: Any, lora: bool = False) -> tuple[Any, dict[str, torch.nn.Parameter], dict[str, list[torch.Tensor]]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero and norms one at first
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    directions = {name: [as_matrix(torch.randn_like(p)).detach() for _ in range(2)] for name, p in parameters.items()}
    return model, parameters, directions


def derivatives_of(model: Any, parameters: Any, directions: Any, examples: list[Encoded]) -> list[list[float]]:
    batch = make_batch(list(enumerate(examples)), CPU)
    derivatives = ExampleDerivatives(parameters, directions, batch, 2)
    with derivatives:
        losses = TokenLosses(model)(batch, derivatives, derivatives.projecting)
    means = torch.zeros(len(examples)).index_add(0, batch.rows, losses) / torch.bincount(batch.rows)
    with pass_gradients_to(lambda name, _, gradient: derivatives.add_gradient(name, gradient), parameters):
        means.sum().backward()
    found: list[list[float]] = derivatives.totals.tolist()
    return found


def by_autograd(model: Any, parameters: Any, directions: Any, example: Encoded) -> list[float]:
    loss = example_loss(TokenLosses(model), make_batch([(0, example)], CPU))
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return [
        sum(
            float((directions[name][number] * as_matrix(gradient)).sum(dtype=torch.float64))
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        )
        for number in range(2)
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("config", SEPARABLE.values(), ids=SEPARABLE.keys())
def test_derivatives_of_batch_equal_autograd_one_by_one(config: Any, lora: bool) -> None:
    opened_model = opened(config, lora)
    examples = encoded([24, 9, 17])
    found = derivatives_of(*opened_model, examples)
    for values, example in zip(found, examples, strict=True):
        assert values == pytest.approx(by_autograd(*opened_model, example), rel=1e-4, abs=1e-4)
        assert min(map(abs, values)) > 1e-2


@pytest.mark.parametrize("config", INSEPARABLE.values(), ids=INSEPARABLE.keys())
def test_inseparable_layers_take_one_example(config: Any) -> None:
    opened_model = opened(config)
    (example,) = encoded([20])
    assert derivatives_of(*opened_model, [example])[0] == pytest.approx(
        by_autograd(*opened_model, example), rel=1e-4, abs=1e-4
    )
    with pytest.raises(InseparableError):
        derivatives_of(*opened_model, encoded([20, 11]))


def test_weights_given_by_name_are_left_to_autograd() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    batch = make_batch([(0, encoded([5])[0])], CPU)
    with ExampleDerivatives({"w": weight}, {"w": [torch.ones(2, 3)]}, batch, 1):
        torch.nn.functional.linear(torch.ones(1, 3), weight=weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("lengths", [[30], [30, 12, 21]], ids=["one example", "three"])
def test_chunked_logits_change_no_derivative(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    opened_model = opened(SEPARABLE["Llama, tied weights"])
    whole = derivatives_of(*opened_model, encoded(lengths))
    monkeypatch.setattr("montessori_core.influence.losses.LOGITS_AT_A_TIME", 300 * 4)
    for chunked, expected in zip(derivatives_of(*opened_model, encoded(lengths)), whole, strict=True):
        assert chunked == pytest.approx(expected, rel=1e-4)

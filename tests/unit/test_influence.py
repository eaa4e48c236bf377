"""Local data influence: equal to the explicit procedure, and independent of order, batches and earlier examples."""

import copy
import itertools
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
from montessori_core.errors import DataError
from montessori_core.influence import (
    AdamW,
    InfluenceMeter,
    Measurement,
    ReferenceSet,
    ResidentStudent,
    SequentialReference,
)
from montessori_core.influence import losses as losses_module
from montessori_core.influence.adamw import step_with_counts
from montessori_core.influence.gradients import GradientCapture
from montessori_core.influence.linear import LinearMeter
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.influence.sequential import is_decided
from montessori_core.influence.student import ON_DEVICE
from montessori_core.influence.table import error_by_halves
from montessori_core.influence.target_jobs import TargetsMeter
from montessori_core.models.chat import IGNORED, Encoded, encode_example
from montessori_core.models.load import load_tokenizer
from montessori_core.training.moments import Moments, load_moments, save_moments, weights_checksums
from support.sizes import SMALL

CPU = torch.device("cpu")


@given(
    steps=st.integers(0, 5),
    rate=st.sampled_from([1e-6, 5e-6, 1e-3]),
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.95, 0.999]),
    epsilon=st.sampled_from([1e-8, 1e-6]),
    decay=st.sampled_from([0.0, 0.1]),
    share=st.sampled_from([1.0, 1 / 8, 1 / 32, 0.3]),
    seed=st.integers(0, 1000),
)
def test_step_equals_torch_adamw_bit_for_bit(
    steps: int, rate: float, beta1: float, beta2: float, epsilon: float, decay: float, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(37, generator=generator))
    optimizer = torch.optim.AdamW(
        [weight], lr=rate, betas=(beta1, beta2), eps=epsilon, weight_decay=decay, foreach=False
    )
    for _ in range(steps):
        weight.grad = torch.randn(37, generator=generator)
        optimizer.step()
    state = optimizer.state[weight]
    first = state["exp_avg"].clone() if steps else torch.zeros(37)
    second = state["exp_avg_sq"].clone() if steps else torch.zeros(37)
    kept = first.clone(), second.clone()
    ours, gradient = weight.detach().clone(), torch.randn(37, generator=generator)
    AdamW(rate, beta1, beta2, epsilon, decay, steps + 1, share).step_(ours, gradient, first, second)
    weight.grad = share * gradient
    optimizer.step()
    assert torch.equal(ours, weight)
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])


def examples(count: int, seed: int, vocabulary: int = 500) -> list[Encoded]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [draw.randrange(3, vocabulary) for _ in range(draw.randint(12, 40))]
        prompt = draw.randint(2, len(ids) - 4)
        made.append(Encoded(ids, [IGNORED] * prompt + ids[prompt:], False))
    return made


@pytest.fixture(scope="module")
def warm(tiny_llama: Path) -> tuple[Any, Moments, torch.optim.Optimizer]:
    """A tiny student after a few AdamW steps, with their moments."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    losses = TokenLosses(model)
    for example in examples(6, seed=1):
        example_loss(losses, make_batch([(0, example)], CPU)).backward()
        optimizer.step()
        optimizer.zero_grad()
    first = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    second = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}
    return model.eval(), Moments(first, second, 6), optimizer


def copy_of(warm: Any, tiny_llama: Path) -> Any:
    """Return another model with the weights of the warm student."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.load_state_dict(warm[0].state_dict())
    return model


REFERENCE = examples(9, seed=2)
PROBING = examples(8, seed=3)
STEP = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.0, 7)


def meter(warm: Any, tiny_llama: Path, **options: Any) -> InfluenceMeter:
    model = copy_of(warm, tiny_llama)
    reference = ReferenceSet(REFERENCE, options.pop("batch_tokens", 128), CPU)
    placement = options.pop("placement", ON_DEVICE)
    step = replace(STEP, example_weight=options.pop("weight", 1.0))
    student = ResidentStudent(
        model, warm[1], step, CPU, placement=placement, typical_tokens=options.pop("typical_tokens", None)
    )
    return InfluenceMeter(student, reference, **options)


def spelled_out(warm: Any, tiny_llama: Path, example: Encoded | None, reduction: str, weight: float = 1.0) -> float:
    """Return the loss after one step as in the paper: a fresh copy, torch's optimizer, full logits, one example at a time."""
    model = copy_of(warm, tiny_llama)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    optimizer.load_state_dict(copy.deepcopy(warm[2].state_dict()))  # a step changes the tensors
    if example is not None:
        ids = torch.tensor([example.input_ids])
        (weight * model(input_ids=ids, labels=torch.tensor([example.labels])).loss).backward()
        optimizer.step()
    sums, counts = [], []
    with torch.no_grad():
        for item in REFERENCE:
            labels = torch.tensor([item.labels])
            loss = model(input_ids=torch.tensor([item.input_ids]), labels=labels).loss
            sums.append(float(loss) * item.response_tokens)
            counts.append(item.response_tokens)
    if reduction == "example":
        return sum(s / n for s, n in zip(sums, counts, strict=True)) / len(sums)
    return sum(sums) / sum(counts)


@pytest.mark.parametrize(("reduction", "weight"), [("example", 1.0), ("token", 1.0), ("example", 1 / 8)])
def test_exact_influence_equals_explicit_procedure(warm: Any, tiny_llama: Path, reduction: str, weight: float) -> None:
    fast = meter(warm, tiny_llama, reduction=reduction, weight=weight)
    before = spelled_out(warm, tiny_llama, None, reduction)
    for example in PROBING[:4]:
        expected = before - spelled_out(warm, tiny_llama, example, reduction, weight)
        assert fast.measure(example).influence_student == pytest.approx(expected, abs=2e-6)
        assert abs(expected) > 1e-4  # large enough for the comparison above


def test_weight_per_token_equals_training_batch_weight(warm: Any, tiny_llama: Path) -> None:
    """An example's gradient in a batch whose loss is the mean over all tokens: its share of the tokens."""
    size, plain = 32, meter(warm, tiny_llama)
    typical = sum(example.response_tokens for example in PROBING) / len(PROBING)
    exact, projected = (
        meter(warm, tiny_llama, estimator=estimator, weight=1 / size, typical_tokens=typical)
        for estimator in ("exact", "first_order")
    )
    before = spelled_out(warm, tiny_llama, None, "example")
    assert len({example.response_tokens for example in PROBING}) > 3
    for example, first_order in zip(PROBING, projected.measure_batch(PROBING), strict=True):
        share = example.response_tokens / (size * typical)
        measured = exact.measure(example)
        expected = before - spelled_out(warm, tiny_llama, example, "example", share)
        assert measured.influence_student == pytest.approx(expected, abs=2e-6)
        assert first_order.influence_student == pytest.approx(expected, abs=1e-4, rel=0.05)
        norm = plain.measure(example).gradient_norm
        assert measured.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert first_order.gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("count", [64, pytest.param(1000, marks=pytest.mark.slow)])
def test_student_is_bit_identical_after_examples(warm: Any, tiny_llama: Path, count: int) -> None:
    resident = meter(warm, tiny_llama)
    for _ in range(count // len(PROBING)):
        for example in PROBING:
            resident.measure(example)
    for name, parameter in resident._student.parameters.items():
        assert torch.equal(parameter, dict(warm[0].named_parameters())[name])


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_influence_does_not_depend_on_earlier_examples(warm: Any, tiny_llama: Path, estimator: str) -> None:
    together = meter(warm, tiny_llama, estimator=estimator)
    found = [together.measure(example) for example in PROBING]
    again = [together.measure(example) for example in reversed(PROBING)]
    assert found == again[::-1]
    alone = meter(warm, tiny_llama, estimator=estimator).measure(PROBING[-1])
    assert alone == found[-1]


@pytest.mark.slow
def test_first_order_agrees_with_exact_for_small_steps(smollm2: Path) -> None:
    """With SmolLM2, real reference examples and the paper's learning rate for small models."""
    tokenizer = load_tokenizer(str(smollm2))
    tasks = read_tasks(DataSource(path="builtin", limit=14), "reference", with_response=True)
    encoded = [encode_example(tokenizer, task.instruction, task.response, 96) for task in tasks]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    losses = TokenLosses(model)
    for example in encoded[10:]:
        example_loss(losses, make_batch([(0, example)], CPU)).backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = Moments(
        {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()},
        {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()},
        4,
    )
    step, reference = AdamW(1e-5, 0.9, 0.999, 1e-8, 0.0, 5), ReferenceSet(encoded[:5], 1024, CPU)
    exact = InfluenceMeter(ResidentStudent(model, moments, step, CPU), reference)
    oracle = torch.tensor([exact.measure(example).influence_student for example in encoded[5:10]])
    fast = InfluenceMeter(ResidentStudent(model, moments, step, CPU), reference, "first_order")
    estimate = torch.tensor([fast.measure(example).influence_student for example in encoded[5:10]])
    assert torch.equal(oracle.argsort(), estimate.argsort())
    assert float((oracle - estimate).abs().max()) < 0.1 * float(oracle.max() - oracle.min())


@pytest.mark.parametrize("weight", [1 / 8, 1 / 32])
def test_first_order_agrees_with_exact_at_small_weights(warm: Any, tiny_llama: Path, weight: float) -> None:
    exact, fast = (
        [meter(warm, tiny_llama, estimator=estimator, weight=weight).measure(example) for example in PROBING]
        for estimator in ("exact", "first_order")
    )
    oracle, estimate = (torch.tensor([one.influence_null_step for one in found]) for found in (exact, fast))
    assert torch.equal(oracle.argsort(), estimate.argsort())
    assert float((oracle - estimate).abs().max()) < 0.1 * float(oracle.max() - oracle.min())
    heavy = torch.tensor([meter(warm, tiny_llama).measure(example).influence_null_step for example in PROBING])
    assert float((heavy - oracle).abs().min()) > float((estimate - oracle).abs().max())


@pytest.mark.parametrize("weight", [1.0, 1 / 8])
@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_gradient_norm_and_dominated_share_equal_torch(
    warm: Any, tiny_llama: Path, estimator: str, weight: float
) -> None:
    """The norm is that of the unweighted gradient, the share that of the weighted one."""
    resident = meter(warm, tiny_llama, estimator=estimator, weight=weight)
    for example in PROBING[:3]:
        model = copy_of(warm, tiny_llama)
        example_loss(TokenLosses(model), make_batch([(0, example)], CPU)).backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        dominated = sum(
            int((0.001 * (weight * g).square() > 0.999 * warm[1].second[name].double()).sum())
            for name, g in gradients.items()
        )
        count = sum(g.numel() for g in gradients.values())
        found = resident.measure(example)
        assert found.gradient_norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients.values())), rel=1e-6)
        assert found.dominated_share == pytest.approx(dominated / count, abs=2 / count)  # ties may round differently
        assert found.dominated_share > 0


def test_reference_loss_does_not_depend_on_batches(warm: Any, tiny_llama: Path) -> None:
    warm_losses = TokenLosses(warm[0])
    losses = [ReferenceSet(REFERENCE, tokens, CPU).evaluate(warm_losses).summed for tokens in (1, 100, 10_000)]
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=1e-5, atol=1e-4)


def test_unmeasurable_examples_have_status_and_no_effect(warm: Any, tiny_llama: Path) -> None:
    resident = meter(warm, tiny_llama)
    expected = resident.measure(PROBING[0])
    assert resident.measure(Encoded([5, 6, 7], [IGNORED] * 3, True)) == Measurement("no_response_tokens")
    weight = resident._student.parameters["model.embed_tokens.weight"]
    with torch.no_grad():
        weight[1999] = torch.inf
    resident._student._snapshot["model.embed_tokens.weight"][1999] = torch.inf
    broken = resident.measure(Encoded([5, 1999, 7], [IGNORED, 1999, 7], False))
    assert broken.status == "non_finite"
    assert broken.influence_student is broken.gradient_norm is broken.dominated_share is None
    with torch.no_grad():
        weight[1999] = warm[0].get_input_embeddings().weight[1999]
    resident._student._snapshot["model.embed_tokens.weight"][1999] = weight[1999].detach()
    assert resident.measure(PROBING[0]) == expected


def test_gradients_are_freed_after_use(warm: Any, tiny_llama: Path) -> None:
    resident = meter(warm, tiny_llama)
    parameters = list(resident._student.parameters.values())
    alive: list[int] = []

    def count(gradient: torch.Tensor) -> None:
        alive.append(sum(parameter.grad is not None for parameter in parameters))

    hooks = [parameter.register_hook(count) for parameter in parameters]
    resident.measure(PROBING[0])
    for hook in hooks:
        hook.remove()
    assert len(alive) >= len(parameters)
    assert max(alive) <= 1
    assert all(parameter.grad is None for parameter in parameters)


def test_first_order_computes_no_weight_gradient(warm: Any, tiny_llama: Path) -> None:
    """Autograd computes gradients of norms only; those of layers stay factored."""
    resident = meter(warm, tiny_llama, estimator="first_order")
    computed: list[str] = []
    for name, parameter in resident._student.parameters.items():
        parameter.register_hook(lambda gradient, name=name: computed.append(name))  # type: ignore[misc]
    resident.measure(PROBING[0])
    assert sorted(computed) == sorted(name for name in resident._student.parameters if "norm" in name)
    assert all(parameter.grad is None for parameter in resident._student.parameters.values())


@pytest.mark.parametrize("limit", [1 << 26, 7 * 2000], ids=["all logits", "checkpointed logits"])
def test_factored_gradients_equal_autograd(
    warm: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The embedding is tied: the gradients of both of its uses are added, without that of the padding token."""
    monkeypatch.setattr(losses_module, "LOGITS_AT_A_TIME", limit)
    model = copy_of(warm, tiny_llama)
    model.get_input_embeddings().padding_idx = PROBING[0].input_ids[5]
    parameters, losses = dict(model.named_parameters()), TokenLosses(model)
    batch = make_batch([(0, PROBING[0])], CPU)
    example_loss(losses, batch).backward()
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    model.zero_grad()
    with GradientCapture(parameters) as capture:
        example_loss(losses, batch, capture).backward()
    assert sorted(capture.gradients) == sorted(name for name in parameters if "norm" not in name)
    for name, gradient in capture.gradients.items():
        rows = [gradient.rows(n, n + 1, torch.empty(1, expected[name].shape[1])) for n in range(len(expected[name]))]
        torch.testing.assert_close(torch.cat(rows), expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mixed", [False, True])
def test_measurement_does_not_depend_on_batch(warm: Any, tiny_llama: Path, mixed: bool) -> None:
    """Not in the last bit; an example without a finite loss, or without a response, changes no other."""
    model = copy_of(warm, tiny_llama)
    reference = ReferenceSet(REFERENCE, 128, CPU)
    resident = InfluenceMeter(ResidentStudent(model, warm[1], STEP, CPU, mixed), reference, "first_order")
    model.get_input_embeddings().register_forward_hook(
        lambda layer, inputs, output: output.masked_fill((inputs[0] == 1999)[..., None], torch.inf)
    )
    broken = Encoded([5, 1999, 7], [IGNORED, 1999, 7], False)
    silent = Encoded([5, 6, 7], [IGNORED] * 3, True)
    together = resident.measure_batch([*PROBING, broken, silent])
    assert [found.status for found in together] == ["ok"] * len(PROBING) + ["non_finite", "no_response_tokens"]
    pairs = [found for start in range(0, 8, 2) for found in resident.measure_batch(PROBING[start : start + 2])]
    assert together[:8] == pairs == [resident.measure(example) for example in PROBING]


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_state_in_16_bits_keeps_influence(warm: Any, tiny_llama: Path, estimator: Any) -> None:
    """Moments and reference gradient have relative errors of 1/512 at most; most cancel against the null step."""
    found = {}
    for dtype in (None, torch.bfloat16):
        student = ResidentStudent(copy_of(warm, tiny_llama), warm[1], STEP, CPU, state_dtype=dtype)
        meter = InfluenceMeter(student, ReferenceSet(REFERENCE, 128, CPU), estimator)
        assert meter.reference_gradient is None or (
            {part.dtype for part in meter.reference_gradient.full.values()} == {dtype or torch.float32}
        )
        found[dtype] = [meter.measure(example).influence_null_step for example in PROBING]
    exact, rounded = (torch.tensor(values) for values in found.values())
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.01 * exact.std()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_step_agrees_with_project() -> None:
    """The kernel for GPUs, compiled for the CPU."""
    compiled = torch.compile(step_with_counts, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 1000, 1 << 17):
        gradient, first = torch.randn(2, size, generator=generator)
        second = torch.rand(size, generator=generator) / 100
        expected = STEP.project([gradient], first, second, lambda step: step)[0]
        past, past_square, epsilon, length = STEP.scaled(first, second)
        step, norm, dominated = compiled(gradient, past, past_square, epsilon)
        torch.testing.assert_close(step.double() * -length, expected[:-2], rtol=1e-5, atol=1e-12)
        assert norm.item() == pytest.approx(expected[-2].item(), rel=1e-5)
        assert dominated.item() == expected[-1].item()


@pytest.mark.parametrize("estimator", ["first_order", "linear"])
def test_mixed_precision_casts_linear_layers_once(
    warm: Any, tiny_llama: Path, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once no step is taken any more; each pass would cast them to the same bits."""
    found = []
    for cast in (True, False):
        if not cast:
            monkeypatch.setattr("montessori_core.models.linear_layers.parameters_of_linear_layers", lambda model: [])
        model = copy_of(warm, tiny_llama)
        student = ResidentStudent(model, warm[1], replace(STEP, example_weight=1 / 32), CPU, mixed=True)
        reference = ReferenceSet(REFERENCE, 128, CPU)
        meter: Any = (
            LinearMeter(model, lambda student=student: student, reference, mixed=True)
            if estimator == "linear"
            else InfluenceMeter(student, reference, "first_order")
        )
        layer = model.model.layers[0].mlp.up_proj.weight
        assert layer.dtype == (torch.bfloat16 if cast else torch.float32)
        assert model.get_input_embeddings().weight.dtype == torch.float32
        found.append(meter.measure_batch(PROBING))
    assert found[0] == found[1]


def test_linear_keeps_directions_in_16_bits(warm: Any, tiny_llama: Path) -> None:
    exact, rounded = (
        torch.tensor([m.influence_null_step for m in linear_meter(warm, tiny_llama, **options).measure_batch(PROBING)])
        for options in ({}, {"state_dtype": torch.bfloat16})
    )
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.01 * exact.std()


def test_several_reference_sets_are_measured_in_one_pass(warm: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """To the last bit as on each alone, and in any batch."""

    def student() -> ResidentStudent:
        return ResidentStudent(copy_of(warm, tiny_llama), warm[1], STEP, CPU)

    sets = [ReferenceSet(part, 128, CPU) for part in (REFERENCE, REFERENCE[:3], REFERENCE[3:])]
    silent = Encoded([5, 6, 7], [IGNORED] * 3, True)
    meter = TargetsMeter(student(), sets, shared=tmp_path)
    together = meter.measure_batch([*PROBING, silent])
    assert [found.status for found in together[-1]] == ["no_response_tokens"] * 3
    assert together[:8] == [found for example in PROBING for found in meter.measure_batch([example])]
    second_worker = TargetsMeter(student(), sets, shared=tmp_path)
    assert second_worker.measure_batch(PROBING) == together[:8]
    for number, reference in enumerate(sets):
        alone = InfluenceMeter(student(), reference, "first_order")
        assert meter.targets[number].noise_floor == alone.noise_floor
        assert [found[number] for found in together[:8]] == alone.measure_batch(PROBING)


@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_second_worker_reads_reference_state(
    warm: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    expected = [meter(warm, tiny_llama, estimator=estimator).measure(example) for example in PROBING[:2]]
    first = meter(warm, tiny_llama, estimator=estimator, shared=tmp_path / "shared")
    monkeypatch.setattr(ReferenceSet, "backward", None)
    monkeypatch.setattr(ResidentStudent, "perturb", None)
    second = meter(warm, tiny_llama, estimator=estimator, shared=tmp_path / "shared")
    for worker in (first, second):
        assert [worker.measure(example) for example in PROBING[:2]] == expected
    assert (second.noise_floor, second.null_step_influence) == (first.noise_floor, first.null_step_influence)


def test_chunked_logits_change_no_loss_or_gradient(
    warm: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        found = TokenLosses(model)(make_batch(list(enumerate(REFERENCE)), CPU))
        found.mean().backward()
        return found.detach(), [p.grad for p in model.parameters()]

    whole, gradients = loss_and_gradients()
    limit = 7 * AutoConfig.from_pretrained(tiny_llama).vocab_size
    monkeypatch.setattr(losses_module, "LOGITS_AT_A_TIME", limit)
    widest = 0
    cross_entropy = torch.nn.functional.cross_entropy

    def watched(logits: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, logits.numel())
        return cross_entropy(logits, *rest, **options)

    monkeypatch.setattr(losses_module.functional, "cross_entropy", watched)
    split, their_gradients = loss_and_gradients()
    assert 0 < widest <= limit
    torch.testing.assert_close(whole, split)
    for one, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_noise_floor_matches_rounding(warm: Any, tiny_llama: Path) -> None:
    """In fp32 it is slightly above the distance to fp64; in bf16 it is hundreds of times larger."""
    single = meter(warm, tiny_llama)
    found = [single.measure(example).influence_student for example in PROBING]

    def resident(dtype: torch.dtype) -> InfluenceMeter:
        model = copy_of(warm, tiny_llama)
        return InfluenceMeter(ResidentStudent(model.to(dtype), warm[1], STEP, CPU), ReferenceSet(REFERENCE, 128, CPU))

    double = resident(torch.float64)
    distance = [abs(double.measure(e).influence_student - value) for e, value in zip(PROBING, found, strict=True)]
    assert sorted(distance)[len(distance) // 2] < 3 * single.noise_floor
    assert 0 < single.noise_floor < 1e-5
    assert resident(torch.bfloat16).noise_floor > 100 * single.noise_floor


def test_sequential_is_exact_after_full_set(warm: Any, tiny_llama: Path) -> None:
    reference = ReferenceSet(examples(64, seed=4), 512, CPU)

    def measured(error_rate: float | None, baseline: str = "student") -> list[Measurement]:
        nonlocal null_step_influence
        model = copy_of(warm, tiny_llama)
        rule = None if error_rate is None else SequentialReference(reference, 8, error_rate)
        resident = InfluenceMeter(
            ResidentStudent(model, warm[1], STEP, CPU), reference, "exact", "example", rule, baseline
        )
        null_step_influence = resident.null_step_influence
        return [resident.measure(example) for example in PROBING]

    null_step_influence = 0.0
    exact = measured(None)
    for found, whole in zip(measured(1e-300), exact, strict=True):  # no error allowed: every look is inconclusive
        assert found.reference_tokens == whole.reference_tokens == reference.input_tokens
        assert found.influence_student == pytest.approx(whole.influence_student, abs=1e-6)
    for baseline in ("student", "null_step"):
        early = measured(0.05, baseline)
        assert sum(m.reference_tokens for m in early) < sum(m.reference_tokens for m in exact)
        signs = [
            (getattr(one, f"influence_{baseline}") > 0) == (getattr(other, f"influence_{baseline}") > 0)
            for one, other in zip(early, exact, strict=True)
        ]
        assert sum(signs) >= len(signs) - 1
        # As everywhere else, so that a pair's sign is the one that was tested, whichever threshold is applied.
        for one in early:
            assert one.influence_student - one.influence_null_step == pytest.approx(null_step_influence, abs=1e-6)


def test_sequential_sign_errors_stay_within_rate() -> None:
    """A thousand draws of differences whose mean is small compared with their spread, the hardest case."""
    generator = torch.Generator().manual_seed(0)
    rule = SequentialReference(ReferenceSet(examples(256, seed=4), 4096, CPU), 32, 0.1)
    wrong = saved = 0
    for _ in range(1000):
        differences = torch.randn(256, generator=generator, dtype=torch.float64) + 0.1
        for look in rule.looks:
            seen = differences[look.seen]
            if is_decided(seen, 256, rule.look_error_rate):
                break
        wrong += bool((seen.mean() > 0) != (differences.mean() > 0))
        saved += 256 - len(seen)
    assert wrong <= 0.1 * 1000
    assert saved > 0.2 * 256 * 1000


def test_sequential_looks_are_random_and_share_error_rate() -> None:
    reference = ReferenceSet(examples(64, seed=4), 512, CPU)
    rule = SequentialReference(reference, 8, 0.07)
    assert [len(look.seen) for look in rule.looks] == [*range(8, 65, 8)]
    assert rule.looks[0].seen != [*range(8)]  # examples of a file are often sorted, so its beginning is no sample
    assert rule.look_error_rate == 0.07 / 7  # the last look is exact
    assert SequentialReference(reference, 64, 0.07).look_error_rate == 0.07


def test_sequential_decides_at_limit_of_t_test() -> None:
    differences = torch.tensor([-1.0, 2.0, 0.5, -3.0, 1.0, 0.5], dtype=torch.float64)  # their mean is 0
    error = float(stats.sem(differences)) * (1 - 6 / 20) ** 0.5  # of 6 drawn from 20 without replacement
    limit = float(stats.t.ppf(1 - 0.07 / 2, df=5)) * error
    for sign in (1, -1):
        assert is_decided(differences + sign * 1.001 * limit, 20, 0.07)
        assert not is_decided(differences + sign * 0.999 * limit, 20, 0.07)
    assert is_decided(differences, 6, 0.07)  # the full set
    assert not is_decided(differences[:1], 20, 0.07)  # no spread is known


def test_placement_changes_no_bit(warm: Any, tiny_llama: Path) -> None:
    everywhere = dict.fromkeys(ON_DEVICE, "host")
    for estimator in ("exact", "first_order"):
        expected = [meter(warm, tiny_llama, estimator=estimator).measure(e) for e in PROBING[:2]]
        elsewhere = meter(warm, tiny_llama, estimator=estimator, placement=everywhere)
        assert [elsewhere.measure(e) for e in PROBING[:2]] == expected


def test_diverged_student_is_refused(warm: Any, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[REFERENCE[3].input_ids[0]] = torch.inf
    with pytest.raises(DataError, match="not finite on .* reference examples"):
        InfluenceMeter(ResidentStudent(model, warm[1], STEP, CPU), ReferenceSet(REFERENCE, 128, CPU))


def reference_losses(model: Any) -> torch.Tensor:
    """Return [references] mean losses, one example at a time, by the model's loss."""
    found = [
        model(input_ids=torch.tensor([item.input_ids]), labels=torch.tensor([item.labels])).loss for item in REFERENCE
    ]
    return torch.stack(found)


def stepped(warm: Any, tiny_llama: Path, example: Encoded | None) -> Any:
    """Return a fresh student after torch's step on an example (None: with a zero gradient)."""
    model = copy_of(warm, tiny_llama)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    optimizer.load_state_dict(copy.deepcopy(warm[2].state_dict()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if example is not None:
        model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss.backward()
    optimizer.step()
    return model


def test_exact_standard_error_is_over_reference_examples(warm: Any, tiny_llama: Path) -> None:
    null_step, after = (reference_losses(stepped(warm, tiny_llama, example)) for example in (None, PROBING[0]))
    differences = (null_step - after).detach().double()
    found = meter(warm, tiny_llama).measure(PROBING[0])
    assert found.standard_error == pytest.approx(float(differences.std()) / len(REFERENCE) ** 0.5, rel=1e-3)


def test_first_order_standard_error_is_from_halves(warm: Any, tiny_llama: Path) -> None:
    """Compare with the gradients of single reference examples, projected on the step, summed by halves."""
    resident = meter(warm, tiny_llama, estimator="first_order")
    null_step = stepped(warm, tiny_llama, None)
    losses = reference_losses(null_step)
    gradients = [torch.autograd.grad(loss, list(null_step.parameters()), retain_graph=True) for loss in losses]
    first, second = ReferenceSet(REFERENCE, 128, CPU).halves()
    assert sorted(first + second) == list(range(9))
    assert (len(first), len(second)) == (4, 5)
    for example in PROBING:
        ours = resident.measure(example)
        after = stepped(warm, tiny_llama, example).parameters()
        moved = [(p - q).double() for p, q in zip(after, null_step.parameters(), strict=True)]
        says = torch.stack([-sum((g * m).sum() for g, m in zip(of, moved, strict=True)) for of in gradients]).detach()
        assert ours.influence_null_step == pytest.approx(float(says.mean()), rel=1e-3)
        contrast = float(says[first].sum()) * (5 / 4) ** 0.5 - float(says[second].sum()) * (4 / 5) ** 0.5
        error = float(says.std()) / 3
        assert ours.standard_error == pytest.approx(abs(contrast) / 9, abs=0.02 * error)


def test_half_gradient_is_copied_in_bfloat16(warm: Any, tiny_llama: Path) -> None:
    """It must be a copy even if the reference gradient is bf16: the second half is added to the gradient in place."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    student, reference = ResidentStudent(model, warm[1], STEP, CPU), ReferenceSet(REFERENCE, 128, CPU)
    resident = InfluenceMeter(student, reference, "first_order")
    assert resident.reference_gradient is not None
    full, half = resident.reference_gradient.full, resident.reference_gradient.half
    assert not torch.equal(full["model.embed_tokens.weight"], half["model.embed_tokens.weight"])


def test_error_by_halves_is_unbiased() -> None:
    """Over all splits of five numbers, its mean square is the squared standard error of their sum."""
    values = torch.tensor([0.3, -1.0, 2.5, 0.7, 4.0], dtype=torch.float64)
    squares = []
    for first in itertools.combinations(range(5), 2):
        whole, part = float(values.sum()), float(values[list(first)].sum())
        squares.append(error_by_halves(part, whole - part, (2, 3)) ** 2)
    assert sum(squares) / len(squares) == pytest.approx(5 * float(values.var()))
    assert math.isnan(error_by_halves(0.0, 1.0, (0, 1)))


def test_moments_survive_round_trip_and_foreign_ones_fail(warm: Any, tiny_llama: Path, tmp_path: Path) -> None:
    save_moments(warm[1], tmp_path)
    loaded = load_moments(tmp_path)
    assert loaded.step == 6
    assert all(torch.equal(loaded.first[name], tensor) for name, tensor in warm[1].first.items())
    with pytest.raises(DataError, match="not a warmed-up student"):
        load_moments(tiny_llama)
    foreign = Moments({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, 1)
    with pytest.raises(DataError, match=r"AdamW moments belong to another model: \d+ parameters .* \(model\.\S+, "):
        meter((warm[0], foreign, None), tiny_llama)
    marked = Moments(warm[1].first, warm[1].second, 6, weights_checksums(warm[0].named_parameters()))
    save_moments(marked, tmp_path)
    meter((warm[0], load_moments(tmp_path), None), tiny_llama)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with pytest.raises(
        DataError, match=f"{tmp_path}/.*: the AdamW moments fit .* saved with other weights; give the folder"
    ):
        meter((untrained, load_moments(tmp_path), None), tiny_llama)


def linear_meter(warm: Any, tiny_llama: Path, weight: float = 1 / 32, **options: Any) -> LinearMeter:
    model = copy_of(warm, tiny_llama)
    opened = options.pop("opened", lambda: ResidentStudent(model, warm[1], replace(STEP, example_weight=weight), CPU))
    return LinearMeter(model, opened, ReferenceSet(REFERENCE, options.pop("batch_tokens", 128), CPU), **options)


def test_linear_agrees_with_exact_at_small_weights(warm: Any, tiny_llama: Path) -> None:
    """The less an example weighs, the less its step's denominator depends on it."""
    probing = examples(40, seed=5)
    errors = {}
    for weight in (1 / 8, 1 / 128):
        exact = [
            meter(warm, tiny_llama, weight=weight).measure(example).influence_null_step for example in probing[:16]
        ]
        found = linear_meter(warm, tiny_llama, weight).measure_batch(probing[:16])
        oracle, estimate = torch.tensor(exact), torch.tensor([one.influence_null_step for one in found])
        errors[weight] = float((oracle - estimate).abs().max() / (oracle.max() - oracle.min()))
    assert errors[1 / 128] < 0.1
    assert errors[1 / 128] < 0.5 * errors[1 / 8]


def test_linear_influence_depends_on_batch_by_rounding_only(warm: Any, tiny_llama: Path) -> None:
    one_by_one, together = linear_meter(warm, tiny_llama), linear_meter(warm, tiny_llama)
    alone = [one_by_one.measure_batch([example])[0] for example in PROBING]
    for batched, single in zip(together.measure_batch(PROBING), alone, strict=True):
        assert batched.example_loss == pytest.approx(single.example_loss, rel=1e-5)
        assert batched.influence_null_step == pytest.approx(single.influence_null_step, rel=1e-3, abs=1e-8)
        assert batched.standard_error == pytest.approx(single.standard_error, rel=1e-2, abs=1e-7)


def test_linear_influence_does_not_depend_on_padding(warm: Any, tiny_llama: Path) -> None:
    """Padding has the id of a token, here of one that is frequent in the reference set."""
    reference = [Encoded([0, *e.input_ids[1:-1], 0], [*e.labels[:-1], 0], False) for e in REFERENCE]
    model = copy_of(warm, tiny_llama)
    opened = ResidentStudent(model, warm[1], replace(STEP, example_weight=1 / 32), CPU)
    meter = LinearMeter(model, lambda: opened, ReferenceSet(reference, 128, CPU))
    alone = torch.tensor([meter.measure_batch([example])[0].influence_null_step for example in PROBING])
    together = torch.tensor([measured.influence_null_step for measured in meter.measure_batch(PROBING)])
    assert (together - alone).abs().max() < 1e-4 * alone.std()


def test_linear_batches_hold_examples_of_similar_length(warm: Any, tiny_llama: Path) -> None:
    batches = linear_meter(warm, tiny_llama, batch_tokens=64).batches(PROBING)
    assert sorted(index for batch in batches for index in batch) == list(range(len(PROBING)))
    assert max(len(batch) for batch in batches) > 1
    for batch in batches:
        lengths = [len(PROBING[index].input_ids) for index in batch]
        assert max(lengths) * len(batch) <= 64


def test_linear_leaves_student_and_moments_as_they_were(warm: Any, tiny_llama: Path) -> None:
    kept = {name: moment.clone() for name, moment in warm[1].second.items()}
    resident = linear_meter(warm, tiny_llama)
    resident.measure_batch(PROBING)
    assert all(torch.equal(parameter, warm[0].state_dict()[name]) for name, parameter in resident._parameters.items())
    assert all(torch.equal(moment, kept[name]) for name, moment in warm[1].second.items())


def test_linear_token_weight_equals_first_order(warm: Any, tiny_llama: Path) -> None:
    typical = min(example.response_tokens for example in PROBING) / 2
    expected, found, plain = (
        torch.tensor([one.influence_null_step for one in measured])
        for measured in (
            meter(warm, tiny_llama, estimator="first_order", weight=1 / 128, typical_tokens=typical).measure_batch(
                PROBING
            ),
            linear_meter(warm, tiny_llama, 1 / 128, typical_tokens=typical).measure_batch(PROBING),
            linear_meter(warm, tiny_llama, 1 / 128).measure_batch(PROBING),
        )
    )
    error = float((found - expected).abs().max())
    assert error < 0.1 * float(expected.max() - expected.min())
    assert error < 0.1 * float((plain - expected).abs().max())


def test_second_linear_worker_reads_no_moments(warm: Any, tiny_llama: Path, tmp_path: Path) -> None:
    def refuse() -> ResidentStudent:
        raise AssertionError("moments were read again")

    first = linear_meter(warm, tiny_llama, shared=tmp_path)
    second = linear_meter(warm, tiny_llama, shared=tmp_path, opened=refuse)
    assert second.measure_batch(PROBING) == first.measure_batch(PROBING)
    assert second.null_step_influence == first.null_step_influence
    assert second.noise_floor == first.noise_floor


def test_linear_ignores_unmeasurable_examples(warm: Any, tiny_llama: Path) -> None:
    resident = linear_meter(warm, tiny_llama)
    expected = resident.measure_batch(PROBING)
    resident._losses._layers.embed_tokens.register_forward_hook(
        lambda layer, arguments, output: output.masked_fill((arguments[0] == 1999)[..., None], torch.inf)
    )
    broken = Encoded([5, 1999, 7], [IGNORED, IGNORED, 7], False)
    empty = Encoded([5, 6, 7], [IGNORED] * 3, True)
    assert resident.measure_batch([empty, empty]) == [Measurement("no_response_tokens")] * 2
    found = resident.measure_batch([broken, empty, *PROBING])
    assert [one.status for one in found[:2]] == ["non_finite", "no_response_tokens"]
    for one, other in zip(found[2:], expected, strict=True):
        assert one.influence_null_step == pytest.approx(other.influence_null_step, rel=1e-3, abs=1e-8)


SIZES = SMALL | {"vocab_size": 500}


@pytest.mark.parametrize(
    ("config", "separable"),
    [
        (LlamaConfig(**SIZES, tie_word_embeddings=False), True),
        (Gemma3TextConfig(**SIZES), True),
        (GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4, n_positions=128), False),
    ],
    ids=["Llama", "Gemma", "GPT-2, whose positions sum over examples"],
)
def test_linear_equals_first_order_under_large_moments(config: Any, separable: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    moments = Moments(
        {name: torch.randn_like(p) * 1e-3 for name, p in model.named_parameters()},
        {name: (1 + torch.rand_like(p)) * 1e-2 for name, p in model.named_parameters()},
        5,
    )
    step, reference = replace(STEP, example_weight=1 / 32), ReferenceSet(REFERENCE, 128, CPU)
    resident = LinearMeter(model, lambda: ResidentStudent(model, moments, step, CPU), reference)
    together = resident.measure_batch(PROBING[:3])
    assert resident._separable == separable
    fast = InfluenceMeter(ResidentStudent(model, moments, step, CPU), reference, "first_order").measure_batch(
        PROBING[:3]
    )
    for one, other in zip(together, fast, strict=True):
        assert one.influence_null_step == pytest.approx(other.influence_null_step, rel=1e-3)

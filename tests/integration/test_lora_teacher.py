"""LoRA teachers: DPO of an adapter, in the first iteration and the next."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from montessori_core.config import Sampling
from montessori_core.models.adapters import adapted_model
from montessori_core.models.load import load_tokenizer
from montessori_core.synthesis.engine import Request
from montessori_core.synthesis.transformers_engine import TransformersEngine
from support.generation import continuations
from support.preference_pairs import LORA_RECIPE, PAIRS, update
from support.row_programs import logged

WEIGHTS = "adapter_model.safetensors"


def assert_same_adapter(part: Path, expected: Path, start: Path | None = None) -> None:
    """Assert that two updates changed an adapter alike, to a thousandth of the change."""
    weights, before = load_file(part / WEIGHTS), load_file(start / WEIGHTS) if start else {}
    for name, weight in load_file(expected / WEIGHTS).items():
        if not start and "lora_A" in name:
            torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=1e-4)  # it starts from random weights
            continue
        moved = (weight - before.get(name, torch.zeros_like(weight))).abs().max()
        assert moved > 0
        assert (weights[name] - weight).abs().max() <= 1e-3 * moved, name


@pytest.fixture(scope="module")
def adapted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher after a LoRA update."""
    return update(tmp_path_factory.mktemp("first"), tiny_llama)


@pytest.fixture(scope="module")
def continued(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of the next iteration."""
    return update(tmp_path_factory.mktemp("second"), adapted)


def test_update_trains_only_an_adapter(adapted: Path, tiny_llama: Path) -> None:
    assert not (adapted / "model.safetensors").exists()
    assert adapted_model(adapted) == str(tiny_llama.resolve())
    assert logged(adapted, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(adapted, "rewards/margins")[-1] > 0.2


def test_reference_before_training_or_in_each_step(adapted: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """With several epochs the reference reads the pairs once, before training; the first epoch is the same."""
    recipe = LORA_RECIPE.model_copy(update={"epochs": 2})
    assert (recipe.precomputes_reference, LORA_RECIPE.precomputes_reference) == (True, False)
    longer = update(tmp_path, tiny_llama, recipe)
    assert logged(longer, "loss")[:4] == pytest.approx(logged(adapted, "loss"), abs=1e-5)


def test_next_update_starts_from_the_last(continued: Path, adapted: Path, tiny_llama: Path) -> None:
    """The reference is the last adapter: with the unmodified teacher as reference, the first margin would not be zero."""
    assert logged(continued, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(continued, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-4)
    assert logged(continued, "logps/chosen")[0] > logged(adapted, "logps/chosen")[0]
    assert adapted_model(continued) == str(tiny_llama.resolve())
    assert load_file(continued / WEIGHTS).keys() == load_file(adapted / WEIGHTS).keys()
    assert not (continued / "ref").exists()


@pytest.mark.parametrize(
    ("stage", "processes"),
    [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)],
)
@pytest.mark.slow
def test_every_zero_stage_trains_the_same_adapter(
    adapted: Path, continued: Path, tiny_llama: Path, tmp_path: Path, stage: int, processes: int
) -> None:
    first = update(tmp_path / "first", tiny_llama, stage=stage, processes=processes)
    assert_same_adapter(first, adapted)
    second = update(tmp_path / "second", adapted, stage=stage, processes=processes)
    assert_same_adapter(second, continued, start=adapted)


def test_updated_teacher_generates_chosen_outputs(continued: Path, tiny_llama: Path) -> None:
    """By greedy decoding, the share of chosen outputs' first word rises."""
    requests = [Request(pair["prompt"], seed) for seed, pair in enumerate(PAIRS)]
    greedy = Sampling(temperature=0.01, max_tokens=1)

    def named(teacher: Path) -> int:
        engine = TransformersEngine(str(teacher), load_tokenizer(str(teacher)))
        return sum(output.text.startswith("N") for output in continuations(engine.generate(requests, greedy, None)))

    assert named(continued) > named(tiny_llama)

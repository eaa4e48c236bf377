"""Losses of the teacher update equal their formulas, and updates those of TRL without our changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from montessori_core import programs
from montessori_core.config import Lora, Schedule, TeacherUpdate, Zero
from montessori_core.layout import KEPT
from montessori_core.models.adapters import is_adapter
from montessori_core.models.load import load_model, load_tokenizer, with_lora
from montessori_core.program import Row
from montessori_core.training.dpo import encode_pair
from montessori_core.training.padding import PaddedSampler
from support.preference_pairs import PAIRS as MORE_PAIRS
from support.row_programs import logged, run_in_job

PAIRS: list[Row] = [
    {"prompt": "Tasks: ", "chosen": "Name three rivers and a lake.", "rejected": "Stop."},
    {"prompt": "More of the same tasks: ", "chosen": "Count.", "rejected": "Write all the words about water and food."},
]
RATE, BETA, SMOOTHING, SFT = 1e-2, 0.5, 0.2, 0.3
Scores = list[tuple[torch.Tensor, torch.Tensor]]
"""Log-probabilities of the tokens of each pair: of the chosen output, and of the rejected one."""


@torch.no_grad()
def score(model: Any, pairs: list[dict[str, list[int]]]) -> Scores:
    def log_probabilities(prompt: list[int], output: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + output])
        each: torch.Tensor = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return each[-len(output) :]

    return [
        (log_probabilities(p["prompt_ids"], p["chosen_ids"]), log_probabilities(p["prompt_ids"], p["rejected_ids"]))
        for p in pairs
    ]


def margins(policy: Scores, reference: Scores, per_token: bool = False) -> torch.Tensor:
    """Return the difference of the log-ratios of each pair: sums over tokens, or means."""
    reduce: Callable[[torch.Tensor], torch.Tensor] = torch.mean if per_token else torch.sum
    return torch.stack([reduce(c - rc) - reduce(r - rr) for (c, r), (rc, rr) in zip(policy, reference, strict=True)])


def sigmoid(policy: Scores, reference: Scores) -> torch.Tensor:
    """Eq. 4; Rafailov et al., 2023, Eq. 7."""
    return -logsigmoid(BETA * margins(policy, reference)).mean()


def sigmoid_norm(policy: Scores, reference: Scores) -> torch.Tensor:
    """Length-normalized DPO, Lambert et al. (Tulu 3), 2024."""
    return -logsigmoid(BETA * margins(policy, reference, per_token=True)).mean()


def ipo(policy: Scores, reference: Scores) -> torch.Tensor:
    """Azar et al., 2023, Eq. 17, with means over tokens."""
    return (margins(policy, reference, per_token=True) - 1 / (2 * BETA)).square().mean()


def robust(policy: Scores, reference: Scores) -> torch.Tensor:
    """Chowdhury et al., 2024: its mean over pairs reversed with probability `SMOOTHING` is DPO's loss."""
    margin = BETA * margins(policy, reference)
    unbiased = (1 - SMOOTHING) * -logsigmoid(margin) - SMOOTHING * -logsigmoid(-margin)
    return (unbiased / (1 - 2 * SMOOTHING)).mean()


def with_likelihood(policy: Scores, reference: Scores) -> torch.Tensor:
    """Pang et al., 2024, with a mean over all tokens."""
    return sigmoid(policy, reference) - SFT * torch.cat([chosen for chosen, _ in policy]).mean()


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, sigmoid),
        ({"loss": "sigmoid_norm", "lora": Lora(rank=4, alpha=8)}, sigmoid_norm),
        pytest.param({"loss": "ipo"}, ipo, marks=pytest.mark.slow),
        pytest.param({"loss": "robust", "label_smoothing": SMOOTHING}, robust, marks=pytest.mark.slow),
        ({"sft_weight": SFT, "lora": Lora(rank=4, alpha=8)}, with_likelihood),
    ],
    ids=["sigmoid", "sigmoid_norm", "ipo", "robust", "sigmoid and sft"],
)
def test_loss_equals_formula_on_two_pairs(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], formula: Callable[[Scores, Scores], torch.Tensor]
) -> None:
    """Before the first step, when policy and reference are equal, and before the second."""
    recipe = TeacherUpdate(
        learning_rate=RATE,
        epochs=2,
        beta=BETA,
        max_grad_norm=0.0,
        schedule=Schedule(warmup=0.0, stable=1.0, decay=0.0),
        **settings,
    )
    dpo = programs.Dpo(prompt_style="completion", recipe=recipe, zero=Zero(stage=0), seed=0, keep=1)
    part = run_in_job(tmp_path, programs.DPO, dpo, {"teacher": tiny_llama}, PAIRS)
    tokenizer = load_tokenizer(str(tiny_llama))
    pairs = [encode_pair(tokenizer, row, "completion") for row in PAIRS]
    teachers = [tiny_llama, part / KEPT / "step-0000001"]
    reference, updated = (score(load_model(str(teacher), torch.float32), pairs) for teacher in teachers)
    assert margins(updated, reference).abs().min() > 0.1
    expected = [float(formula(reference, reference)), float(formula(updated, reference))]
    assert logged(part, "loss") == pytest.approx(expected, rel=1e-4)


def update_by_trl(recipe: TeacherUpdate, start: Path, folder: Path) -> list[float]:
    """Train with TRL alone: it reads each sequence of a pair in each step, for the teacher and for the reference."""
    losses = {recipe.loss: 1.0} | ({"sft": recipe.sft_weight} if recipe.sft_weight else {})

    class Plain(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> PaddedSampler:
            return PaddedSampler(len(MORE_PAIRS), 0, 0)

    tokenizer = load_tokenizer(str(start))
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        max_length=None,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch_size,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = Plain(
        model=load_model(str(start), torch.float32),
        ref_model=None if is_adapter(start) else load_model(str(start), torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([encode_pair(tokenizer, row, "completion") for row in MORE_PAIRS]),
        processing_class=tokenizer,
    )
    trainer.train()
    adapters = {"selected_adapters": ["default"]} if is_adapter(start) else {}
    trainer.model.save_pretrained(folder, **adapters)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("loss", "adapted"),
    [
        ("sigmoid", False),
        pytest.param("ipo", True, marks=pytest.mark.slow),
        pytest.param("robust", False, marks=pytest.mark.slow),
        pytest.param("sigmoid_norm", True, marks=pytest.mark.slow),
    ],
)
def test_update_equals_plain_trl(tiny_llama: Path, tmp_path: Path, loss: str, adapted: bool) -> None:
    """The likelihood of chosen outputs is added. With an adapter, the reference reads the pairs in each step."""
    start = tiny_llama
    if adapted:
        start = tmp_path / "start"
        torch.manual_seed(0)
        model = with_lora(load_model(str(tiny_llama), torch.float32), Lora(rank=4, alpha=8))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        model.save_pretrained(start)
        load_tokenizer(str(tiny_llama)).save_pretrained(start)
    recipe = TeacherUpdate(
        learning_rate=1e-3,
        batch_size=4,
        beta=BETA,
        loss=loss,
        label_smoothing=SMOOTHING if loss == "robust" else 0.0,
        sft_weight=SFT,
        max_grad_norm=0.0,
        schedule=Schedule(warmup=0.0, stable=1.0, decay=0.0),
        lora=Lora(rank=4, alpha=8) if adapted else None,
    )
    assert recipe.precomputes_reference != adapted
    dpo = programs.Dpo(prompt_style="completion", recipe=recipe, zero=Zero(stage=0), seed=0)
    part = run_in_job(tmp_path / "ours", programs.DPO, dpo, {"teacher": start}, MORE_PAIRS)
    expected = update_by_trl(recipe, start, tmp_path / "theirs")
    losses = logged(part, "loss")
    assert len(losses) == 2
    assert losses == pytest.approx(expected, rel=1e-4)
    weights = "adapter_model.safetensors" if adapted else "model.safetensors"
    before, trained, ours = (load_file(folder / weights) for folder in (start, tmp_path / "theirs", part))
    assert trained.keys() == ours.keys()
    for name, weight in trained.items():
        moved = (weight - before[name]).norm()
        assert moved > 0
        # AdamW's first step has the size of the rate whatever the gradient: rounding turns the sign of the smallest.
        assert (ours[name] - weight).norm() <= 1e-2 * moved, name

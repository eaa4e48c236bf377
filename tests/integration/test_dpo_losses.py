"""Losses of the teacher update equal their formulas, on two pairs of different lengths."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from cluster.fanout import fan_out
from cluster.stage import Stage
from montessori_core import programs
from montessori_core.config import Cluster, Lora, Resources, Schedule, TeacherUpdate, Zero
from montessori_core.layout import KEPT, LOG_FILE
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.program import Row
from montessori_core.training.dpo import encode_pair
from support.row_programs import as_shards

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
        ({"loss": "ipo"}, ipo),
        ({"loss": "robust", "label_smoothing": SMOOTHING}, robust),
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
    stage = Stage.of(programs.DPO, dpo, tmp_path, {"teacher": tiny_llama}, {})
    (part,) = fan_out(stage, as_shards(PAIRS), Resources(cpus_per_process=1), Cluster())
    tokenizer = load_tokenizer(str(tiny_llama))
    pairs = [encode_pair(tokenizer, row, "completion") for row in PAIRS]
    teachers = [tiny_llama, part / KEPT / "step-0000001"]
    reference, updated = (score(load_model(str(teacher), torch.float32), pairs) for teacher in teachers)
    assert margins(updated, reference).abs().min() > 0.1
    expected = [float(formula(reference, reference)), float(formula(updated, reference))]
    logged = [entry["loss"] for entry in json.loads((part / LOG_FILE).read_text())]
    assert logged == pytest.approx(expected, rel=1e-4)

"""Students and teachers with recurrent layers: losses of SFT and DPO are those of single sequences without padding."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from montessori_core import programs
from montessori_core.config import Lora, Schedule, TeacherUpdate, Warmup, Zero
from montessori_core.layout import KEPT
from montessori_core.models.chat import IGNORED, Encoded, encode_example
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.program import Row
from montessori_core.training.dpo import encode_pair
from support.preference_pairs import PAIRS
from support.recurrent import recurrent_model
from support.row_programs import logged, run_in_job

ROWS: list[Row] = [
    {"instruction": f"Describe {number}.", "response": "It is round. " * (number + 1), "response_finished": True}
    for number in range(4)
]
CONSTANT = Schedule(warmup=0.0, stable=1.0, decay=0.0)


@pytest.fixture(params=["qwen3.5", pytest.param("mamba", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(str(tiny_llama))
    recurrent_model(request.param, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def log_probability(model: Path, ids: list[int], labels: list[int]) -> torch.Tensor:
    """Return the log-probability of each labelled token of a sequence."""
    loaded = load_model(str(model), torch.float32)
    logits = loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(labels[1:])
    each: torch.Tensor = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return each[targets != IGNORED]


def mean_loss(model: Path, examples: list[Encoded]) -> float:
    return float(-torch.cat([log_probability(model, e.input_ids, e.labels) for e in examples]).mean())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
@pytest.mark.slow
def test_sft_loss_equals_unpadded_loss(model: Path, lora: Lora | None, tmp_path: Path) -> None:
    """Before the first step; then the loss falls."""
    recipe = Warmup(
        learning_rate=1e-2, batch_size=4, micro_batch_size=4, epochs=3, max_grad_norm=0.0, schedule=CONSTANT
    )
    settings = programs.Sft(
        max_length=128, lora=lora, recipe=recipe.shared(), zero=Zero(stage=0), seed=0, save_moments=False
    )
    part = run_in_job(tmp_path / "stage", programs.SFT, settings, {"student": model}, ROWS)
    tokenizer = load_tokenizer(str(model))
    examples = [encode_example(tokenizer, row["instruction"], row["response"], 128) for row in ROWS]
    losses = logged(part, "loss")
    assert losses[0] == pytest.approx(mean_loss(model, examples), rel=1e-4)
    assert mean_loss(part, examples) < 0.9 * losses[0]


def test_dpo_loss_equals_unpadded_loss(model: Path, tmp_path: Path) -> None:
    """Before the second step; packed pairs would leak the state of one output into the other."""
    recipe = TeacherUpdate(learning_rate=1e-3, batch_size=2, micro_batch_size=2, epochs=2, beta=0.5, max_grad_norm=0.0)
    recipe = recipe.model_copy(update={"schedule": CONSTANT})
    settings = programs.Dpo(prompt_style="completion", recipe=recipe, zero=Zero(stage=0), seed=0, keep=1)
    part = run_in_job(tmp_path / "stage", programs.DPO, settings, {"teacher": model}, PAIRS[:2])
    tokenizer = load_tokenizer(str(model))
    pairs = [encode_pair(tokenizer, row, "completion") for row in PAIRS[:2]]
    (updated,) = [part / KEPT / "step-0000001"]

    def score(teacher: Path, pair: dict[str, list[int]], output: str) -> float:
        ids, ended = pair["prompt_ids"], pair[output]
        return float(log_probability(teacher, ids + ended, [IGNORED] * len(ids) + ended).sum())

    margins = [
        sum(sign * score(t, pair, f"{name}_ids") for t, sign in ((updated, outer), (model, -outer)))
        for pair in pairs
        for name, outer in (("chosen", 1.0), ("rejected", -1.0))
    ]
    margin = torch.tensor([sum(margins[:2]), sum(margins[2:])])
    losses = logged(part, "loss")
    assert losses == pytest.approx([0.6931472, float(-logsigmoid(0.5 * margin).mean())], rel=1e-3)

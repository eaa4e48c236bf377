"""Validation of influence: subsets, scores, rivals, and trainings that equal the influence step."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from montessori_core import programs
from montessori_core.config import Influence, Optimization, Schedule, Warmup
from montessori_core.data.bm25 import bm25
from montessori_core.data.sources import Task, write_tasks
from montessori_core.data.tables import INFLUENCE, RETRAINING, UTILITY, read_table
from montessori_core.errors import DataError
from montessori_core.influence.jobs import open_influence
from montessori_core.influence.retraining import open_retraining
from montessori_core.influence.signals import open_gradient_cosine
from montessori_core.influence.validation import (
    cut_into_batches,
    left_out_groups,
    predict,
    random_subsets,
    rank_correlation,
    score_predictors,
    shuffled,
    tenths,
)
from montessori_core.models.load import load_model
from montessori_core.program import Row
from montessori_core.training.moments import Moments, save_moments, weights_checksums
from montessori_report.validation_page import validation_page
from support.reports import Page
from support.row_programs import as_compute

TASKS = [Task(f"t{n}", f"Name {n} of the things.", "thing " * (2 + n % 4) + str(n)) for n in range(12)]
REFERENCE = [Task(f"r{n}", f"Say {n}.", f"I say {n} " * (1 + n % 3)) for n in range(8)]
RATE = 1e-3


def test_rank_correlation_of_known_data() -> None:
    first, second = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    assert rank_correlation(first, second) == pytest.approx(0.8)  # 1 - 6 (1 + 1 + 1 + 1) / (5 * 24)
    assert rank_correlation(first, -second) == pytest.approx(-0.8)
    assert rank_correlation(first, np.exp(first)) == pytest.approx(1.0)
    assert math.isnan(rank_correlation(first, np.ones(5)))
    draws = np.random.default_rng(1).integers(4, size=(2, 30, 9)).astype(float)  # with ties
    expected = [spearmanr(*pair).statistic for pair in zip(*draws, strict=True)]
    assert rank_correlation(*draws) == pytest.approx(expected)


def test_scores_are_paired_and_repeatable() -> None:
    """The numbers were computed with scipy's spearmanr, one resample at a time."""
    draw = np.random.default_rng(0)
    outcomes = draw.normal(size=24)
    predictions = {"good": outcomes + 0.5 * draw.normal(size=24), "bad": draw.normal(size=24), "none": np.ones(24)}
    good, bad, none = scores = score_predictors(predictions, outcomes)
    assert str(score_predictors(predictions, outcomes)) == str(scores)
    assert good.score == pytest.approx(0.8470, abs=1e-4)
    assert (good.low, good.high) == pytest.approx((0.6528, 0.9340), abs=1e-4)
    assert good.difference == good.difference_low == good.difference_high == 0.0
    assert bad.low < bad.score < bad.high < good.score
    assert bad.difference == bad.score - good.score
    assert (bad.difference_low, bad.difference_high) == pytest.approx((-1.3357, -0.3385), abs=1e-4)
    assert math.isnan(none.score)
    assert math.isnan(none.low)


def test_bm25_of_known_texts() -> None:
    """Lengths 3, 2, 2. Weights: cat ln(1 + 2.5 / 1.5), the ln(1 + 1.5 / 2.5), bird as cat."""
    documents = ["The cat sat", "the dog", "A bird!"]
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    long, short = (2.2 / (1 + 1.2 * (0.25 + 0.75 * length * 3 / 7)) for length in (3, 2))
    assert bm25(documents, ["cat, the"]) == pytest.approx([(rare + common) * long, common * short, 0.0])
    assert bm25(documents, ["cat, the"])[:2] == pytest.approx([1.299, 0.4992], abs=1e-4)
    assert bm25(documents, ["the the", "bird"]) == pytest.approx([common * long, common * short, rare * short / 2])
    assert bm25(["", "!"], ["cat"]).tolist() == [0.0, 0.0]


def test_subsets_depend_on_seed_and_members() -> None:
    positions = [3, 5, 8, 9, 11, 20]
    subsets = random_subsets(positions, 30, 4, seed=0)
    assert all(len(set(subset)) == 4 and set(subset) <= set(positions) for subset in subsets)
    assert random_subsets(positions, 10, 4, seed=0) == subsets[:10]
    assert random_subsets(positions, 30, 4, seed=1) != subsets
    assert shuffled([9, 3, 5], 0) == shuffled([3, 5, 9], 0)
    groups = left_out_groups(positions, 4, seed=0)
    assert sorted(map(len, groups)) == [1, 1, 2, 2]
    assert sorted(position for group in groups for position in group) == positions


def test_left_out_examples_keep_other_batches() -> None:
    assert cut_into_batches([4, 1, 3, 0, 2], 2) == [[4, 1], [3, 0], [2]]
    assert cut_into_batches([4, 1, 3, 0, 2], 2, left_out=[1, 2]) == [[4], [3, 0]]


def test_tenths_are_ranked_by_value() -> None:
    values = np.arange(40.0)
    values[25] = 1000.0
    parts = tenths([position for position in range(40) if position != 39], values)
    assert parts == {"top": [25, 38, 37], "middle": [20, 19, 18], "bottom": [2, 1, 0]}
    assert predict(values, parts.values()).tolist() == [1075.0, 57.0, 3.0]  # type: ignore[arg-type]
    assert tenths([0, 1, 2], np.zeros(3)) == {"top": [0], "middle": [1], "bottom": [2]}


def files(folder: Path) -> dict[str, Path]:
    write_tasks(TASKS, folder / "examples.jsonl")
    write_tasks(REFERENCE, folder / "reference.jsonl")
    return {name: folder / f"{name}.jsonl" for name in ("examples", "reference")}


def row_of(task: Task) -> Row:
    return {**task.to_training_row(), "example_id": task.example_id, "prompt_id": task.example_id}


def warm_state(model: Path, folder: Path) -> Path:
    """Write random moments of a model after three steps."""
    torch.manual_seed(0)
    weights = dict(load_model(str(model), torch.float32).named_parameters())
    first = {name: 1e-3 * torch.randn_like(weight) for name, weight in weights.items()}
    second = {name: 1e-4 * torch.rand_like(weight) for name, weight in weights.items()}
    save_moments(Moments(first, second, 3, weights_checksums(weights.items())), folder)
    return folder


def retrain(inputs: dict[str, Path], folder: Path, rows: list[Row], **options: float) -> list[Row]:
    recipe = Optimization(
        learning_rate=RATE, batch_size=2, schedule=Schedule(warmup=0.0, stable=1.0, decay=0.0), **options
    )
    settings = programs.Retraining(
        max_length=128, batch_tokens=256, reference_reduction="example", recipe=recipe, mixed=False
    )
    as_compute(open_retraining(settings, inputs))(rows, folder / "trainings.parquet", lambda done: None)
    return list(read_table(folder / "trainings.parquet", RETRAINING).to_pylist())


def test_training_on_one_example_is_exact_influence(tiny_llama: Path, tmp_path: Path) -> None:
    """One step on one example, without clipping, is Eq. 1 at weight 1."""
    inputs = {"student": tiny_llama, "moments": warm_state(tiny_llama, tmp_path), **files(tmp_path)}
    influence = Influence(learning_rate=RATE, example_weight=1.0)
    settings = programs.measurement_settings(influence, Warmup(), 128, "exact", "student")
    settings = settings.model_copy(update={"reference_batch_tokens": 256})
    as_compute(open_influence(settings, inputs))(
        [row_of(task) for task in TASKS[:3]], tmp_path / "influence.parquet", lambda done: None
    )
    measured = read_table(tmp_path / "influence.parquet", INFLUENCE)["influence_student"].to_pylist()
    rows: list[Row] = [{"training_id": "none", "batches": []}]
    rows += [{"training_id": str(n), "batches": [[n]]} for n in range(3)]
    untrained, *trained = retrain(inputs, tmp_path, rows, max_grad_norm=0.0)
    falls = [untrained["reference_loss"] - training["reference_loss"] for training in trained]
    assert falls == pytest.approx(measured, rel=1e-3, abs=1e-6)
    assert [training["example_ids"] for training in trained] == [["t0"], ["t1"], ["t2"]]
    assert untrained["steps"] == 0


def test_trainings_do_not_depend_on_earlier_ones(tiny_llama: Path, tmp_path: Path) -> None:
    inputs = {"student": tiny_llama, **files(tmp_path)}
    rows: list[Row] = [
        {"training_id": "first", "batches": [[0, 1], [2, 3]]},
        {"training_id": "other", "batches": [[4, 5], [6, 7]]},
        {"training_id": "again", "batches": [[0, 1], [2, 3]]},
    ]
    first, other, again = retrain(inputs, tmp_path, rows, epochs=2)
    assert first["reference_loss"] == again["reference_loss"] != other["reference_loss"]
    assert first["steps"] == 4
    assert first["example_ids"] == ["t0", "t1", "t2", "t3"]
    assert retrain(inputs, tmp_path, rows[1:2], epochs=2) == [other]


def test_diverged_training_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    inputs = {"student": tiny_llama, **files(tmp_path)}
    with pytest.raises(
        DataError, match="the training x on a subset of the examples diverged .*; lower --learning-rate"
    ):
        retrain(inputs, tmp_path, [{"training_id": "x", "batches": [[0], [1]]}], weight_decay=1e38)


def test_gradient_cosine_of_the_reference_itself_is_one(tiny_llama: Path, tmp_path: Path) -> None:
    write_tasks(TASKS[:1], tmp_path / "one.jsonl")
    settings = programs.ReferenceSignal(max_length=64, batch_tokens=256, reference_reduction="example")
    program = open_gradient_cosine(settings, {"student": tiny_llama, "reference": tmp_path / "one.jsonl"})
    rows = [row_of(TASKS[0]), row_of(TASKS[5]), row_of(Task("long", "word " * 200, "cut off"))]
    as_compute(program)(rows, tmp_path / "part.parquet", lambda done: None)
    same, other, long = read_table(tmp_path / "part.parquet", UTILITY)["utility"].to_pylist()
    assert same == pytest.approx(1.0, abs=1e-6)
    assert -1.0 < other < 0.99
    assert long is None


def test_validation_page_shows_scores(tmp_path: Path) -> None:
    """A predictor without a score, such as BM25 if no word is shared, has no dot."""
    score = {"predictor": "exact", "score": 0.91, "low": 0.8, "high": 0.95, "difference": 0.0}
    part = {
        "size": 4,
        "scores": [score, {**score, "predictor": "BM25", "score": None, "low": None, "high": None}],
        "predicted": {"exact": [0.1, 0.3, 0.2], "BM25": [0.0, 0.0, 0.0]},
        "measured": [0.01, 0.03, 0.02],
    }
    falls = [{"predictor": name, "top": 0.03, "middle": 0.02, "bottom": 0.01} for name in ("exact", "BM25")]
    result = {
        "examples": 16,
        "reference_examples": 8,
        "student_loss": 2.5,
        "settings": {"student": "<b>student</b>", "batch_size": 8, "learning_rate": 5e-6},
        "random_subsets": part,
        "left_out": part,
        "tenths": {"size": 1, "falls": falls},
    }
    rendered = validation_page(json.loads(json.dumps(result)))
    page = Page(rendered.html)
    assert "<b>student</b>" in page.text
    assert len(page.plots) == len(rendered.data) == page.count("figure") == 5
    assert "exact,0.91,0.8,0.95" in rendered.data["subsets-linear-datamodeling-score"]
    assert "BM25" not in rendered.data["subsets-linear-datamodeling-score"]
    assert "exact,2.0,0.2,0.02" in rendered.data["subsets-predicted-and-measured"]

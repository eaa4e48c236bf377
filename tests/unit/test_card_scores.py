"""Scores of `montessori evaluate` in the card of a trained model."""

import dataclasses
import logging
import resource
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from montessori_core.export.card_scores import Evaluated, add_scores, card_with_scores
from montessori_core.export.hub_models import HubModel
from montessori_core.export.model_card import model_header

SCORES = [
    {"benchmark": "arc_challenge", "metric": "acc_norm", "mean": 0.25, "standard_error": 0.0125, "examples": 1172},
    {"benchmark": "alpaca_eval", "metric": "win_rate", "mean": None, "standard_error": None, "examples": 0},
]
EVALUATED = Evaluated("trial", "good.jsonl", "2026-11-28", 96, {"mean": 1.5, "standard_error": 0.03125}, SCORES)
BASE = HubModel("group/base", "1" * 40)
CARD = model_header(BASE, "mit", ["sft"]) + "\n# Base, trained\n\nWords: *kept*.\n"


def write_card(folder: Path, card: str = CARD) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(card)
    return folder / "README.md"


def test_card_shows_loss_and_scores(tmp_path: Path) -> None:
    path = write_card(tmp_path / "student")
    add_scores(EVALUATED, path.parent)
    text = path.read_text()
    assert CARD.partition("---\n\n")[2] in text
    assert "By `montessori evaluate` on 2026-11-28; held-out loss on good.jsonl" in text
    assert "| held-out loss, nats per token | 1.5000 | 0.0312 | 96 |" in text
    assert "| arc\\_challenge, acc\\_norm | 0.2500 | 0.0125 | 1172 |" in text
    assert "win" not in text
    add_scores(EVALUATED, path.parent)
    assert path.read_text() == text
    card = ModelCard.load(path)
    assert card.data.tags == ["montessori", "sft"]
    assert card.data.base_model == "group/base"
    assert card.data.model_name == "student"
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert results == [("good.jsonl", "loss", 1.5), ("arc_challenge", "acc_norm", 0.25)]


@pytest.mark.parametrize("error", [None, float("nan")])
def test_error_of_one_example_is_left_out(error: float | None) -> None:
    card = card_with_scores(
        CARD, "model", dataclasses.replace(EVALUATED, loss={"mean": 1.5, "standard_error": error}, scores=[])
    )
    assert card is not None
    assert "| held-out loss, nats per token | 1.5000 |  | 96 |" in card


def test_later_evaluation_replaces_its_section_alone(tmp_path: Path) -> None:
    path = write_card(tmp_path)
    other = dataclasses.replace(EVALUATED, name="trial.2", data="other.jsonl", scores=[])
    for evaluated in (EVALUATED, other):
        add_scores(evaluated, tmp_path)
    path.write_text(path.read_text() + "\nA note of the user.\n")
    add_scores(dataclasses.replace(EVALUATED, loss={"mean": 1.25, "standard_error": None}), tmp_path)
    text = path.read_text()
    assert text.count("## Evaluation trial\n") == text.count("## Evaluation trial.2\n") == 1
    assert text.index("Evaluation trial\n") < text.index("Evaluation trial.2\n") < text.index("A note of the user.")
    assert "| 1.2500 |  | 96 |" in text
    results = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    values = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in results}
    assert values == {"good.jsonl": 1.25, "other.jsonl": 1.5, "arc_challenge": 0.25}


def test_names_in_scores_are_escaped() -> None:
    evaluated = dataclasses.replace(
        EVALUATED, data="<img src=x>: |\n---\n# No", scores=[SCORES[0] | {"benchmark": "<b>|x"}]
    )
    card = card_with_scores(CARD, "---\nmodel", evaluated)
    assert card is not None
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header)["model-index"][0]["results"][0]["dataset"]["name"] == evaluated.data
    assert "<img" not in body
    assert "<b>" not in body
    assert card_with_scores(card, "---\nmodel", evaluated) == card


@pytest.mark.parametrize(
    "card",
    [
        "# A model of somebody else\n",
        "---\ntags: [peft]\n---\n# An adapter\n",
        "---\ntags: montessori\n---\n",
        "---\n- montessori\n---\n",
        "---\ntags: [montessori]\nmodel-index: [\n{name: x}\n]\n---\n",
        CARD.replace("\n", "\r\n"),
    ],
)
def test_cards_of_others_stay_unchanged(card: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "README.md"
    path.write_bytes(card.encode())
    add_scores(EVALUATED, tmp_path)
    assert path.read_bytes() == card.encode()
    assert "no card of Montessori" in caplog.text


def test_unreadable_card_is_a_line_in_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "README.md").write_bytes(b"---\ntags: [montessori]\n---\n\xff")
    for folder in (tmp_path, tmp_path / "absent"):
        add_scores(EVALUATED, folder)
    assert "scores are not added" in caplog.text
    assert "has no card" in caplog.text


def test_diverged_model_has_a_loss_of_nan() -> None:
    """It replaces the loss of an earlier evaluation in the header, too; one on a data set of the same name stays."""
    evaluated = dataclasses.replace(EVALUATED, loss={"mean": float("nan"), "standard_error": None})
    other = dataclasses.replace(EVALUATED, name="other", scores=[])
    with_others = card_with_scores(card_with_scores(CARD, "student", EVALUATED) or "", "student", other)
    card = card_with_scores(with_others or "", "student", evaluated)
    assert card is not None
    assert "| held-out loss, nats per token | nan |  | 96 |" in card
    assert [
        (result["dataset"]["name"], result["dataset"]["config"])
        for result in yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    ] == [("good.jsonl", "other"), ("arc_challenge", "trial")]


def test_linked_card_of_a_cache_stays(tmp_path: Path) -> None:
    path = write_card(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "README.md").symlink_to(path)
    add_scores(EVALUATED, tmp_path / "snapshot")
    assert (tmp_path / "snapshot" / "README.md").is_symlink()
    assert path.read_text() == CARD


def test_full_disk_keeps_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = write_card(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        add_scores(EVALUATED, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == CARD
    assert list(tmp_path.iterdir()) == [path]
    assert "scores are not added" in caplog.text

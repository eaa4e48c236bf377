"""The classifier of the target kind of task, and how accurate it is on the built-in targets."""

import math
from pathlib import Path

import pytest

from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks, write_tasks
from montessori_core.evaluation.kinds import (
    KindShare,
    choose_classifier,
    features_of,
    read_classifier,
    train_classifier,
)
from montessori_core.evaluation.statistics import share_interval, share_interval_of_seeds


def instructions_of(path: str, field: str, limit: int | None = None) -> list[str]:
    tasks = read_tasks(DataSource(path=path, limit=limit), field, with_response=field != "seed_pool")
    return [task.instruction for task in tasks]


def test_features_are_distinct_words_and_pairs() -> None:
    assert features_of("Add 3.5 and 1,000 and 7!") == [
        *("add", "0", "and", "!"),
        *("^ add", "add 0", "0 and", "and 0", "0 !"),
        "numbers: 3",
    ]
    assert features_of("") == ["numbers: 0"]


def test_weights_are_smoothed_log_odds() -> None:
    """Four tasks of the target kind against two others, whose counts are doubled; 0.3 is added to each count."""
    classifier = train_classifier(["add"] * 4, ["sing"] * 2)
    assert classifier.weights == pytest.approx(
        {
            "add": math.log(4.3 / 0.3),
            "^ add": math.log(4.3 / 0.3),
            "numbers: 0": 0.0,
            "sing": math.log(0.3 / 4.3),
            "^ sing": math.log(0.3 / 4.3),
        }
    )
    assert classifier.is_target("Add")
    assert not classifier.is_target("Sing")
    assert not classifier.is_target("Whistle")


def test_seeds_of_target_kind_are_not_learned() -> None:
    sums = [f"How many are {number} apples and {number + 2} pears?" for number in range(16)]
    songs = [f"Write a song about {thing} for the choir." for thing in ("rain", "snow", "wind", "fog", "hail", "dew")]
    classifier = train_classifier(sums, [*songs * 4, *(text.replace("pears", "plums") for text in sums[:6])])
    assert classifier.is_target("How many are 4 apples and 5 plums?")
    assert classifier.recall == 1
    assert classifier.false_positives == pytest.approx(6 / 30)


@pytest.mark.parametrize(
    ("kind", "balanced_accuracy", "recall_of_held_out"),
    [("maths", 0.85, 0.92), ("coding", 0.84, 0.75), ("facts", 0.78, 0.66)],
)
def test_classifier_recognises_builtin_target(kind: str, balanced_accuracy: float, recall_of_held_out: float) -> None:
    """The accuracies are those of docs/report.md."""
    seeds = instructions_of("builtin", "seed_pool")
    classifier = train_classifier(instructions_of(f"builtin/{kind}", "reference"), seeds)
    assert classifier.usable
    assert classifier.balanced_accuracy == pytest.approx(balanced_accuracy, abs=0.02)
    held_out = classifier.share(instructions_of(f"builtin/{kind}", "evaluation"))
    assert held_out.value == pytest.approx(recall_of_held_out, abs=0.03)


@pytest.mark.parametrize("limit", [None, 24])
def test_reference_of_seed_kinds_gives_no_share(limit: int | None) -> None:
    classifier = train_classifier(
        instructions_of("builtin", "reference", limit), instructions_of("builtin", "seed_pool")
    )
    assert not classifier.usable
    assert "cannot tell the reference set's tasks from the seed pool's" in classifier.objection


@pytest.mark.parametrize("kind", ["coding", "maths"])
def test_half_target_seed_pool_is_replaced(kind: str) -> None:
    """The quickstart's sets: half of the seeds are of the reference set's kind."""
    reference = instructions_of(f"builtin/{kind}", "reference", 24)
    seeds = instructions_of(f"builtin/half-{kind}", "seed_pool")
    classifier = choose_classifier(reference, seeds)
    assert classifier.usable
    assert classifier.others == "the built-in tasks of all kinds"
    assert 0.2 < (classifier.share(seeds).value or 0) < 0.5
    held_out = classifier.share(instructions_of(f"builtin/{kind}", "evaluation")).value
    other = "maths" if kind == "coding" else "coding"
    of_other_kind = classifier.share(instructions_of(f"builtin/{other}", "evaluation")).value
    assert held_out is not None
    assert of_other_kind is not None
    assert held_out > 0.6 > 0.1 > of_other_kind


def test_language_of_the_seeds_is_no_kind() -> None:
    """Against the built-in tasks, which are English, every German text would be of the target kind."""
    sums = [f"Wie viele sind {number} Äpfel und {number + 2} Birnen?" for number in range(24)]
    classifier = choose_classifier(sums[:12], sums[12:])
    assert not classifier.usable
    assert classifier.others == "the seeds"


def test_classifier_of_a_run_reads_its_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_classifier(tmp_path) is None
    (tmp_path / "sources").mkdir()
    for name, path in (("reference", "builtin/maths"), ("seed_pool", "builtin")):
        tasks = read_tasks(DataSource(path=path), name, with_response=name == "reference")
        write_tasks(tasks, tmp_path / "sources" / f"{name}.jsonl")
    caplog.clear()
    caplog.set_level("INFO")
    classifier = read_classifier(tmp_path)
    assert not caplog.messages  # the built-in tasks that it learns from would look like the run's seed pool
    assert classifier is not None
    assert classifier.is_target("Ben has 12 pens. He gives 5 of them away. How many pens does he have left?")
    assert not classifier.is_target("Write a poem about the sea.")


def test_interval_of_seeds_includes_their_spread() -> None:
    """Ten seeds of 24 instructions: Student's t over the shares of the seeds, not Wilson's of 240 instructions."""
    counts = [(part, 24) for part in (11, 18, 6, 12, 11, 12, 19, 10, 14, 17)]
    assert share_interval_of_seeds(counts) == pytest.approx((0.422, 0.662), abs=1e-3)
    assert share_interval_of_seeds(counts[:1]) == share_interval(11, 24)
    assert share_interval_of_seeds([(12, 24), (12, 24), (0, 0)]) == share_interval(24, 48)  # no spread at all
    assert share_interval_of_seeds([(1, 24), (23, 24)]) == share_interval_of_seeds([(0, 0)]) == (0.0, 1.0)


def test_interval_is_wilsons() -> None:
    assert KindShare(21, 100).value == 0.21
    assert KindShare(21, 100).interval == pytest.approx((0.1417, 0.2998), abs=1e-4)
    assert KindShare(0, 0).value is None

"""The share of a teacher's instructions that are of the target kind: the kind of the reference set's tasks.

A naive Bayes classifier on words tells the reference set's tasks from the seed pool's, which the teacher is shown. The
seed pool may have tasks of the target kind, too. Seeds that a classifier that has not seen them takes for the target kind
are left out of the other kinds (one pass of self-training). If half of the seeds are of the kind, that is not enough,
and the built-in seed pool, which has all kinds, stands for the others. The length of a text is no feature, because a
teacher update can change the length alone.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from montessori_core import layout
from montessori_core.config import DataSource
from montessori_core.data.sources import TaskReader, load_tasks
from montessori_core.data.tables import EXAMPLES, read_table
from montessori_core.evaluation.statistics import share_interval

LEAST_ACCURACY = 0.75
"""Balanced accuracy below which no share is shown."""
_MOST_WANTED_SEEDS = 0.75
"""Share above which a classifier against the built-in seed pool knows only the seeds' language or subject."""
_LEAST_LOG_ODDS = math.log(9)
"""A probability of 0.9: noise has little evidence either way, and does not count as target."""
_SMOOTHING = 0.3  # added to each count
_FOLDS = 8
_MOST_TASKS = 2000  # of each set: more change little, and a seed pool may have 52,000
_MOST_NUMBERS = 3
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s]")

Reals = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class KindClassifier:
    """Decides whether a text is a task of the target kind.

    Attributes:
        weights: log odds of the target kind by feature; other features have 0.
        recall: share of the reference tasks that are recognised, cross-validated.
        false_positives: share of the other tasks that are taken for the target kind, cross-validated. Those that are of
            it count, so a seed pool with many of them makes the classifier look worse than it is.
        others: what the other tasks are, in words.
    """

    weights: dict[str, float]
    recall: float
    false_positives: float
    others: str = "the seeds"

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the accuracies on reference tasks and other tasks; 0.5 is chance."""
        return (self.recall + 1 - self.false_positives) / 2

    @property
    def usable(self) -> bool:
        """Whether the classifier is accurate enough to show what it says."""
        return self.balanced_accuracy >= LEAST_ACCURACY

    @property
    def objection(self) -> str:
        """The reason why no share is shown, if the classifier is not usable."""
        return (
            f"a classifier of words cannot tell the reference set's tasks from the seed pool's (balanced accuracy "
            f"{self.balanced_accuracy:.2f}, at least {LEAST_ACCURACY} is needed): the reference set has several kinds of "
            "task, those of the seed pool, or too few examples"
        )

    def is_target(self, text: str) -> bool:
        """Return whether a text is of the target kind with a probability of at least 0.9, from even odds."""
        return sum(self.weights.get(feature, 0.0) for feature in features_of(text)) >= _LEAST_LOG_ODDS

    def share(self, texts: Sequence[str]) -> "KindShare":
        """Return the share of texts that are of the target kind."""
        return KindShare(sum(map(self.is_target, texts)), len(texts))


@dataclass(frozen=True)
class KindShare:
    """A number of texts of the target kind among `total`."""

    target: int
    total: int

    @property
    def value(self) -> float | None:
        """The share; None without texts."""
        return self.target / self.total if self.total else None

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share (Wilson); it does not include errors of the classifier."""
        return share_interval(self.target, self.total) if self.total else (0.0, 1.0)


def features_of(text: str) -> list[str]:
    """Return the distinct features of a text: words, pairs of neighbours, the first word, how many numbers it has.

    All numbers are the word '0'. Punctuation marks are words.
    """
    words = ["0" if token[0].isdigit() else token.lower() for token in _TOKEN.findall(text)]
    pairs = [f"{first} {second}" for first, second in zip(["^", *words], words, strict=False)]
    return list(dict.fromkeys([*words, *pairs, f"numbers: {min(words.count('0'), _MOST_NUMBERS)}"]))


def train_classifier(target: Sequence[str], other: Sequence[str]) -> KindClassifier:
    """Train a classifier and measure its accuracy by cross-validation in eight folds.

    Args:
        target: tasks of the target kind, at least one.
        other: tasks of all kinds, at least one.
    """
    target, other = target[:_MOST_TASKS], other[:_MOST_TASKS]
    tasks = _Tasks([*target, *other], len(target))
    everything = np.ones(len(tasks.target), dtype=np.bool_)
    called = _cross_validate(tasks, everything, _self_train) >= _LEAST_LOG_ODDS
    weights = _self_train(tasks, everything)
    return KindClassifier(
        weights=dict(zip(tasks.vocabulary, weights.tolist(), strict=True)),
        recall=float(called[tasks.target].mean()),
        false_positives=float(called[~tasks.target].mean()),
    )


def read_classifier(run: Path) -> KindClassifier | None:
    """Train a classifier on the sets that a run keeps; None if they are not in its folder.

    Raises:
        DataError: a set cannot be read.
    """
    paths = [run / layout.SOURCES / f"{name}.jsonl" for name in ("reference", "seed_pool")]
    if not all(path.exists() for path in paths):
        return None
    return choose_classifier(*([task.request for task in load_tasks(path)] for path in paths))


def choose_classifier(reference: Sequence[str], seeds: Sequence[str]) -> KindClassifier:
    """Return the more accurate of two classifiers: against the seeds, and against the built-in seed pool.

    Args:
        reference: tasks of the target kind.
        seeds: the seed pool's tasks.
    """
    against_seeds = train_classifier(reference, seeds)
    builtin = [task.instruction for task in TaskReader(DataSource(path="builtin"), "seed_pool", with_response=False)]
    against_builtin = replace(train_classifier(reference, builtin), others="the built-in tasks of all kinds")
    knows_kind = (against_builtin.share(seeds).value or 0.0) <= _MOST_WANTED_SEEDS
    candidates = [against_seeds, against_builtin] if knows_kind else [against_seeds]
    return max(candidates, key=attrgetter("balanced_accuracy"))


def read_instructions(examples: Path) -> list[str]:
    """Return the instructions of an example table.

    Raises:
        DataError: the table cannot be read.
    """
    instructions: list[str] = read_table(examples, EXAMPLES, ["instruction"])["instruction"].to_pylist()
    return instructions


class _Tasks:
    """Tasks as pairs of a task's index and a feature's index; the first `target` tasks are of the target kind."""

    def __init__(self, texts: Sequence[str], target: int) -> None:
        self.vocabulary: dict[str, int] = {}
        features = [
            [self.vocabulary.setdefault(feature, len(self.vocabulary)) for feature in features_of(text)]
            for text in texts
        ]
        self.target: Mask = np.arange(len(texts)) < target
        self._task = np.repeat(np.arange(len(texts)), [len(indices) for indices in features])
        self._feature = np.array([index for indices in features for index in indices], dtype=np.intp)

    def counts(self, mask: Mask) -> Reals:
        """Return how many of the tasks in `mask` have each feature: [features]."""
        return np.bincount(self._feature, mask[self._task].astype(np.float64), len(self.vocabulary)).astype(np.float64)

    def log_odds(self, weights: Reals) -> Reals:
        """Return the sum of the weights of each task's features: [tasks]."""
        return np.bincount(self._task, weights[self._feature], len(self.target)).astype(np.float64)


def _train(tasks: _Tasks, used: Mask) -> Reals:
    """Return [features] weights of multinomial naive Bayes with equal priors; features that no used task has get 0.

    The counts of the other kinds are scaled to the number of tasks of the target kind. Otherwise the smoothing favours the
    larger set: a classifier of 24 reference tasks and 240 seeds hardly finds any task of the target kind.
    """
    of_target, of_other = used & tasks.target, used & ~tasks.target
    target = tasks.counts(of_target)
    other = tasks.counts(of_other) * (max(1, of_target.sum()) / max(1, of_other.sum()))
    seen = target + other > 0
    smoothing = _SMOOTHING * max(1, seen.sum())
    log_shares = [np.log(count + _SMOOTHING) - np.log(count.sum() + smoothing) for count in (target, other)]
    return np.where(seen, log_shares[0] - log_shares[1], 0.0)


def _self_train(tasks: _Tasks, used: Mask) -> Reals:
    """Train without the other tasks that a classifier that has not seen them takes for the target kind."""
    likely = _cross_validate(tasks, used, _train) > 0
    return _train(tasks, used & (tasks.target | ~likely))


def _cross_validate(tasks: _Tasks, used: Mask, train: Callable[[_Tasks, Mask], Reals]) -> Reals:
    """Return the log odds of each used task by a classifier that has not seen it: [tasks]; 0 for the others."""
    log_odds = np.zeros(len(used))
    fold = np.zeros(len(used), dtype=np.intp)
    for of_kind in (used & tasks.target, used & ~tasks.target):
        fold[of_kind] = np.arange(of_kind.sum()) % _FOLDS
    for number in range(_FOLDS):
        left_out = used & (fold == number)
        log_odds[left_out] = tasks.log_odds(train(tasks, used & ~left_out))[left_out]
    return log_odds

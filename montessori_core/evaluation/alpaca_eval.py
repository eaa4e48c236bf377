"""AlpacaEval 2.0: the win rate of a model's answers, plain and length-controlled.

The length-controlled win rate is from Dubois et al. (2024), "Length-Controlled AlpacaEval": a logistic regression estimates
the effect of length on preferences, and the rate is its prediction for answers of equal length.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from montessori_core.data.entries import Entry, Text, read_entries
from montessori_core.data.jsonl import open_text
from montessori_core.data.rows import ComparisonRow
from montessori_core.errors import DataError
from montessori_core.evaluation.statistics import mean_and_error
from montessori_core.models.thinking import Answered

_FOLDS = 5
_STRENGTHS = np.logspace(-4, 4, 10)
"""Candidate inverse strengths of the penalty: scikit-learn's, as in the published fit."""


class Output(Entry):
    """A model's answer, in the format of AlpacaEval's output files."""

    instruction: Text
    output: Answered
    generator: str = ""
    dataset: str = ""


@dataclass(frozen=True)
class WinRates:
    """Outcomes of a model against another; rates are shares of 1, or None if there are too few questions.

    Attributes:
        wins, ties, losses, unparsed: numbers of questions by outcome; unparsed ones count in no rate.
        win_rate, win_rate_error: mean preference and its standard error.
        length_controlled, length_controlled_error: the same for answers of equal length.
    """

    wins: int
    ties: int
    losses: int
    unparsed: int
    win_rate: float | None
    win_rate_error: float | None
    length_controlled: float | None
    length_controlled_error: float | None


def read_outputs(path: Path) -> list[Output]:
    """Read a model's answers: a list (.json) or one object per line (.jsonl).

    Raises:
        DataError: it is not valid, or an instruction occurs twice; the message names file, line or entry, and field.
    """
    outputs = read_entries(path, Output)
    numbers: dict[str, int] = {}
    for number, output in enumerate(outputs, 1):
        if output.instruction in numbers:
            raise DataError(
                f"{path}, entry {number}: field instruction: as in entry {numbers[output.instruction]}; remove one of them"
            )
        numbers[output.instruction] = number
    return outputs


def comparisons(answers: Mapping[str, str], others: Mapping[str, str]) -> list[ComparisonRow]:
    """Return rows for `open_pairwise_judge`, in the order of `answers`.

    Args:
        answers: instruction -> answer of the model.
        others: instruction -> answer of the other model.

    Raises:
        DataError: only one of them answers an instruction.
    """
    for name, missing in (("other", answers.keys() - others.keys()), ("model", others.keys() - answers.keys())):
        if missing:
            raise DataError(
                f"{len(missing)} instructions have no answer of the {name}, e.g. {min(missing)[:80]!r}; compare answers to "
                "the same instructions"
            )
    return [
        {"question_id": f"{index:05d}", "instruction": instruction, "answer": answer, "other": others[instruction]}
        for index, (instruction, answer) in enumerate(answers.items())
    ]


def read_difficulties(path: Path) -> list[float]:
    """Read AlpacaEval's instruction_difficulty.csv: a header, then lines with index and difficulty of a question.

    Returns:
        [questions] difficulties in the order of the indexes.

    Raises:
        DataError: it cannot be read, or a line is not valid; the message names file and line.
    """
    difficulties: dict[int, float] = {}
    try:
        with open_text(path, newline="") as stream:
            for number, row in enumerate(csv.reader(stream, strict=True), 1):
                if number == 1 or not row:
                    continue
                try:
                    index, difficulty = int(row[0]), float(row[1])
                except (ValueError, IndexError) as error:
                    raise DataError(
                        f"{path}, line {number}: expected an index and a number; give AlpacaEval's instruction_difficulty.csv"
                    ) from error
                if not math.isfinite(difficulty) or index in difficulties:
                    raise DataError(
                        f"{path}, line {number}: not finite, or index {index} occurs twice; correct the line"
                    )
                difficulties[index] = difficulty
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); give AlpacaEval's instruction_difficulty.csv") from error
    if sorted(difficulties) != list(range(len(difficulties))):
        raise DataError(f"{path}: indexes must be 0 to {len(difficulties) - 1}, each once; complete the file")
    return [difficulties[index] for index in range(len(difficulties))]


def length_controlled_win_rate(
    preferences: Sequence[float],
    lengths: Sequence[int],
    other_lengths: Sequence[int],
    difficulty: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Return the expected win rate for answers of equal length, and its standard error, as shares of 1.

    The published model is logit P(win) = theta + phi tanh((length - other length) / deviation) + psi difficulty, where
    `deviation` is the standard deviation of the length differences. It is fitted to the preferences as probabilities, with
    an L1 penalty on all coefficients that is chosen by five-fold cross-validation. The rate is the mean prediction over
    the examples at a length difference of zero. If all differences are equal, the length term is 0.

    There are two differences from the published code. The leaderboard's fit also pulls the coefficients towards those of
    two baselines, one verbose and one concise on purpose; they exist only for one judge and one baseline model and are
    left out here. The leaderboard's standard error is the spread of the predictions, which reflects only the difficulty of
    the questions. Here it is the error of the estimate under resampling of the examples, linearised with the penalty fixed,
    so that it is comparable to that of the plain win rate.

    The penalty can set theta to exactly 0: a rate that does not differ from one half by more than chance may be 50 %.

    Args:
        preferences: [examples] probability that the model's answer is preferred, of five or more.
        lengths: [examples] characters of the model's answers.
        other_lengths: [examples] characters of the other answers.
        difficulty: [examples] difficulty of each instruction, see `read_difficulties`.
    """
    targets = np.asarray(preferences, dtype=float)
    longer = np.asarray(lengths, dtype=float) - np.asarray(other_lengths, dtype=float)
    deviation = longer.std(ddof=1)
    columns = [np.ones_like(targets), np.tanh(longer / deviation) if deviation else np.zeros_like(targets)]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=float))
    features = np.stack(columns, axis=1)
    at_equal_length = features.copy()
    at_equal_length[:, 1] = 0.0

    coefficients = _fit(features, targets, _best_strength(features, targets))
    fitted, rates = expit(features @ coefficients), expit(at_equal_length @ coefficients)
    # Contribution of each example to the rate: direct, and through the coefficients (one Newton step).
    hessian = (features * (fitted * (1 - fitted))[:, None]).T @ features / len(targets)
    gradient = (at_equal_length * (rates * (1 - rates))[:, None]).mean(axis=0)
    contributions = rates + (targets - fitted) * (features @ np.linalg.pinv(hessian, hermitian=True) @ gradient)
    return float(rates.mean()), mean_and_error(contributions)[1]


def summarize(table: pa.Table, difficulty: Sequence[float] | None = None) -> WinRates:
    """Compute win rates from a table of schema `PAIRWISE`.

    Args:
        table: one row per question.
        difficulty: [rows] difficulty of each instruction.

    Raises:
        DataError: the numbers of rows and difficulties differ.
    """
    if difficulty is not None and len(difficulty) != table.num_rows:
        raise DataError(
            f"{len(difficulty)} difficulties for {table.num_rows} questions; they belong to AlpacaEval's original set and "
            "order: do not set them for another set"
        )
    outcomes = table["outcome"].to_pylist()
    judged = [index for index, outcome in enumerate(outcomes) if outcome != "unparsed"]

    def select_judged(values: Sequence[Any]) -> list[Any]:
        return [values[index] for index in judged]

    preferences = select_judged(table["preference"].to_pylist())
    lengths, other_lengths = (select_judged(table[name].to_pylist()) for name in ("characters", "other_characters"))
    difficulties = None if difficulty is None else select_judged(difficulty)
    plain = mean_and_error(np.array(preferences)) if len(judged) > 1 else (None, None)
    controlled = (
        length_controlled_win_rate(preferences, lengths, other_lengths, difficulties)
        if len(judged) >= _FOLDS
        else (None, None)
    )
    wins, ties, losses, unparsed = (outcomes.count(name) for name in ("win", "tie", "loss", "unparsed"))
    return WinRates(wins, ties, losses, unparsed, *plain, *controlled)


def _best_strength(features: np.ndarray, targets: np.ndarray) -> float:
    """Return the inverse strength with the lowest loss in five-fold cross-validation."""
    fold = np.arange(len(targets)) % _FOLDS

    def loss(strength: float) -> float:
        losses = []
        for held_out in range(_FOLDS):
            train, test = fold != held_out, fold == held_out
            logits = features[test] @ _fit(features[train], targets[train], strength)
            losses.append(np.mean(np.logaddexp(0.0, logits) - targets[test] * logits))
        return float(np.mean(losses))

    return float(min(_STRENGTHS, key=loss))


def _fit(features: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """Return [features] coefficients; each example counts as a win and a loss, weighted by their probabilities."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, tol=1e-6, max_iter=1000, random_state=0
    )
    model.fit(
        np.concatenate([features, features]),
        np.repeat([1, 0], len(targets)),
        # Clip: liblinear drops examples of weight 0, and takes a single remaining class for a win.
        sample_weight=np.clip(np.concatenate([targets, 1.0 - targets]), 1e-9, 1.0),
    )
    return np.asarray(model.coef_[0])

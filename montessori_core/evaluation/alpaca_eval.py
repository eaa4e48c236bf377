"""AlpacaEval 2.0: how often a model's answers are preferred, as it is and with the length of answers controlled for.

The length-controlled win rate is that of Dubois et al. (2024), "Length-Controlled AlpacaEval": a logistic regression says how
much of a preference is owed to length, and the rate is what it predicts for answers of equal length.
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
from montessori_core.errors import DataError, UserError

_FOLDS = 5
_STRENGTHS = np.logspace(-4, 4, 10)
"""Inverse strengths of the penalty that are tried: scikit-learn's, as in the published fit."""


class Output(Entry):
    """A model's answer, in the format of AlpacaEval's output files."""

    instruction: Text
    output: str
    generator: str = ""
    dataset: str = ""


@dataclass(frozen=True)
class WinRates:
    """How a model fares against another; rates are shares of 1, and None where they cannot be had.

    Attributes:
        wins, ties, losses, unparsed: questions by their outcome; those unparsed enter no rate.
        win_rate, win_rate_error: the mean preference and its standard error.
        length_controlled, length_controlled_error: what they would be if answers were of equal length.
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
    """Read a model's answers: a list (.json) or one object a line (.jsonl).

    Raises:
        DataError: it cannot be used, or an instruction stands in it twice; the message names file, line or entry, and field.
    """
    outputs = read_entries(path, Output)
    places: dict[str, int] = {}
    for number, one in enumerate(outputs, 1):
        if one.instruction in places:
            raise DataError(
                f"{path}, entry {number}: field instruction: as in entry {places[one.instruction]}; remove one of them"
            )
        places[one.instruction] = number
    return outputs


def comparisons(answers: Mapping[str, str], others: Mapping[str, str]) -> list[ComparisonRow]:
    """Rows for `open_pairwise_judge`, in the order of `answers`.

    Args:
        answers: instruction -> answer of the model.
        others: instruction -> answer of what it is compared with.

    Raises:
        DataError: an instruction is answered by one of them alone.
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
    """Read AlpacaEval's instruction_difficulty.csv: a header, then a question's index and its difficulty a line.

    Returns:
        [questions] difficulties in the order of their index.

    Raises:
        DataError: it cannot be read, or a line does not fit; the message names file and line.
    """
    found: dict[int, float] = {}
    try:
        with open_text(path, newline="") as stream:
            for number, row in enumerate(csv.reader(stream), 1):
                if number == 1 or not row:
                    continue
                try:
                    index, difficulty = int(row[0]), float(row[1])
                except (ValueError, IndexError) as error:
                    raise DataError(
                        f"{path}, line {number}: expected an index and a number; give AlpacaEval's instruction_difficulty.csv"
                    ) from error
                if not math.isfinite(difficulty) or index in found:
                    raise DataError(
                        f"{path}, line {number}: not finite, or index {index} stands there twice; correct the line"
                    )
                found[index] = difficulty
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); give AlpacaEval's instruction_difficulty.csv") from error
    if sorted(found) != list(range(len(found))):
        raise DataError(f"{path}: indexes must be 0 to {len(found) - 1}, each once; complete the file")
    return [found[index] for index in range(len(found))]


def win_rate(preferences: Sequence[float]) -> tuple[float, float]:
    """The mean preference and its standard error (nan of a single one), as shares of 1.

    Args:
        preferences: [examples] probability that the model's answer is preferred; 1 for a win, 0.5 for a tie.

    Raises:
        UserError: there are none.
    """
    if not len(preferences):
        raise UserError(
            "no preferences: no judgement could be read; look at the judge's answers, or take another judge"
        )
    return _mean_and_error(np.asarray(preferences, dtype=float))


def length_controlled_win_rate(
    preferences: Sequence[float],
    lengths: Sequence[int],
    other_lengths: Sequence[int],
    difficulty: Sequence[float] | None = None,
) -> tuple[float, float]:
    """The win rate to be expected if the two answers were always of equal length, and its standard error, as shares of 1.

    The published model: logit P(the model wins) = theta + phi tanh((length - other length) / deviation) + psi difficulty,
    the deviation being the standard deviation of the differences. It is fitted to preferences as probabilities with an L1
    penalty on all coefficients, chosen by five-fold cross-validation. The rate is the mean over the examples of what it
    predicts at a difference of zero. Where all differences are equal, nothing can be told about length.

    Two things are not as published. The leaderboard's fit also pulls the coefficients towards those of two baselines that
    were made verbose and concise on purpose; we leave them out, since they exist for one judge and one baseline model. And
    its standard error is the spread of the predictions, which is about the questions' difficulty alone; ours is that of
    the estimate under resampling of the examples, linearised (penalty fixed), so that it can stand beside the plain one's.

    The penalty can set theta to exactly 0: a rate within chance of one half may read 50 %.

    Args:
        preferences: [examples] probability that the model's answer is preferred.
        lengths: [examples] characters of the model's answers.
        other_lengths: [examples] characters of the answers they are compared with.
        difficulty: [examples] difficulty of each instruction, see `read_difficulties`.

    Raises:
        UserError: fewer than five examples.
    """
    if len(preferences) < _FOLDS:
        raise UserError(
            f"{len(preferences)} preferences are too few to control for length; compare at least {_FOLDS} answers"
        )
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
    # What each example adds to the rate: by itself, and by way of the coefficients (a step of Newton's method).
    curvature = (features * (fitted * (1 - fitted))[:, None]).T @ features / len(targets)
    slope = (at_equal_length * (rates * (1 - rates))[:, None]).mean(axis=0)
    contributions = rates + (targets - fitted) * (features @ np.linalg.pinv(curvature, hermitian=True) @ slope)
    return float(rates.mean()), _mean_and_error(contributions)[1]


def summarize(table: pa.Table, difficulty: Sequence[float] | None = None) -> WinRates:
    """Win rates from a table of schema `PAIRWISE`.

    Args:
        table: a row a question.
        difficulty: [rows] difficulty of each instruction.

    Raises:
        DataError: there is not one difficulty a row.
    """
    if difficulty is not None and len(difficulty) != table.num_rows:
        raise DataError(
            f"{len(difficulty)} difficulties for {table.num_rows} questions; they are for AlpacaEval's own set, in its "
            "order: leave them out for another"
        )
    outcomes = table["outcome"].to_pylist()
    judged = [index for index, outcome in enumerate(outcomes) if outcome != "unparsed"]

    def of_judged(values: Sequence[Any]) -> list[Any]:
        return [values[index] for index in judged]

    preferences, lengths, others = (
        of_judged(table[name].to_pylist()) for name in ("preference", "characters", "other_characters")
    )
    kept = None if difficulty is None else of_judged(difficulty)
    plain = win_rate(preferences) if len(judged) > 1 else (None, None)
    controlled = (
        length_controlled_win_rate(preferences, lengths, others, kept) if len(judged) >= _FOLDS else (None, None)
    )
    wins, ties, losses, unparsed = (outcomes.count(name) for name in ("win", "tie", "loss", "unparsed"))
    return WinRates(wins, ties, losses, unparsed, *plain, *controlled)


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def _best_strength(features: np.ndarray, targets: np.ndarray) -> float:
    """The inverse strength whose fits predict left-out fifths of the examples best."""
    fold = np.arange(len(targets)) % _FOLDS

    def loss(strength: float) -> float:
        losses = []
        for left_out in range(_FOLDS):
            inside, outside = fold != left_out, fold == left_out
            logits = features[outside] @ _fit(features[inside], targets[inside], strength)
            losses.append(np.mean(np.logaddexp(0.0, logits) - targets[outside] * logits))
        return float(np.mean(losses))

    return float(min(_STRENGTHS, key=loss))


def _fit(features: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """[features] coefficients; each example is a win and a loss, weighted by how probable each is."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, tol=1e-6, max_iter=1000, random_state=0
    )
    model.fit(
        np.concatenate([features, features]),
        np.repeat([1, 0], len(targets)),
        # liblinear drops examples of no weight, and takes the only outcome left for a win whatever it is.
        sample_weight=np.clip(np.concatenate([targets, 1.0 - targets]), 1e-9, 1.0),
    )
    return np.asarray(model.coef_[0])

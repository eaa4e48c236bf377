"""Does influence predict what training does? Subsets to train on, and how well predictions rank the outcomes.

A predictor gives each example a value; its prediction for a subset is the sum of the values. The *linear datamodeling
score* (Park et al., "TRAK", ICML 2023) is Spearman's rank correlation, over random subsets of one size, of the prediction
and the drop in reference loss in a training on the subset. Subsets are lists of the positions of their examples.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from montessori_core.seeding import seed_of

Floats = npt.NDArray[np.float64]
TENTHS = ("top", "middle", "bottom")
_RESAMPLES = 9999


@dataclass(frozen=True)
class Score:
    """Rank correlation of predictions with outcomes; intervals are 95 %. NaN if all predictions are equal.

    Attributes:
        predictor: name of the predictor.
        score: Spearman's correlation.
        low, high: interval of the score.
        difference: score minus that of the first predictor.
        difference_low, difference_high: interval of the difference, paired.
    """

    predictor: str
    score: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


def shuffled(positions: Sequence[int], seed: int) -> list[int]:
    """Return a subset in a random order that depends on its members and the seed alone."""
    order = sorted(positions)
    random.Random(seed_of(seed, "order", *order)).shuffle(order)
    return order


def random_subsets(positions: Sequence[int], count: int, size: int, seed: int) -> list[list[int]]:
    """Draw `count` random subsets of `size` examples; a larger count keeps the earlier subsets."""
    return [
        shuffled(random.Random(seed_of(seed, "subset", number)).sample(positions, size), seed)
        for number in range(count)
    ]


def left_out_groups(positions: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Divide the examples at random into `count` groups whose sizes differ by one at most."""
    order = list(positions)
    random.Random(seed_of(seed, "groups")).shuffle(order)
    return [order[number::count] for number in range(count)]


def tenths(positions: Sequence[int], values: Floats) -> dict[str, list[int]]:
    """Return the deciles TENTHS of the examples, ranked by value; of equal values the first example is higher.

    Args:
        positions: positions of the examples.
        values: [all examples] values by position.
    """
    ranked = sorted(positions, key=lambda position: (-values[position], position))
    size = max(1, len(ranked) // 10)
    middle = (len(ranked) - size) // 2
    return dict(zip(TENTHS, (ranked[:size], ranked[middle : middle + size], ranked[-size:]), strict=True))


def cut_into_batches(order: Sequence[int], size: int, left_out: Sequence[int] = ()) -> list[list[int]]:
    """Cut an order into batches of `size`, then leave out some examples: the others stay in their batches."""
    absent = set(left_out)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    kept = [[position for position in batch if position not in absent] for batch in batches]
    return [batch for batch in kept if batch]


def predict(values: Floats, subsets: Sequence[Sequence[int]]) -> Floats:
    """Return [subsets] the summed values of the examples of each subset."""
    return np.array([math.fsum(values[list(members)]) for members in subsets])


def score_predictors(predictions: Mapping[str, Floats], outcomes: Floats) -> list[Score]:
    """Score predictors by the rank correlation of their predictions with the outcomes.

    Intervals are percentiles of a bootstrap over the trainings. All predictors are scored on the same resamples, so that
    differences are paired. The result is the same in each call.

    Args:
        predictions: [trainings] predictions by predictor; differences are from the first.
        outcomes: [trainings] measured values.
    """
    draws = np.random.default_rng(0).integers(len(outcomes), size=(_RESAMPLES, len(outcomes)))
    resampled = {name: rank_correlation(values[draws], outcomes[draws]) for name, values in predictions.items()}
    scores = {name: float(rank_correlation(values, outcomes)) for name, values in predictions.items()}
    first = next(iter(predictions))
    return [
        Score(
            name,
            score,
            *_interval(resampled[name]),
            score - scores[first],
            *_interval(resampled[name] - resampled[first]),
        )
        for name, score in scores.items()
    ]


def rank_correlation(first: Floats, second: Floats) -> Floats:
    """Return Spearman's correlation over the last axis; NaN where all values of one side are equal."""
    ranks = [rankdata(values, axis=-1) for values in (first, second)]
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in ranks)
    with np.errstate(invalid="ignore"):
        correlation: Floats = (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return correlation


def _interval(values: Floats) -> tuple[float, float]:
    """Return the central 95 % of the values; resamples without a correlation do not count."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)

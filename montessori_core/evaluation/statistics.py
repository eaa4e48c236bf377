"""Statistics of a study: the gain of each method over the baseline, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

_RESAMPLES = 9999
_CHUNK = 2**24  # resamples times examples at a time: 256 MB


@dataclass(frozen=True)
class Outcome:
    """The results of a method.

    Attributes:
        method: name of the method.
        losses: [seeds, examples] held-out loss of each evaluation example, nats per token.
        seconds: [seeds] total time of the method's jobs, including shared ones, without the evaluation of its student.
        flops: [seeds] floating-point operations of these jobs, without models behind an API.
    """

    method: str
    losses: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray


def compare_outcomes(outcomes: list[Outcome], baseline: str) -> list[dict[str, Any]]:
    """Return a row per method: its held-out loss, and its gain over the baseline with interval and spread.

    The 95 % interval says whether the gain holds for other examples and, with several seeds, for other runs; see
    `bootstrap_gain`. The spread is the standard deviation of the seeds' mean gains.
    """
    (reference,) = (outcome for outcome in outcomes if outcome.method == baseline)
    rows = []
    for outcome in outcomes:
        gains = reference.losses - outcome.losses
        low = high = 0.0
        if outcome is not reference:
            low, high = bootstrap_gain(gains)
        rows.append(
            {
                "method": outcome.method,
                "held_out_loss": float(outcome.losses.mean()),
                "gain": float(gains.mean()),
                "gain_low": low,
                "gain_high": high,
                "gain_of_seeds": [float(gain) for gain in gains.mean(axis=1)],
                "spread_over_seeds": float(gains.mean(axis=1).std(ddof=1)) if len(gains) > 1 else None,
                "job_seconds": float(outcome.seconds.mean()),
                "flops": float(outcome.flops.mean()),
            }
        )
    return rows


def bootstrap_gain(gains: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean gain, by a bootstrap over seeds and, within them, examples.

    All seeds are evaluated on the same examples, so a resample draws seeds and, independently of them, examples (the
    "pigeonhole" bootstrap of Owen, 2007). With one seed, only examples are drawn.

    With several seeds, both half-widths of the percentile interval are stretched for the few seeds: a resample of S seeds
    has (S - 1) / S of their variance, and Student's t distribution takes the place of the normal. Where only seeds differ
    and five are run, the percentile interval alone covers 82 % instead of 95 %.

    Args:
        gains: [seeds, examples].
    """
    generator = np.random.default_rng(0)
    seeds, examples = gains.shape
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=_RESAMPLES)  # [resamples, seeds]
    totals = []
    for counts in np.array_split(seed_counts, -(-_RESAMPLES * examples // _CHUNK)):
        example_counts = generator.multinomial(examples, np.full(examples, 1 / examples), size=len(counts))
        totals.append(np.einsum("rs,se,re->r", counts, gains, example_counts, optimize=True))
    mean = gains.mean()
    low, high = mean + (np.quantile(np.concatenate(totals) / gains.size, [0.025, 0.975]) - mean) * _stretch(seeds)
    return float(low), float(high)


def _stretch(seeds: int) -> float:
    """Return the factor by which a percentile interval over few seeds is too narrow; 1 for one seed."""
    if seeds == 1:
        return 1.0
    return float(stdtrit(seeds - 1, 0.975) / ndtri(0.975) * math.sqrt(seeds / (seeds - 1)))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of [examples] values and its standard error, NaN for one example."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def share_interval(part: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927).

    Args:
        part: number of successes.
        total: number of trials, at least one.
    """
    from scipy.stats import binomtest  # takes half a second to import

    interval = binomtest(part, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def share_interval_of_seeds(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return the 95 % interval of a share over seeds.

    Trials of a seed have its teacher in common, so they are not independent: the interval is Student's over the shares of
    the seeds. It is never narrower than Wilson's of all trials, as few seeds may have the same share by chance.

    Args:
        counts: for each seed, successes and trials; without any trial, the interval is 0 to 1.
    """
    total = sum(trials for _, trials in counts)
    if not total:
        return 0.0, 1.0
    low, high = share_interval(sum(part for part, _ in counts), total)
    shares = np.array([part / trials for part, trials in counts if trials])
    if len(shares) == 1:
        return low, high
    mean, error = mean_and_error(shares)
    half_width = float(stdtrit(len(shares) - 1, 0.975)) * error
    return min(low, max(0.0, mean - half_width)), max(high, min(1.0, mean + half_width))

"""Statistics of a study: the gain of each method over the baseline, with intervals."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

_RESAMPLES = 9999


@dataclass(frozen=True)
class Outcome:
    """What a method reached.

    Attributes:
        method: its name.
        losses: [seeds, examples] held-out loss of each evaluation example, nats per token.
        seconds: [seeds] of all jobs that the method needs, shared ones included.
        flops: [seeds] floating-point operations of the same, those of models behind an API not among them.
    """

    method: str
    losses: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray


def compare_outcomes(outcomes: list[Outcome], baseline: str) -> list[dict[str, Any]]:
    """A row for each method: its held-out loss, and the gain over the baseline with what is known of its error.

    The interval (95 %) resamples evaluation examples, whose gains are averaged over the seeds first; the spread is the
    standard deviation of the seeds' mean gains. The first says whether the gain holds for other examples, the second
    whether it holds for other runs.
    """
    (reference,) = (outcome for outcome in outcomes if outcome.method == baseline)
    rows = []
    for outcome in outcomes:
        gains = reference.losses - outcome.losses
        low = high = 0.0
        if outcome is not reference:
            interval = bootstrap(
                (gains.mean(axis=0),),
                np.mean,
                n_resamples=_RESAMPLES,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
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

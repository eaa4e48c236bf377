"""Statistics of a study: the gain of each method over the baseline, with intervals."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

_RESAMPLES = 9999


@dataclass(frozen=True)
class Outcome:
    """The results of a method.

    Attributes:
        method: name of the method.
        losses: [seeds, examples] held-out loss of each evaluation example, nats per token.
        seconds: [seeds] total time of the method's jobs, including shared ones.
        flops: [seeds] floating-point operations of these jobs, without models behind an API.
    """

    method: str
    losses: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray


def compare_outcomes(outcomes: list[Outcome], baseline: str) -> list[dict[str, Any]]:
    """Return a row per method: its held-out loss, and its gain over the baseline with interval and spread.

    The 95 % interval is from a bootstrap over evaluation examples, after averaging the gains of each over the seeds. The
    spread is the standard deviation of the seeds' mean gains. The interval shows whether the gain holds for other examples,
    the spread whether it holds for other runs.
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

"""One format for the scores of all benchmarks: mean, standard error, and number of items."""

import math
from statistics import fmean, variance

import numpy as np
import pyarrow as pa

from montessori_core.evaluation.alpaca_eval import WinRates
from montessori_core.evaluation.statistics import mean_and_error
from montessori_core.judging.mt_bench import Summary
from montessori_core.program import Row


def score(
    benchmark: str,
    metric: str,
    mean: float | None,
    standard_error: float | None,
    examples: int,
    higher_is_better: bool = True,
    unparsed: int = 0,
) -> Row:
    """Return a row of `scores` in `metrics.json`.

    Mean and standard error are null if undefined. `unparsed` is the number of judgements that could not be read; they are
    not in `examples`.
    """
    return {
        "benchmark": benchmark,
        "metric": metric,
        "mean": _finite(mean),
        "standard_error": _finite(standard_error),
        "examples": examples,
        "higher_is_better": higher_is_better,
        "unparsed": unparsed,
    }


def item_scores(table: pa.Table) -> list[Row]:
    """Compute scores from a table of schema `ITEM_SCORES`.

    The mean is over the items of all tasks of a benchmark, so a group such as MMLU weights its tasks by size.
    """
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in table.select(["benchmark", "metric", "score", "higher_is_better"]).to_pylist():
        grouped.setdefault((row["benchmark"], row["metric"]), []).append(row)
    scores = []
    for (benchmark, metric), rows in grouped.items():
        mean, error = mean_and_error(np.array([row["score"] for row in rows]))
        scores.append(score(benchmark, metric, mean, error, len(rows), rows[0]["higher_is_better"]))
    return scores


def tasks_without_scores(items: pa.Table, scored: pa.Table) -> list[str]:
    """Return the tasks with items in a table of schema `ITEMS` that have no row in a table of schema `ITEM_SCORES`."""
    return sorted(set(items["task"].to_pylist()) - set(scored["task"].to_pylist()))


def win_rate_scores(benchmark: str, rates: WinRates) -> list[Row]:
    """Return the win rate and the length-controlled win rate, as shares of 1."""
    judged = rates.wins + rates.ties + rates.losses
    metrics = {
        "win_rate": (rates.win_rate, rates.win_rate_error),
        "length_controlled_win_rate": (rates.length_controlled, rates.length_controlled_error),
    }
    return [score(benchmark, metric, *rate, judged, unparsed=rates.unparsed) for metric, rate in metrics.items()]


def judged_benchmark(name: str, prompts: str) -> str:
    """Return the name of a judged benchmark in `scores`; `prompts` is 'own' or 'published'."""
    return name if prompts == "own" else f"{name}_{prompts}"


def mt_bench_scores(benchmark: str, summary: Summary) -> list[Row]:
    """Return mean scores from 1 to 10: over all judgements, by turn and by category."""
    parts = [
        ("score", summary.overall),
        *((f"score_turn_{turn}", part) for turn, part in summary.by_turn.items()),
        *((f"score_{category}", part) for category, part in summary.by_category.items()),
    ]
    return [
        score(benchmark, metric, part.mean, part.standard_error, part.judged, unparsed=part.unparsed)
        for metric, part in parts
    ]


def mean_over_seeds(seeds: list[list[Row]]) -> list[Row]:
    """Average the scores of runs that differ only in their seed; the standard error is over seeds and items.

    Its square is the sum of two variances of the mean: over seeds, that of the seeds' means; over items, the mean of the
    seeds' squared errors, since all seeds answer the same items, so that more seeds are not more items. Chance that differs
    from seed to seed and item to item is in both, so that the sum is an upper bound.

    Unparsed judgements are counted over all seeds. A score that a seed lacks, because it was not finite, is left out.

    Args:
        seeds: [seeds][scores], in the order of the first.
    """
    averages = []
    named = [{(row["benchmark"], row["metric"]): row for row in scores} for scores in seeds]
    for name in named[0]:
        if not all(name in scores for scores in named):
            continue
        scores = [scores[name] for scores in named]
        means, errors = ([row[key] for row in scores] for key in ("mean", "standard_error"))
        averages.append(
            scores[0]
            | {
                "mean": None if None in means else fmean(means),
                "standard_error": None if None in means + errors else _error_over_seeds(means, errors),
                "unparsed": sum(row["unparsed"] for row in scores),
            }
        )
    return averages


def _error_over_seeds(means: list[float], errors: list[float]) -> float:
    over_seeds = variance(means) / len(means) if len(means) > 1 else 0.0
    return math.sqrt(over_seeds + fmean(error**2 for error in errors))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

"""One format for the scores of all benchmarks: mean, standard error, and number of items."""

import math

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
    """Average the scores of runs that differ only in their seed, and their standard errors.

    All seeds answer the same items, so more seeds are not more items: the standard error over items of the mean is at most
    the mean of the seeds' errors, and equals it if all seeds give the same answers.

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
        columns = {key: [row[key] for row in scores] for key in ("mean", "standard_error")}
        means = {key: None if None in values else sum(values) / len(values) for key, values in columns.items()}
        averages.append(scores[0] | means | {"unparsed": sum(row["unparsed"] for row in scores)})
    return averages


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

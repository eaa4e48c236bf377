"""Format numbers for people: short, with a true minus sign, and a dash for an unknown value; and lists of names."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

UNKNOWN = "–"
JUDGED_BENCHMARKS = {"alpaca_eval": "AlpacaEval", "mt_bench": "MT-Bench"}
"""Displayed names of the benchmarks whose answers a model judges."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Unit:
    """A power of ten of a nat, the unit of all influence values on a page."""

    exponent: int

    def __str__(self) -> str:
        return f"{_power(self.exponent)} nats" if self.exponent else "nats"

    def scale(self, nats: float) -> float:
        """Convert influence to this unit."""
        return nats / 10.0**self.exponent

    def text(self, nats: float | None) -> str:
        """Write influence in this unit, with its sign."""
        if not is_finite(nats):
            return UNKNOWN
        return f"{'+' if nats > 0 else ''}{significant(self.scale(nats))}"

    def size(self, nats: float | None, digits: int = 2) -> str:
        """Write a noise floor, standard error or distance in this unit."""
        return significant(self.scale(nats), digits) if is_finite(nats) else UNKNOWN


def first_names(names: Collection[str]) -> str:
    """Return the first three of some names, in order, and whether there are more."""
    return f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"


def closest_name(name: str, names: Iterable[str]) -> str:
    """Return ' (did you mean ...?)' with the one of some names that is most like a mistyped one; empty if none is."""
    import difflib

    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unit_of(nats: Iterable[float]) -> Unit:
    """Return the unit in which the median absolute value lies between 1 and 1000."""
    sizes = np.abs(np.fromiter(nats, dtype=float))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return Unit(min(0, 3 * math.floor(math.log10(float(np.median(sizes))) / 3)) if sizes.size else 0)


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def count(number: int | None) -> str:
    """Write a whole number."""
    return f"{number:,}" if is_finite(number) else UNKNOWN


def share(value: float | None) -> str:
    """Write a fraction of 1 in per cent."""
    return f"{value:.0%}" if is_finite(value) else UNKNOWN


def loss(nats: float | None) -> str:
    """Write a loss, nats per token."""
    return f"{nats:.4f}" if is_finite(nats) else UNKNOWN


def signed(value: float | None) -> str:
    """Write a difference with its sign; differences that round to zero have none."""
    if not is_finite(value):
        return UNKNOWN
    text = f"{abs(value):,.4f}"
    if float(text.replace(",", "")) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def gain(mean: float | None, standard_error: float | None) -> str:
    """Write a difference of losses and its standard error, nats per token."""
    return f"{signed(mean)} ± {loss(standard_error)}" if is_finite(mean) else UNKNOWN


def significant(value: float, digits: int = 3) -> str:
    """Write a number to `digits` significant digits, as a power of ten if it is very small or large."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 < exponent < 5:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")
    return f"{value / 10.0**exponent:.{digits - 1}f} × {_power(exponent)}".replace("-", "−")


def duration(seconds: float) -> str:
    """Write a time in seconds, minutes or hours."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def gain_text(row: dict[str, Any]) -> str:
    """Write the gain of a row of a comparison, with its sign."""
    return f"{row['gain']:+.4f}"


def interval_text(row: dict[str, Any]) -> str:
    """Write the interval of a row's gain; the baseline has none."""
    return "" if row["gain_low"] == row["gain_high"] == 0.0 else f"{row['gain_low']:+.4f} to {row['gain_high']:+.4f}"


def signed_interval(row: dict[str, Any]) -> str:
    """Write the interval of a row's gain as `signed` writes a gain; the baseline has none."""
    return interval_text(row).replace("-", "−") if is_finite(row["gain_low"]) else UNKNOWN


def kind_text(row: dict[str, Any]) -> str:
    """Write the share of a method's instructions that are of the target kind, with its interval; '' if unknown."""
    if row.get("wanted_kind") is None:
        return ""
    value, low, high = (share(row[key]) for key in ("wanted_kind", "wanted_kind_low", "wanted_kind_high"))
    return f"{value} ({low} to {high})"


def spread_text(row: dict[str, Any]) -> str:
    """Write the spread of a row's gain over seeds; a single seed has none."""
    return "" if row["spread_over_seeds"] is None else f"{row['spread_over_seeds']:.4f}"


def task_name(benchmark: str) -> str:
    """Return the name of a benchmark without folders: lm-evaluation-harness takes the path of a task's file for a name."""
    return benchmark.rpartition("/")[2]


def benchmark_name(benchmark: str) -> str:
    """Return the displayed name of a benchmark, with the kind of judge prompts if it is judged."""
    name, separator, against = benchmark.partition(" against ")
    judged = name.removesuffix("_published")
    if judged not in JUDGED_BENCHMARKS:
        return task_name(benchmark)
    prompts = "own" if judged == name else "published"
    return f"{JUDGED_BENCHMARKS[judged]} ({prompts} judge prompts){separator}{against}"


def items_name(benchmark: str) -> str:
    """Return the displayed name of a benchmark whose items are meant, whoever judges the answers."""
    return JUDGED_BENCHMARKS.get(benchmark, task_name(benchmark))


def copies_by_benchmark(row: dict[str, Any]) -> dict[str, str]:
    """Return how many items of each benchmark a method's training sets share, by the benchmark's displayed name."""
    entries = row.get("contamination", [])
    return {items_name(entry["benchmark"]): f"{entry['overlapping']:,} of {entry['items']:,}" for entry in entries}


def score_name(benchmark: str, metric: str) -> str:
    """Return the displayed name of a benchmark's score."""
    return f"{benchmark_name(benchmark)}: {metric.replace('_', ' ')}"


def score_text(score: dict[str, Any] | None) -> str:
    """Write a benchmark score of a comparison with its standard error; a dash if there is none."""
    if score is None or not is_finite(score["mean"]):
        return UNKNOWN
    error = score["standard_error"]
    return f"{score['mean']:.3f}" + (f" ± {error:.3f}" if is_finite(error) else "")

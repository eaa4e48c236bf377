"""The pilot of a probing set: its first examples are measured before the others, to warn of too few preference pairs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pyarrow as pa

from montessori_core.config import Baseline, Preferences
from montessori_core.data.rows import Rows
from montessori_core.influence.preferences import pair_by_influence
from montessori_core.influence.table import join_influence

PILOT = 64
"""Examples of a pilot; a set of fewer than four times as many has no pilot."""

_ENOUGH = 0.1
"""Pairs per example below which a pilot warns; the paper's 10,000 examples made 6,792."""


def measure_after_pilot(
    rows: Rows, measure: Callable[[Rows, bool], list[Path]], settings: Preferences, warn: Callable[[str], None]
) -> list[Path]:
    """Measure the pilot, warn if it predicts few pairs, then measure the other rows; no row is measured twice.

    Args:
        rows: examples of the probing set.
        measure: measures rows, given whether they are the pilot, and returns the parts of their influence table.
        settings: kind of pairs, baseline and margin.
        warn: called with a warning, before the other rows are measured.

    Returns:
        The parts of all rows, in order.
    """
    count = pilot_size(rows.column("prompt_id"))
    if not count:
        return measure(rows, False)
    pilot = measure(rows[:count], True)
    warning = predict_pair_count(join_influence(pilot).read_all(), settings, len(rows))
    if warning:
        warn(warning)
    return [*pilot, *measure(rows[count:], False)]


def pilot_size(prompts: Sequence[str]) -> int:
    """Return the number of examples of the pilot: at least PILOT, up to the end of a prompt; 0 for a small set.

    Args:
        prompts: [examples] ids.
    """
    if len(prompts) < 4 * PILOT:
        return 0
    ends = (i for i in range(PILOT, len(prompts)) if prompts[i] != prompts[i - 1])
    return next(ends, 0)


def predict_pair_count(pilot: pa.Table, settings: Preferences, examples: int) -> str | None:
    """Return a warning if a pilot predicts few preference pairs.

    Args:
        pilot: influence table of complete prompts.
        settings: kind of pairs, baseline and margin.
        examples: number of all examples.
    """
    across = settings.pairs == "across_prompts"
    baselines = [baseline for baseline in get_args(Baseline) if not (across and baseline == "prompt")]
    counts = {baseline: _count_pairs(pilot, settings, baseline) for baseline in baselines}
    pairs, enough = counts[settings.baseline], _ENOUGH * pilot.num_rows
    if pairs >= enough:
        return None
    best = max(counts, key=lambda baseline: counts[baseline])
    remedies = ["lower preferences.margin"] if settings.margin else []
    remedies += [] if across else ["raise synthesis.samples_per_prompt"]
    remedy = (
        f"With preferences.baseline={best} they make {counts[best]}; you can change it at any time, and measured "
        "influence stays valid"
        if counts[best] >= enough
        else f"No baseline makes enough: {', or '.join(remedies) or 'most influence is below the noise floor'}"
    )
    return (
        f"the first {pilot.num_rows} examples make {pairs} preference pairs (preferences.baseline={settings.baseline}); all "
        f"{examples} will make about {round(pairs * examples / pilot.num_rows)}. {remedy}"
    )


def _count_pairs(pilot: pa.Table, settings: Preferences, baseline: str) -> int:
    return int(pair_by_influence(pilot, settings.model_copy(update={"baseline": baseline, "max_pairs": None})).num_rows)

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
"""Examples of a pilot; a set of less than four times as many has none."""

_FEW = 0.1
"""Pairs per example below which a pilot warns; the paper's 10,000 examples made 6,792."""


def measure_after_pilot(
    rows: Rows,
    measure: Callable[[Rows, bool], list[Path]],
    settings: Preferences,
    warn: Callable[[str], None],
) -> list[Path]:
    """Measure the pilot, warn if it foretells few pairs, and measure the other rows; none is measured twice.

    Args:
        rows: examples.
        measure: from some of them, and whether these are the pilot, to the shards of their influence table.
        settings: how pairs are made.
        warn: called with a warning, before the others are measured.

    Returns:
        The shards of all rows, in their order.
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
    """How many examples are the pilot: PILOT, and on to the end of a prompt; 0 for a small set.

    Args:
        prompts: [examples] ids.
    """
    if len(prompts) < 4 * PILOT:
        return 0
    ends = (i for i in range(PILOT, len(prompts)) if prompts[i] != prompts[i - 1])
    return next(ends, 0)


def predict_pair_count(pilot: pa.Table, settings: Preferences, examples: int) -> str | None:
    """Return a warning if a pilot foretells few preference pairs.

    Args:
        pilot: influence of whole prompts.
        settings: baseline and margin.
        examples: that are to be measured in all.
    """
    made = {baseline: _pairs(pilot, settings, baseline) for baseline in get_args(Baseline)}
    pairs, enough = made[settings.baseline], _FEW * pilot.num_rows
    if pairs >= enough:
        return None
    other = max(made, key=lambda baseline: made[baseline])
    remedy = (
        f"With preferences.baseline={other} they make {made[other]}; it may be changed at any time and "
        "keeps what is measured"
        if made[other] >= enough
        else "Other baselines make as few: lower preferences.margin, or raise synthesis.samples_per_prompt"
    )
    return (
        f"the first {pilot.num_rows} examples make {pairs} preference pairs (preferences.baseline={settings.baseline}), so "
        f"that all {examples} will make about {round(pairs * examples / pilot.num_rows)}. {remedy}"
    )


def _pairs(pilot: pa.Table, settings: Preferences, baseline: str) -> int:
    return int(pair_by_influence(pilot, settings.model_copy(update={"baseline": baseline, "max_pairs": None})).num_rows)

"""Preference pairs from influence (Eq. 3): within a prompt, every helpful example against every harmful one."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core.config import Preferences
from montessori_core.influence_table import influence_note
from montessori_core.schema import PREFERENCES, UTILITY_PREFERENCES, table_from_rows

Pairable = Mapping[str, Any]


def threshold_of(influence: pa.Table, baseline: str) -> float:
    """The `influence_student` that divides helpful from harmful examples, nats.

    Args:
        influence: the probing set's table.
        baseline: see `config.Preferences`.
    """
    if baseline == "null_step":
        return influence_note(influence, "null_step_influence")
    if baseline == "median":
        measured = influence.filter(pc.equal(influence["status"], "ok"))["influence_student"]
        return float(np.median(measured.to_numpy())) if len(measured) else 0.0
    return 0.0


def build_preferences(examples: pa.Table, influence: pa.Table, settings: Preferences) -> pa.Table:
    """The preference table, in the order of prompts and examples.

    Influence within the noise floor of the threshold has no sign to speak of, so such examples make no pairs; neither do
    rows that are not 'ok'.

    Args:
        examples: the probing examples.
        influence: their influence.
        settings: baseline, margin and limit.
    """
    threshold = threshold_of(influence, settings.baseline)
    margin = max(settings.margin, influence_note(influence, "noise_floor"))
    measured = influence.filter(pc.equal(influence["status"], "ok")).to_pylist()
    texts = {row["example_id"]: row for row in examples.to_pylist()}
    rows: list[dict[str, object]] = []
    for best, worst in pair_up(measured, "influence_student", threshold, margin, settings.max_pairs):
        row = _texts(best, worst, texts)
        for baseline in ("student", "null_step"):
            row[f"chosen_influence_{baseline}"] = best[f"influence_{baseline}"]
            row[f"rejected_influence_{baseline}"] = worst[f"influence_{baseline}"]
        rows.append(row)
    return table_from_rows(rows, PREFERENCES)


def build_utility_preferences(examples: pa.Table, utility: pa.Table, max_pairs: int | None) -> pa.Table:
    """Preference pairs from another signal than influence (the ablations of Table 2), divided at its median.

    Args:
        examples: the probing examples.
        utility: their utility; rows without one make no pairs.
        max_pairs: keep only so many, those with the widest gap; None keeps all.
    """
    known = utility.filter(pc.is_valid(utility["utility"]))
    threshold = float(np.median(known["utility"].to_numpy())) if known.num_rows else 0.0
    texts = {row["example_id"]: row for row in examples.to_pylist()}
    pairs = pair_up(known.to_pylist(), "utility", threshold, 0.0, max_pairs)
    return table_from_rows([_with_utility(best, worst, texts) for best, worst in pairs], UTILITY_PREFERENCES)


def build_extreme_preferences(examples: pa.Table, utility: pa.Table) -> pa.Table:
    """One pair for each prompt whose outputs differ in utility: the best and the worst (Self-Reward).

    Args:
        examples: examples of which several share a prompt.
        utility: their utility; rows without one make no pairs.
    """
    known: dict[str, list[Pairable]] = defaultdict(list)
    for row in utility.filter(pc.is_valid(utility["utility"])).to_pylist():
        known[row["prompt_id"]].append(row)
    texts = {row["example_id"]: row for row in examples.to_pylist()}
    rows: list[dict[str, object]] = []
    for of_prompt in known.values():
        best, worst = (extreme(of_prompt, key=lambda row: row["utility"]) for extreme in (max, min))
        if best["utility"] > worst["utility"]:
            rows.append(_with_utility(best, worst, texts))
    return table_from_rows(rows, UTILITY_PREFERENCES)


def best_of_each_prompt(examples: pa.Table, utility: pa.Table) -> pa.Table:
    """Of each prompt the example of the highest utility, the first of equals; prompts without any utility have none."""
    best: dict[str, Pairable] = {}
    for row in utility.filter(pc.is_valid(utility["utility"])).to_pylist():
        if row["prompt_id"] not in best or row["utility"] > best[row["prompt_id"]]["utility"]:
            best[row["prompt_id"]] = row
    return examples.filter(pc.is_in(examples["example_id"], pa.array([row["example_id"] for row in best.values()])))


def pair_up(
    rows: Sequence[Pairable], utility: str, threshold: float, margin: float, max_pairs: int | None
) -> list[tuple[Pairable, Pairable]]:
    """Within each prompt, every row above the threshold with every row below it; of too many, the widest gaps.

    Args:
        rows: examples with their `prompt_id`.
        utility: the column that is compared.
        threshold: divides better from worse.
        margin: rows this near to the threshold belong to neither.
        max_pairs: None for no limit.
    """
    chosen: dict[str, list[Pairable]] = defaultdict(list)
    rejected: dict[str, list[Pairable]] = defaultdict(list)
    for row in rows:
        if row[utility] > threshold + margin:
            chosen[row["prompt_id"]].append(row)
        elif row[utility] < threshold - margin:
            rejected[row["prompt_id"]].append(row)
    pairs = [(best, worst) for prompt in chosen for best in chosen[prompt] for worst in rejected[prompt]]
    if max_pairs is not None and len(pairs) > max_pairs:
        gaps = [float(best[utility] - worst[utility]) for best, worst in pairs]
        widest = sorted(range(len(pairs)), key=lambda i: (-gaps[i], i))
        pairs = [pairs[i] for i in sorted(widest[:max_pairs])]
    return pairs


def _with_utility(best: Pairable, worst: Pairable, texts: dict[str, dict[str, Any]]) -> dict[str, object]:
    return _texts(best, worst, texts) | {"chosen_utility": best["utility"], "rejected_utility": worst["utility"]}


def _texts(best: Pairable, worst: Pairable, texts: dict[str, dict[str, Any]]) -> dict[str, object]:
    text_best, text_worst = texts[best["example_id"]], texts[worst["example_id"]]
    return {
        "prompt_id": best["prompt_id"],
        "prompt": text_best["prompt"],
        "chosen": text_best["raw_output"],
        "rejected": text_worst["raw_output"],
        "chosen_id": best["example_id"],
        "rejected_id": worst["example_id"],
    }

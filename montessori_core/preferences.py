"""Preference pairs from influence (Eq. 3): within a prompt, every helpful example against every harmful one."""

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core.config import Preferences
from montessori_core.influence_table import influence_note
from montessori_core.schema import PREFERENCES, table_from_rows


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
    texts = {row["example_id"]: row for row in examples.to_pylist()}
    chosen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rejected: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in influence.to_pylist():
        if row["status"] != "ok":
            continue
        if row["influence_student"] > threshold + margin:
            chosen[row["prompt_id"]].append(row)
        elif row["influence_student"] < threshold - margin:
            rejected[row["prompt_id"]].append(row)
    pairs = [(best, worst) for prompt in chosen for best in chosen[prompt] for worst in rejected[prompt]]
    if settings.max_pairs is not None and len(pairs) > settings.max_pairs:
        widest = sorted(range(len(pairs)), key=lambda i: (-_gap(*pairs[i]), i))
        pairs = [pairs[i] for i in sorted(widest[: settings.max_pairs])]
    return table_from_rows([_row(best, worst, texts) for best, worst in pairs], PREFERENCES)


def _gap(best: dict[str, Any], worst: dict[str, Any]) -> float:
    return float(best["influence_student"] - worst["influence_student"])


def _row(best: dict[str, Any], worst: dict[str, Any], texts: dict[str, dict[str, Any]]) -> dict[str, object]:
    text_best, text_worst = texts[best["example_id"]], texts[worst["example_id"]]
    row: dict[str, object] = {
        "prompt_id": best["prompt_id"],
        "prompt": text_best["prompt"],
        "chosen": text_best["raw_output"],
        "rejected": text_worst["raw_output"],
        "chosen_id": best["example_id"],
        "rejected_id": worst["example_id"],
    }
    for baseline in ("student", "null_step"):
        row[f"chosen_influence_{baseline}"] = best[f"influence_{baseline}"]
        row[f"rejected_influence_{baseline}"] = worst[f"influence_{baseline}"]
    return row

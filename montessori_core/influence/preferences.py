"""Make preference pairs from influence (Eq. 3): within a prompt, every helpful example with every harmful one."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core.config import Preferences
from montessori_core.data.rows import Positions
from montessori_core.data.tables import (
    DRAWN_TOKENS,
    EXAMPLES,
    ROW_GROUP,
    open_parquet,
    read_table,
    take_rows,
    write_table,
)
from montessori_core.errors import DataError
from montessori_core.influence.table import read_influence_metadata

Floats = npt.NDArray[np.float64]

PAIRED = (
    "example_id",
    "prompt_id",
    "status",
    "influence_student",
    "influence_null_step",
    "standard_error",
    "estimator",
)
"""Columns of an influence table that pairs are made from."""


def threshold_of(influence: pa.Table, baseline: str) -> float:
    """Return the `influence_student` that separates helpful from harmful examples, nats; for 'prompt', the median.

    Args:
        influence: influence table of the probing set.
        baseline: see `config.Preferences`.
    """
    if baseline == "null_step":
        return read_influence_metadata(influence, "null_step_influence")
    if baseline in ("median", "prompt"):
        measured = influence["influence_student"].filter(pc.equal(influence["status"], "ok"))
        return float(np.median(measured.to_numpy())) if len(measured) else 0.0
    return 0.0


def thresholds_of(influence: pa.Table, baseline: str) -> Floats:
    """Return [rows] the `influence_student` that each row is compared with, nats.

    'prompt' takes the mean over the measured rows of the prompt, NaN if there are none. Not the median: the middle one of
    three rows would be its own threshold and make no pair; and the mean tends to lie in the widest gap.

    Args:
        influence: influence table of the probing set.
        baseline: see `config.Preferences`.
    """
    if baseline != "prompt":
        return np.full(influence.num_rows, threshold_of(influence, baseline))
    values = influence["influence_student"].to_numpy()
    prompts = pc.index_in(influence["prompt_id"], pc.unique(influence["prompt_id"])).to_numpy()
    measured = np.isfinite(values)
    sums, counts = (np.bincount(prompts[measured], weights, len(values)) for weights in (values[measured], None))
    with np.errstate(invalid="ignore"):
        means: Floats = (sums / counts)[prompts]
    return means


def pair_by_influence(influence: pa.Table, settings: Preferences) -> pa.Table:
    """Return the preference table without its texts, in the order of prompts and examples.

    The sign of influence within the noise floor of the threshold is unknown, so such examples make no pairs; neither do rows
    that are not 'ok', nor, with a margin, rows without a standard error.

    Args:
        influence: influence table of the probing set, at least its columns PAIRED.
        settings: baseline, margin and limit.
    """
    measured = influence.select(PAIRED).filter(pc.equal(influence["status"], "ok"))
    thresholds, floor = thresholds_of(measured, settings.baseline), read_influence_metadata(influence, "noise_floor")
    best, worst = pair_up(measured, "influence_student", thresholds, floor)
    if settings.margin:
        influences, errors = measured["influence_student"].to_numpy(), standard_errors(measured)
        significant = influences[best] - influences[worst] > settings.margin * np.hypot(errors[best], errors[worst])
        best, worst = best[significant], worst[significant]
    values = ["influence_student", "influence_null_step"]
    return _pairs(measured, values, *widest_pairs(measured, "influence_student", best, worst, settings.max_pairs))


def standard_errors(measured: pa.Table) -> Floats:
    """Return [rows] standard errors of influence over the reference examples, nats; NaN where there is none.

    The error of a first-order row has one degree of freedom, so all these rows get the root mean square of their errors.

    Args:
        measured: rows of an influence table with status 'ok'.
    """
    errors: Floats = measured["standard_error"].to_numpy().astype(np.float64)
    first_order = pc.equal(measured["estimator"], "first_order").to_numpy()
    if first_order.any():
        errors = np.where(first_order, np.sqrt(np.mean(errors[first_order] ** 2)), errors)
    return errors


def pair_by_utility(utility: pa.Table, max_pairs: int | None) -> pa.Table:
    """Return pairs made from another signal than influence, divided at its median (ablations of Table 2); no texts.

    Args:
        utility: utility table of the probing set; rows without utility make no pairs.
        max_pairs: keep only this many pairs, those with the widest gap; None keeps all.
    """
    measured = utility.filter(pc.is_valid(utility["utility"]))
    threshold = float(np.median(measured["utility"].to_numpy())) if measured.num_rows else 0.0
    best, worst = pair_up(measured, "utility", np.full(measured.num_rows, threshold), 0.0)
    return _pairs(measured, ["utility"], *widest_pairs(measured, "utility", best, worst, max_pairs))


def pair_extremes(utility: pa.Table) -> pa.Table:
    """Return a pair for each prompt whose outputs differ in utility: the best and the worst (Self-Reward); no texts.

    Args:
        utility: utility table with several examples per prompt; rows without utility make no pairs.
    """
    measured = utility.filter(pc.is_valid(utility["utility"]))
    values = measured["utility"].to_pylist()
    rows_by_prompt: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(measured["prompt_id"].to_pylist()):
        rows_by_prompt[prompt].append(row)
    extremes = [[choose(rows, key=values.__getitem__) for choose in (max, min)] for rows in rows_by_prompt.values()]
    differing = [pair for pair in extremes if values[pair[0]] > values[pair[1]]]
    return _pairs(measured, ["utility"], *np.array(differing, int).reshape(-1, 2).T)


def best_of_each_prompt(examples: pa.Table, utility: pa.Table) -> pa.Table:
    """Return the example of the highest utility of each prompt that has a utility; among ties, the first."""
    best: dict[str, dict[str, Any]] = {}
    for row in utility.filter(pc.is_valid(utility["utility"])).to_pylist():
        if row["prompt_id"] not in best or row["utility"] > best[row["prompt_id"]]["utility"]:
            best[row["prompt_id"]] = row
    return examples.filter(pc.is_in(examples["example_id"], pa.array([row["example_id"] for row in best.values()])))


def pair_up(rows: pa.Table, utility: str, thresholds: Floats, floor: float) -> tuple[Positions, Positions]:
    """Pair every row above its threshold with every row of the same prompt below its threshold.

    Args:
        rows: examples with `prompt_id`.
        utility: the column to compare.
        thresholds: [rows] the threshold of each row.
        floor: rows at most this far from their threshold make no pairs.

    Returns:
        [pairs] better rows and [pairs] worse rows, by prompts in the order of their first better row.
    """
    values: Floats = rows[utility].to_numpy()
    helpful, harmful = np.flatnonzero(values > thresholds + floor), np.flatnonzero(values < thresholds - floor)
    # Number the prompts in the order of their first helpful rows.
    prompts = pc.unique(rows["prompt_id"].take(helpful))
    numbers: Positions = pc.index_in(rows["prompt_id"], prompts).fill_null(-1).to_numpy()
    harmful = harmful[numbers[harmful] >= 0]
    helpful, harmful = (side[np.argsort(numbers[side], kind="stable")] for side in (helpful, harmful))
    harmful_counts = np.bincount(numbers[harmful], minlength=len(prompts))  # [prompts]; `harmful` is sorted by prompt
    first_harmful = np.cumsum(harmful_counts) - harmful_counts
    pair_counts = harmful_counts[numbers[helpful]]
    best = np.repeat(helpful, pair_counts)
    offsets = np.arange(len(best)) - np.repeat(np.cumsum(pair_counts) - pair_counts, pair_counts)
    return best, harmful[first_harmful[numbers[best]] + offsets]


def widest_pairs(
    rows: pa.Table, utility: str, best: Positions, worst: Positions, max_pairs: int | None
) -> tuple[Positions, Positions]:
    """Return the pairs with the widest gaps in a column, in their order; all pairs if there is no limit."""
    if max_pairs is None or len(best) <= max_pairs:
        return best, worst
    values: Floats = rows[utility].to_numpy()
    widest = np.sort(np.argsort(values[worst] - values[best], kind="stable")[:max_pairs])
    return best[widest], worst[widest]


def write_preferences(pairs: pa.Table, examples: Path, path: Path, schema: pa.Schema) -> None:
    """Write a preference table: pairs with the texts of their examples, one row group at a time.

    Args:
        pairs: the table without its texts.
        examples: example table that contains the examples of all pairs. If its order is that of the pairs, it is read once.
        path: the file to write.
        schema: `PREFERENCES` or `UTILITY_PREFERENCES`.

    Raises:
        DataError: an example is missing.
    """
    ids = read_table(examples, EXAMPLES, ["example_id"])["example_id"]
    columns = [pc.index_in(pairs[column], ids) for column in ("chosen_id", "rejected_id")]
    if any(column.null_count for column in columns):
        raise DataError(f"{examples}: examples of the pairs are missing; it is not the table that was measured")
    chosen, rejected = (column.to_numpy() for column in columns)

    def add_texts() -> Iterator[pa.RecordBatch]:
        with open_parquet(examples) as file:
            for start in range(0, pairs.num_rows, ROW_GROUP):
                group = slice(start, start + ROW_GROUP)
                rows, places = np.unique(np.stack([chosen[group], rejected[group]]), return_inverse=True)
                texts = pa.concat_tables(
                    take_rows(file, ["prompt", "raw_output", *DRAWN_TOKENS], rows)
                ).combine_chunks()
                best, worst = places.reshape(2, -1)
                table = pairs[group].append_column("prompt", texts["prompt"].take(best))
                for role, rows_of_role in (("chosen", best), ("rejected", worst)):
                    table = table.append_column(role, texts["raw_output"].take(rows_of_role))
                    for name in DRAWN_TOKENS:
                        table = table.append_column(f"{role}_{name}", texts[name].take(rows_of_role))
                yield from table.select(schema.names).cast(schema).to_batches()

    write_table(pa.RecordBatchReader.from_batches(schema, add_texts()), path, schema)


def _pairs(rows: pa.Table, values: list[str], best: Positions, worst: Positions) -> pa.Table:
    """Return the table of [pairs] with `prompt_id`, and with `example_id` and `values` of both rows."""
    columns = {"prompt_id": rows["prompt_id"].take(best)}
    for role, side in (("chosen", best), ("rejected", worst)):
        columns |= {
            f"{role}_{name.removeprefix('example_')}": rows[name].take(side) for name in ["example_id", *values]
        }
    return pa.table(columns)


def upper_half(ids: Sequence[str], values: Sequence[float]) -> list[str]:
    """Return the ids of the larger half of the values (rounded up), highest first; among ties, the first."""
    return highest(ids, values, -(-len(ids) // 2))


def highest(ids: Sequence[str], values: Sequence[float], count: int) -> list[str]:
    """Return the ids of the `count` largest values, highest first; among ties, the first."""
    order = sorted(range(len(ids)), key=lambda index: (-values[index], index))
    return [ids[index] for index in order[:count]]

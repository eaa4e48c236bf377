"""Make preference pairs from influence (Eq. 3): within a prompt, every helpful example with every harmful one.

Across prompts (ours), the most helpful examples are paired with the most harmful ones of any prompt.
"""

import math
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
    return _means_of_prompts(influence["prompt_id"], influence["influence_student"].to_numpy())


def _means_of_prompts(prompt_ids: pa.ChunkedArray, values: Floats) -> Floats:
    """Return [rows] the mean over the finite values of each row's prompt, NaN if there are none."""
    prompts = pc.index_in(prompt_ids, pc.unique(prompt_ids)).to_numpy()
    measured = np.isfinite(values)
    sums, counts = (np.bincount(prompts[measured], weights, len(values)) for weights in (values[measured], None))
    with np.errstate(invalid="ignore"):
        means: Floats = (sums / counts)[prompts]
    return means


def pair_by_influence(influence: pa.Table, settings: Preferences) -> pa.Table:
    """Return the preference table without its texts, in the order of prompts and examples.

    Pairs across prompts are in the order of `pair_across_prompts`.

    The sign of influence within the noise floor of the threshold is unknown, so such examples make no pairs; neither do rows
    that are not 'ok', nor, with a margin, rows without a standard error.

    Args:
        influence: influence table of the probing set, at least its columns PAIRED.
        settings: kind of pairs, baseline, margin and limits.
    """
    measured = influence.select(PAIRED).filter(pc.equal(influence["status"], "ok"))
    thresholds, floor = thresholds_of(measured, settings.baseline), read_influence_metadata(influence, "noise_floor")
    influences: Floats = measured["influence_student"].to_numpy()
    best, worst = _pair(measured, influences, thresholds, floor, settings)
    if settings.margin:
        errors = standard_errors(measured)
        significant = influences[best] - influences[worst] > settings.margin * np.hypot(errors[best], errors[worst])
        best, worst = best[significant], worst[significant]
    columns = ["influence_student", "influence_null_step"]
    return _pairs(measured, columns, *_limit(influences, best, worst, settings))


def standard_errors(measured: pa.Table) -> Floats:
    """Return [rows] standard errors of influence over the reference examples, nats; NaN where there is none.

    The error of a first-order or linear row has one degree of freedom, so they all get the root mean square of their errors.

    Args:
        measured: rows of an influence table with status 'ok'.
    """
    errors: Floats = measured["standard_error"].to_numpy().astype(np.float64)
    from_halves = pc.is_in(measured["estimator"], pa.array(["first_order", "linear"])).to_numpy()
    if from_halves.any():
        errors = np.where(from_halves, np.sqrt(np.mean(errors[from_halves] ** 2)), errors)
    return errors


def pair_by_utility(utility: pa.Table, settings: Preferences) -> pa.Table:
    """Return pairs made from another signal than influence (ablations of Table 2); no texts.

    With the baseline 'prompt' it is divided at the mean of each prompt, as influence is; otherwise at its median, as the
    student and the null step have no such utility.

    Args:
        utility: utility table of the probing set; rows without utility make no pairs.
        settings: kind of pairs, baseline and limits; the margin is of influence alone.
    """
    measured = utility.filter(pc.is_valid(utility["utility"]))
    values: Floats = measured["utility"].to_numpy()
    if settings.baseline == "prompt":
        thresholds = _means_of_prompts(measured["prompt_id"], values)
    else:
        thresholds = np.full(len(values), np.median(values) if len(values) else 0.0)
    best, worst = _pair(measured, values, thresholds, 0.0, settings)
    return _pairs(measured, ["utility"], *_limit(values, best, worst, settings))


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


def pair_within_prompts(
    prompt_ids: pa.ChunkedArray, values: Floats, thresholds: Floats, floor: float
) -> tuple[Positions, Positions]:
    """Pair every row above its threshold with every row of the same prompt below its threshold.

    Args:
        prompt_ids: [rows] the prompt of each row.
        values: [rows] influence or utility.
        thresholds: [rows] the threshold of each row.
        floor: rows at most this far from their threshold make no pairs.

    Returns:
        [pairs] better rows and [pairs] worse rows, by prompts in the order of their first better row.
    """
    helpful, harmful = np.flatnonzero(values > thresholds + floor), np.flatnonzero(values < thresholds - floor)
    # Number the prompts in the order of their first helpful rows.
    prompts = pc.unique(prompt_ids.take(helpful))
    numbers: Positions = pc.index_in(prompt_ids, prompts).fill_null(-1).to_numpy()
    harmful = harmful[numbers[harmful] >= 0]
    helpful, harmful = (side[np.argsort(numbers[side], kind="stable")] for side in (helpful, harmful))
    harmful_counts = np.bincount(numbers[harmful], minlength=len(prompts))  # [prompts]; `harmful` is sorted by prompt
    first_harmful = np.cumsum(harmful_counts) - harmful_counts
    pair_counts = harmful_counts[numbers[helpful]]
    best = np.repeat(helpful, pair_counts)
    offsets = np.arange(len(best)) - np.repeat(np.cumsum(pair_counts) - pair_counts, pair_counts)
    return best, harmful[first_harmful[numbers[best]] + offsets]


def pair_across_prompts(
    values: Floats, thresholds: Floats, floor: float, max_uses: int, max_pairs: int | None = None
) -> tuple[Positions, Positions]:
    """Pair rows above their threshold with rows below it, of any prompt; each row makes at most `max_uses` pairs.

    The best row is paired with the worst, the second best with the second worst, until one side has no more rows. Each
    further round pairs the side with fewer rows with the next rows of the other side; no pair occurs twice.

    The teacher is trained on a pair under the prompt of the worse row, as it is this prompt that led to a harmful example.
    Under the prompt of the better row it would learn little: there its demonstrations make the better output likely already.

    Args:
        values: [rows] influence or utility.
        thresholds: [rows] the threshold of each row, the same for all.
        floor: rows at most this far from their threshold make no pairs.
        max_uses: maximum number of pairs of a row.
        max_pairs: maximum number of pairs, made from the best `max_pairs / max_uses` rows; None for no limit.

    Returns:
        [pairs] better rows and [pairs] worse rows, round by round, in each from the most extreme rows to the threshold.
    """
    helpful, harmful = np.flatnonzero(values > thresholds + floor), np.flatnonzero(values < thresholds - floor)
    helpful = helpful[np.argsort(-values[helpful], kind="stable")]
    harmful = harmful[np.argsort(values[harmful], kind="stable")]
    if max_pairs is not None:
        helpful = helpful[: -(-max_pairs // max_uses)]
    fewer, more = sorted((len(helpful), len(harmful)))
    if not fewer:
        return helpful[:0], harmful[:0]
    rounds, ranks = np.divmod(np.arange(min(max_uses, more) * fewer)[:max_pairs], fewer)
    # Shifts by `fewer` return to a row after `cycle` rounds; then start one row later.
    cycle = more // math.gcd(fewer, more)
    shifted = (ranks + rounds % cycle * fewer + rounds // cycle) % more
    best, worst = (ranks, shifted) if len(helpful) == fewer else (shifted, ranks)
    return helpful[best], harmful[worst]


def _pair(
    rows: pa.Table, values: Floats, thresholds: Floats, floor: float, settings: Preferences
) -> tuple[Positions, Positions]:
    if settings.pairs == "across_prompts":
        return pair_across_prompts(values, thresholds, floor, settings.max_uses, settings.max_pairs)
    return pair_within_prompts(rows["prompt_id"], values, thresholds, floor)


def _limit(values: Floats, best: Positions, worst: Positions, settings: Preferences) -> tuple[Positions, Positions]:
    """Return at most `max_pairs` pairs, in their order: those with the widest gaps."""
    if settings.max_pairs is None or len(best) <= settings.max_pairs:
        return best, worst
    widest = np.sort(np.argsort(values[worst] - values[best], kind="stable")[: settings.max_pairs])
    return best[widest], worst[widest]


def write_preferences(pairs: pa.Table, examples: Path, path: Path, schema: pa.Schema) -> None:
    """Write a preference table: pairs with the texts of their examples, one row group at a time.

    Args:
        pairs: the table without its texts.
        examples: example table that contains the examples of all pairs. If its order is that of the pairs, it is read
            once; pairs across prompts read it once for each row group of pairs.
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
                table = pairs[group].append_column("prompt", texts["prompt"].take(worst))
                for role, rows_of_role in (("chosen", best), ("rejected", worst)):
                    table = table.append_column(role, texts["raw_output"].take(rows_of_role))
                    for name in DRAWN_TOKENS:
                        table = table.append_column(f"{role}_{name}", texts[name].take(rows_of_role))
                yield from table.select(schema.names).cast(schema).to_batches()

    write_table(pa.RecordBatchReader.from_batches(schema, add_texts()), path, schema)


def _pairs(rows: pa.Table, values: list[str], best: Positions, worst: Positions) -> pa.Table:
    """Return the table of [pairs] with `prompt_id` (of the worse row), and with `example_id` and `values` of both rows."""
    columns = {"prompt_id": rows["prompt_id"].take(worst)}
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

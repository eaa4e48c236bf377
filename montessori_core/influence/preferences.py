"""Preference pairs from influence (Eq. 3): within a prompt, every helpful example against every harmful one."""

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
"""The columns of an influence table that pairs are made from."""


def threshold_of(influence: pa.Table, baseline: str) -> float:
    """The `influence_student` that divides a set into helpful and harmful examples, nats; 'prompt' takes the median, too.

    Args:
        influence: the probing set's table.
        baseline: see `config.Preferences`.
    """
    if baseline == "null_step":
        return read_influence_metadata(influence, "null_step_influence")
    if baseline in ("median", "prompt"):
        measured = influence["influence_student"].filter(pc.equal(influence["status"], "ok"))
        return float(np.median(measured.to_numpy())) if len(measured) else 0.0
    return 0.0


def thresholds_of(influence: pa.Table, baseline: str) -> Floats:
    """[rows] The `influence_student` that each row is compared with, nats.

    'prompt' is the mean of the measured rows of the prompt, NaN without any. Not the median: of three rows, the middle one
    would be its own threshold and make no pair; and a mean divides where the widest gap is, which is known best.

    Args:
        influence: the probing set's table.
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
    """The preference table but its texts, in the order of prompts and examples.

    Influence within the noise floor of the threshold has no sign to speak of, so such examples make no pairs; neither do
    rows that are not 'ok', nor, with a margin, rows whose standard error is not known.

    Args:
        influence: of the probing examples, at least its columns PAIRED.
        settings: baseline, margin and limit.
    """
    measured = influence.select(PAIRED).filter(pc.equal(influence["status"], "ok"))
    thresholds, floor = thresholds_of(measured, settings.baseline), read_influence_metadata(influence, "noise_floor")
    best, worst = pair_up(measured, "influence_student", thresholds, floor)
    if settings.margin:
        influences, errors = measured["influence_student"].to_numpy(), standard_errors(measured)
        sure = influences[best] - influences[worst] > settings.margin * np.hypot(errors[best], errors[worst])
        best, worst = best[sure], worst[sure]
    values = ["influence_student", "influence_null_step"]
    return _pairs(measured, values, *widest_pairs(measured, "influence_student", best, worst, settings.max_pairs))


def standard_errors(measured: pa.Table) -> Floats:
    """[rows] Standard error of each influence over the reference examples, nats; NaN where it is not known.

    First-order rows have one degree of freedom each, so that all of them get their root mean square.

    Args:
        measured: rows of an influence table that are 'ok'.
    """
    errors: Floats = measured["standard_error"].to_numpy().astype(np.float64)
    first_order = pc.equal(measured["estimator"], "first_order").to_numpy()
    if first_order.any():
        errors = np.where(first_order, np.sqrt(np.mean(errors[first_order] ** 2)), errors)
    return errors


def pair_by_utility(utility: pa.Table, max_pairs: int | None) -> pa.Table:
    """Pairs from another signal than influence (the ablations of Table 2), divided at its median; without texts.

    Args:
        utility: of the probing examples; rows without one make no pairs.
        max_pairs: keep only so many, those with the widest gap; None keeps all.
    """
    known = utility.filter(pc.is_valid(utility["utility"]))
    threshold = float(np.median(known["utility"].to_numpy())) if known.num_rows else 0.0
    best, worst = pair_up(known, "utility", np.full(known.num_rows, threshold), 0.0)
    return _pairs(known, ["utility"], *widest_pairs(known, "utility", best, worst, max_pairs))


def pair_extremes(utility: pa.Table) -> pa.Table:
    """One pair for each prompt whose outputs differ in utility: the best and the worst (Self-Reward); without texts.

    Args:
        utility: of examples of which several share a prompt; rows without one make no pairs.
    """
    known = utility.filter(pc.is_valid(utility["utility"]))
    values = known["utility"].to_pylist()
    of_prompts: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(known["prompt_id"].to_pylist()):
        of_prompts[prompt].append(row)
    extremes = [[choose(rows, key=values.__getitem__) for choose in (max, min)] for rows in of_prompts.values()]
    differing = [pair for pair in extremes if values[pair[0]] > values[pair[1]]]
    return _pairs(known, ["utility"], *np.array(differing, int).reshape(-1, 2).T)


def best_of_each_prompt(examples: pa.Table, utility: pa.Table) -> pa.Table:
    """Of each prompt the example of the highest utility, the first of equals; prompts without any utility have none."""
    best: dict[str, dict[str, Any]] = {}
    for row in utility.filter(pc.is_valid(utility["utility"])).to_pylist():
        if row["prompt_id"] not in best or row["utility"] > best[row["prompt_id"]]["utility"]:
            best[row["prompt_id"]] = row
    return examples.filter(pc.is_in(examples["example_id"], pa.array([row["example_id"] for row in best.values()])))


def pair_up(rows: pa.Table, utility: str, thresholds: Floats, floor: float) -> tuple[Positions, Positions]:
    """Within each prompt, every row above its threshold with every row below.

    Args:
        rows: examples with their `prompt_id`.
        utility: the column that is compared.
        thresholds: [rows] what divides better from worse.
        floor: rows this near to their threshold belong to neither.

    Returns:
        [pairs] the better row of each, [pairs] the worse; by prompts in the order of their first better row.
    """
    values: Floats = rows[utility].to_numpy()
    helpful, harmful = np.flatnonzero(values > thresholds + floor), np.flatnonzero(values < thresholds - floor)
    # Prompts as numbers, in the order in which the first helpful row of each comes.
    prompts = pc.unique(rows["prompt_id"].take(helpful))
    numbers: Positions = pc.index_in(rows["prompt_id"], prompts).fill_null(-1).to_numpy()
    harmful = harmful[numbers[harmful] >= 0]
    helpful, harmful = (some[np.argsort(numbers[some], kind="stable")] for some in (helpful, harmful))
    rivals = np.bincount(numbers[harmful], minlength=len(prompts))  # [prompts] harmful rows of each, neighbours by now
    first_rival = np.cumsum(rivals) - rivals
    of_helpful = rivals[numbers[helpful]]
    best = np.repeat(helpful, of_helpful)
    which = np.arange(len(best)) - np.repeat(np.cumsum(of_helpful) - of_helpful, of_helpful)
    return best, harmful[first_rival[numbers[best]] + which]


def widest_pairs(
    rows: pa.Table, utility: str, best: Positions, worst: Positions, max_pairs: int | None
) -> tuple[Positions, Positions]:
    """The pairs with the widest gaps in a column, in their order; all of them without a limit."""
    if max_pairs is None or len(best) <= max_pairs:
        return best, worst
    values: Floats = rows[utility].to_numpy()
    widest = np.sort(np.argsort(values[worst] - values[best], kind="stable")[:max_pairs])
    return best[widest], worst[widest]


def write_preferences(pairs: pa.Table, examples: Path, path: Path, schema: pa.Schema) -> None:
    """Write a preference table: pairs with the texts of their examples, which are never all in memory.

    Args:
        pairs: the table but its texts.
        examples: an example table with those of all pairs. Read once if it has the order of the pairs, else oftener.
        path: of the table.
        schema: `PREFERENCES` or `UTILITY_PREFERENCES`.

    Raises:
        DataError: an example is missing.
    """
    known = read_table(examples, EXAMPLES, ["example_id"])["example_id"]
    rows = [pc.index_in(pairs[column], known) for column in ("chosen_id", "rejected_id")]
    if any(found.null_count for found in rows):
        raise DataError(f"{examples}: lacks examples that were paired; it is not the table that was measured")
    chosen, rejected = (found.to_numpy() for found in rows)

    def with_texts() -> Iterator[pa.RecordBatch]:
        with open_parquet(examples) as file:
            for start in range(0, pairs.num_rows, ROW_GROUP):
                some = slice(start, start + ROW_GROUP)
                wanted, places = np.unique(np.stack([chosen[some], rejected[some]]), return_inverse=True)
                texts = pa.concat_tables(
                    take_rows(file, ["prompt", "raw_output", *DRAWN_TOKENS], wanted)
                ).combine_chunks()
                best, worst = places.reshape(2, -1)
                table = pairs[some].append_column("prompt", texts["prompt"].take(best))
                for role, rows_of_role in (("chosen", best), ("rejected", worst)):
                    table = table.append_column(role, texts["raw_output"].take(rows_of_role))
                    for name in DRAWN_TOKENS:
                        table = table.append_column(f"{role}_{name}", texts[name].take(rows_of_role))
                yield from table.select(schema.names).cast(schema).to_batches()

    write_table(pa.RecordBatchReader.from_batches(schema, with_texts()), path, schema)


def _pairs(rows: pa.Table, values: list[str], best: Positions, worst: Positions) -> pa.Table:
    """[pairs] `prompt_id`, and `example_id` and values of both."""
    columns = {"prompt_id": rows["prompt_id"].take(best)}
    for role, some in (("chosen", best), ("rejected", worst)):
        columns |= {
            f"{role}_{name.removeprefix('example_')}": rows[name].take(some) for name in ["example_id", *values]
        }
    return pa.table(columns)


def upper_half(ids: Sequence[str], values: Sequence[float]) -> list[str]:
    """The ids of the larger half of the values (rounded up), highest first; of equals, those that come first."""
    order = sorted(range(len(ids)), key=lambda index: (-values[index], index))
    return [ids[index] for index in order[: -(-len(ids) // 2)]]

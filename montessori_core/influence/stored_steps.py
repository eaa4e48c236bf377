"""Influence from steps that were projected and kept; see `projections`.

An estimate is that of first order but for the error of the projection. Works without torch, for the driver.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core.data.tables import INFLUENCE, REFERENCE_PROJECTION, STEPS, read_table
from montessori_core.errors import DataError
from montessori_core.influence.preferences import Floats
from montessori_core.influence.table import error_by_halves, schema_with_metadata

FP16 = np.dtype("<f2")
"""Type of the numbers of a kept projection."""


def estimate_from_steps(parts: Sequence[Path], reference: Path) -> pa.RecordBatchReader:
    """Return the influence table of examples whose steps are kept; a part is read when its rows are needed.

    Args:
        parts: tables of `step_jobs.open_steps`.
        reference: table of `step_jobs.open_reference_projection`.

    Raises:
        DataError: a table is damaged, or the two are of different projections.
    """
    (row,) = read_table(reference, REFERENCE_PROJECTION).to_pylist()
    notes, gradients = dict(row["notes"]), np.array([row["full"], row["half"]])
    sizes = row["references"] // 2, row["references"] - row["references"] // 2
    schema = schema_with_metadata(notes)

    def batches() -> Iterator[pa.RecordBatch]:
        for part in parts:
            steps = read_table(part, STEPS)
            against_null_step, first_half = _inner_products(steps, gradients, part)
            errors = [
                error_by_halves(first, whole - first, sizes)
                for whole, first in zip(against_null_step, first_half, strict=True)
            ]
            unmeasured = pc.not_equal(steps["status"], "ok").to_numpy()
            count = len(steps)
            columns = {name: steps[name] for name in STEPS.names if name in INFLUENCE.names} | {
                "influence_student": pa.array(against_null_step + notes["null_step_influence"], mask=unmeasured),
                "influence_null_step": pa.array(against_null_step, mask=unmeasured),
                "standard_error": pa.array(np.array(errors, np.float64), mask=unmeasured),
                "reference_tokens": pa.repeat(0, count),
                "estimator": pa.repeat("stored_steps", count),
                "audited": pa.repeat(False, count),
                "first_order_null_step": pa.nulls(count, pa.float64()),
            }
            yield from pa.table({name: columns[name] for name in schema.names}).cast(schema).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def _inner_products(steps: pa.Table, gradients: Floats, part: Path) -> Floats:
    """Return [gradients, rows] by how much each step lowers the reference loss, to first order; zero if it was not kept.

    Args:
        steps: a table of steps.
        gradients: [gradients, numbers] projections.
        part: of the table, for errors.
    """
    products = np.zeros((len(gradients), len(steps)))
    kept = pc.equal(steps["status"], "ok").to_numpy()
    numbers = [np.frombuffer(content, FP16) for content in steps["numbers"].filter(kept).to_pylist()]
    found = {len(content) for content in numbers} - {gradients.shape[1]}
    if found:
        raise DataError(
            f"{part}: steps of {found.pop()} numbers, but the reference set has {gradients.shape[1]}; they were projected by "
            "another version: remove the store, and measure again"
        )
    if numbers:
        scales = steps["scale"].filter(kept).to_numpy()
        products[:, kept] = -scales * (gradients @ np.stack(numbers).astype(np.float64).T)
    return products

"""The joined influence table: one row an example, and what its workers noted about the student."""

import math

import pyarrow as pa
import pyarrow.compute as pc

from montessori_core.schema import INFLUENCE

NOTES = ("noise_floor", "null_step_influence", "student_loss", "reference_tokens")


def note_influence(table: pa.Table, notes: dict[str, float]) -> pa.Table:
    """Record numbers of the student with a table: all of NOTES, nats."""
    written = {f"montessori.{name}".encode(): repr(notes[name]).encode() for name in NOTES}
    return table.replace_schema_metadata({**INFLUENCE.metadata, **written})


def influence_note(table: pa.Table, name: str) -> float:
    """A number recorded with an influence table, see NOTES."""
    return float(table.schema.metadata[f"montessori.{name}".encode()])


def influence_notes(table: pa.Table) -> dict[str, float]:
    """All numbers recorded with an influence table."""
    return {name: influence_note(table, name) for name in NOTES}


def join_influence(parts: list[pa.Table]) -> pa.Table:
    """One table from the shards' tables, in their order; of each note, the largest that any worker saw."""
    plain = [part.replace_schema_metadata(INFLUENCE.metadata) for part in parts]
    noted = [influence_notes(part) for part in parts]
    notes = {name: max(part[name] for part in noted) for name in NOTES}
    return note_influence(pa.concat_tables(plain).combine_chunks(), notes)


def summarize_influence(table: pa.Table, threshold: float) -> dict[str, float | int]:
    """What a person wants to know of a table; shares are of the rows that could be measured.

    Args:
        table: an influence table.
        threshold: the `influence_student` above which an example counts as helpful.
    """
    measured = table.filter(pc.equal(table["status"], "ok"))
    student = measured["influence_student"].to_numpy()
    null_step = measured["influence_null_step"].to_numpy()

    def share(helpful: int) -> float:
        return helpful / len(student) if len(student) else math.nan

    return {
        "examples": table.num_rows,
        "measured": len(student),
        "excluded": table.num_rows - len(student),
        "threshold": threshold,
        "share_positive": share(int((student > threshold).sum())),
        "share_positive_student": share(int((student > 0).sum())),
        "share_positive_null_step": share(int((null_step > 0).sum())),
        "mean_influence_student": float(student.mean()) if len(student) else math.nan,
        **influence_notes(table),
    }

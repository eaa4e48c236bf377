"""The influence table: one row per example, and numbers of the student as metadata."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core.data.sources import Task
from montessori_core.data.tables import INFLUENCE, INFLUENCE_BY_TARGET, read_table

NOTES = ("noise_floor", "null_step_influence", "student_loss", "reference_tokens")
"""Numbers of the student that are recorded with a table: nats, and tokens of the reference set."""
CUT_REFERENCES = "reference_truncated"
"""The number of reference examples whose end is cut; recorded if there are any: other tables keep their bytes."""
SUMMARIZED = (
    "status",
    "truncated",
    "influence_student",
    "influence_null_step",
    "gradient_norm",
    "dominated_share",
    "standard_error",
)
"""The columns that a summary reads."""

_EXAMPLES = b"montessori.examples"
_DOMINATED = 0.5
"""Median `dominated_share` above which a table has a warning."""


def schema_with_metadata(notes: dict[str, float]) -> pa.Schema:
    """Return the schema of a table with numbers of the student: all of NOTES, and CUT_REFERENCES."""
    return INFLUENCE.with_metadata({**INFLUENCE.metadata, **_written(notes, "montessori.")})


def schema_by_target(notes: Sequence[dict[str, float]]) -> pa.Schema:
    """Return the schema of a table on several reference sets, with the numbers of each, as `schema_with_metadata`."""
    metadata = dict(INFLUENCE_BY_TARGET.metadata)
    for number, of_target in enumerate(notes):
        metadata |= _written(of_target, f"montessori.{number}.")
    return INFLUENCE_BY_TARGET.with_metadata(metadata)


def _written(notes: Mapping[str, float], prefix: str) -> dict[bytes, bytes]:
    names = [*NOTES, CUT_REFERENCES] if notes.get(CUT_REFERENCES) else NOTES
    return {f"{prefix}{name}".encode(): repr(notes[name]).encode() for name in names}


def _read(metadata: Mapping[bytes, bytes], prefix: str) -> dict[str, float]:
    """Return the numbers that `_written` wrote."""
    cut = float(metadata.get(f"{prefix}{CUT_REFERENCES}".encode(), 0.0))
    return {**{name: float(metadata[f"{prefix}{name}".encode()]) for name in NOTES}, CUT_REFERENCES: cut}


def _largest(noted: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: max(of_part[name] for of_part in noted) for name in (*NOTES, CUT_REFERENCES)}


class ExamplesHash:
    """Hash of the ids and texts of examples, whatever their order."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        self._sum = 0
        for task in tasks:
            self.add(task)

    def add(self, task: Task) -> None:
        turns = [(turn["role"], turn["content"]) for turn in task.before]
        content = json.dumps([task.example_id, turns, task.instruction, task.response]).encode()
        self._sum += int.from_bytes(blake2b(content, digest_size=16).digest())

    def __str__(self) -> str:
        return f"{self._sum % 2**128:032x}"


def with_examples(table: pa.RecordBatchReader, examples: ExamplesHash) -> pa.RecordBatchReader:
    """Return the rows of an influence table, with the hash of its examples as metadata."""
    schema = table.schema.with_metadata({**table.schema.metadata, _EXAMPLES: str(examples).encode()})
    return pa.RecordBatchReader.from_batches(schema, (batch.cast(schema) for batch in table))


def hash_of_examples(schema: pa.Schema) -> str | None:
    """Return the hash that `with_examples` wrote; None: an earlier version wrote the table, or a run."""
    recorded = schema.metadata.get(_EXAMPLES)
    return recorded.decode(errors="replace") if recorded else None


def read_influence_metadata(table: pa.Table, name: str) -> float:
    """Return a number recorded with an influence table, see NOTES."""
    return float(table.schema.metadata[f"montessori.{name}".encode()])


def read_influence_metadata_of(table: pa.Table) -> dict[str, float]:
    """Return all numbers recorded with an influence table."""
    return _read(table.schema.metadata, "montessori.")


def join_influence(parts: Sequence[Path]) -> pa.RecordBatchReader:
    """Join the shards' tables, in their order; a part is read when its rows are needed.

    Of each number in the metadata, the table has the largest of all parts.

    Raises:
        DataError: a part is missing, damaged, or another table.
    """
    noted = [read_influence_metadata_of(read_table(part, INFLUENCE, columns=[])) for part in parts]
    batches = (batch for part in parts for batch in read_table(part, INFLUENCE).to_batches())
    return pa.RecordBatchReader.from_batches(schema_with_metadata(_largest(noted)), batches)


def join_target(parts: Sequence[Path], target: int) -> pa.RecordBatchReader:
    """Join the rows of one reference set from shards' tables on several; see `join_influence`."""
    noted = [read_table(part, INFLUENCE_BY_TARGET, columns=[]).schema.metadata for part in parts]
    schema = schema_with_metadata(_largest([_read(metadata, f"montessori.{target}.") for metadata in noted]))

    def batches() -> Iterator[pa.RecordBatch]:
        for part in parts:
            table = read_table(part, INFLUENCE_BY_TARGET)
            own = table.filter(pc.equal(table["target"], target)).drop_columns(["target"])
            yield from own.cast(schema).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def read_measured(path: Path) -> pa.Table:
    """Read the rows of an influence table whose influence could be measured.

    Raises:
        DataError: the table cannot be read.
    """
    table = read_table(path, INFLUENCE)
    return table.filter(pc.equal(table["status"], "ok"))


def summarize_influence(table: pa.Table, threshold: float) -> dict[str, float | int]:
    """Summarize a table; shares are of the rows that could be measured.

    Args:
        table: an influence table, or its columns SUMMARIZED.
        threshold: the `influence_student` above which an example counts as helpful.
    """
    measured = pc.equal(table["status"], "ok")
    student, null_step, norms, dominated, errors = (table[name].filter(measured).to_numpy() for name in SUMMARIZED[2:])

    def share(helpful: int) -> float:
        return helpful / len(student) if len(student) else math.nan

    return {
        "examples": table.num_rows,
        "measured": len(student),
        "excluded": table.num_rows - len(student),
        "truncated": pc.sum(table["truncated"]).as_py() or 0,
        "threshold": threshold,
        "share_positive": share(int((student > threshold).sum())),
        "share_positive_student": share(int((student > 0).sum())),
        "share_positive_null_step": share(int((null_step > 0).sum())),
        "mean_influence_student": float(student.mean()) if len(student) else math.nan,
        "median_gradient_norm": float(np.median(norms)) if len(student) else math.nan,
        "standard_error": float(np.sqrt(np.mean(errors.astype(np.float64) ** 2))) if len(student) else math.nan,
        "median_dominated_share": float(np.median(dominated)) if len(student) else math.nan,
        **read_influence_metadata_of(table),
    }


def error_by_halves(first: float, second: float, sizes: tuple[int, int]) -> float:
    """Return the standard error of first + second, the contributions of two random halves of the reference set.

    It has one degree of freedom; its square is unbiased. NaN if a half is empty.

    Args:
        first, second: contributions of the halves.
        sizes: numbers of examples in the halves.
    """
    if 0 in sizes:
        return math.nan
    weight = math.sqrt(sizes[1] / sizes[0])
    return abs(first * weight - second / weight)


@dataclass(frozen=True)
class LengthLine:
    """What the number of response tokens explains of the influence of a set: a line.

    Attributes:
        per_token: nats per response token.
        tokens: mean response tokens of the set.
    """

    per_token: float
    tokens: float

    @staticmethod
    def fit(values: npt.NDArray[np.float64], tokens: npt.NDArray[np.float64]) -> "LengthLine":
        """Fit the line of [examples] influence over [examples] response tokens; flat if all have the same length."""
        mean = float(tokens.mean()) if len(tokens) else 0.0
        deviations = tokens - mean
        spread = float(deviations @ deviations)
        return LengthLine(float(deviations @ values) / spread if spread else 0.0, mean)

    def take_out(self, values: npt.NDArray[np.float64], tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the influence that examples of this set, or of another one, would have at the mean length of this set."""
        return values - self.per_token * (tokens - self.tokens)


def describe_influence(summary: Mapping[str, float | int], baseline: str) -> list[tuple[str, str]]:
    """Return a summary in words: names and values.

    Args:
        summary: see `summarize_influence`.
        baseline: `preferences.baseline`, which decides the threshold.
    """
    lines = [
        ("examples measured", f"{summary['measured']} of {summary['examples']}"),
        ("student's reference loss", f"{summary['student_loss']:.4f} nats per token"),
    ]
    if summary["measured"]:
        lines += [
            (share_label(baseline), f"{summary['share_positive']:.0%}"),
            ("mean influence", f"{summary['mean_influence_student']:.3g} nats per token"),
        ]
    lines += [
        ("influence of momentum alone (the null step)", f"{summary['null_step_influence']:.3g} nats per token"),
        ("noise floor", f"{summary['noise_floor']:.3g} nats per token"),
        ("standard error over the reference examples", f"{summary['standard_error']:.3g} nats per token"),
    ]
    if math.isfinite(summary["median_gradient_norm"]):  # linear forms no gradient
        dominated = f"{summary['median_dominated_share']:.0%} of the coordinates"
        lines += [
            ("gradient norm, median", f"{summary['median_gradient_norm']:.3g}"),
            ("dominated by the example's gradient, median", dominated),
        ]
    return lines


def influence_warnings(summary: Mapping[str, float | int]) -> list[str]:
    """Return warnings of cut examples, and of examples whose own gradients decide most of AdamW's denominator.

    Args:
        summary: see `summarize_influence`.
    """
    return [*cut_warnings(summary), *_domination_warnings(summary["median_dominated_share"])]


def share_label(baseline: str) -> str:
    """Return what `share_positive` of a summary is the share of."""
    if baseline == "prompt":
        return "share above the median (of pairs, the mean of the prompt decides)"
    return f"share that helps (baseline: {baseline})"


def cut_warnings(summary: Mapping[str, float | int]) -> list[str]:
    """Return a warning if examples or reference examples are cut; `summary` is that of `summarize_influence`."""
    cut, references = summary["truncated"], int(summary[CUT_REFERENCES])
    parts = [f"{cut:,} of {summary['examples']:,} examples"] if cut else []
    parts += [f"{references:,} reference example{'s'[: references > 1]}"] if references else []
    if not parts:
        return []
    return [
        f"the end of {' and of '.join(parts)} is cut: they have more tokens than "
        "student.max_length (montessori influence, validate: --max-length); raise it, or shorten them"
    ]


def _domination_warnings(share: float) -> list[str]:
    if not share > _DOMINATED:
        return []
    return [
        f"the example's own gradient decides AdamW's denominator in {share:.0%} of the coordinates (median over examples), "
        "so that it damps the momentum whatever the example says, and influence may follow the gradient's size and the "
        "response's length; measure on a warm student (montessori influence: --warm-state), after more steps of warm-up, or "
        "lower the example weight (1/8: the authors' code on 8 GPUs, 1/32: a batch of 32)"
    ]

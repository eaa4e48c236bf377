"""Texts of the report: preference pairs (Table 3), examples, rejected candidates. Models wrote them: untrusted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core import formatting
from montessori_core.formatting import Unit
from montessori_report.html import visible
from montessori_report.run_data import IterationData, RunData, SynthesisData

PAIRS_SHOWN = 20
EXAMPLES_SHOWN = 10_000
REJECTIONS_SHOWN = 30
_BASELINES = {"null_step": "null step", "student": "student"}
_MEASURED = (
    *("example_id", "status", "tokens", "truncated"),
    *("influence_student", "influence_null_step", "standard_error"),
)
"""Columns of influence tables that are shown."""


def pairs_of(iteration: IterationData) -> list[dict[str, Any]]:
    """Return the pairs with the largest influence gap, each side with the texts of its example."""
    table = iteration.preferences
    if table is None:
        return []
    influences = (table[f"{side}_influence_student"].to_numpy() for side in ("chosen", "rejected"))
    gaps = np.subtract(*influences)
    widest = np.argsort(-gaps, kind="stable")[:PAIRS_SHOWN]
    rows = table.take(widest).to_pylist()
    texts = _texts(iteration.probing.examples, [row[f"{side}_id"] for row in rows for side in ("chosen", "rejected")])
    return [
        {
            "prompt_id": row["prompt_id"],
            "gap": gap,
            "sides": [
                {
                    "name": name,
                    "id": row[f"{name}_id"],
                    "instruction": texts.get(row[f"{name}_id"], {}).get("instruction", row[name]),
                    "response": texts.get(row[f"{name}_id"], {}).get("response"),
                    "influence": {of: row[f"{name}_influence_{baseline}"] for baseline, of in _BASELINES.items()},
                }
                for name in ("chosen", "rejected")
            ],
        }
        for gap, row in zip(gaps[widest].tolist(), rows, strict=True)
    ]


@dataclass(frozen=True)
class Cell:
    """A cell of the table of examples: text, remark, and sort key (None sorts last)."""

    text: str
    remark: str = ""
    key: float | str | None = None


@dataclass(frozen=True)
class Example:
    """A row of the table of examples."""

    instruction: str
    response: str | None
    summary: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Examples:
    """The table of examples.

    Attributes:
        columns: column titles; the first column has the texts.
        rows: at most `EXAMPLES_SHOWN` examples.
        total: number of examples, including those not shown.
        per_page: rows per page of the table; the first page is in the HTML.
    """

    columns: Sequence[str]
    rows: Sequence[Example]
    total: int
    per_page: int = 50

    @property
    def script_rows(self) -> list[list[Any]]:
        """The rows as data for script.js: texts, then each cell as text, remark and sort key."""
        return [
            [row.instruction, row.response, row.summary, [[cell.text, cell.remark, cell.key] for cell in row.cells]]
            for row in self.rows
        ]


def examples_of(run: RunData, unit: Unit) -> Examples:
    """Return the examples of the probing sets, with influence if it has been measured."""
    several = len(run.iterations) > 1
    rows: list[Example] = []
    total = 0
    for iteration in run.iterations:
        records, available = _records(iteration, EXAMPLES_SHOWN - len(rows))
        total += available
        number = [Cell(str(iteration.number), key=iteration.number)] if several else []
        rows += [
            Example(
                visible(record.get("instruction") or record["example_id"]),
                visible(record["response"]) if "response" in record else None,
                "Response" if record.get("response_finished", True) else "Response, cut at the token limit",
                [*number, *_cells(record, unit)],
            )
            for record in records
        ]
    columns = ["Against null step", "Against student", "Tokens", "Status"]
    return Examples(["Instruction", *["Iteration"] * several, *columns], rows, total)


def _records(iteration: IterationData, most: int) -> tuple[list[dict[str, Any]], int]:
    """Return at most `most` examples of a probing set, with influence if it has been measured, and how many there are."""
    examples = iteration.probing.examples
    if iteration.influence is None or not iteration.influence.table.num_rows:
        if examples is None:
            return [], 0
        return examples.slice(0, most).to_pylist(), examples.num_rows
    table = iteration.influence.table
    measured = table.select(_MEASURED).slice(0, most).to_pylist()
    texts = _texts(examples, [row["example_id"] for row in measured])
    return [texts.get(row["example_id"], {}) | row for row in measured], table.num_rows


def _cells(record: dict[str, Any], unit: Unit) -> list[Cell]:
    def influence(name: str) -> Cell:
        value, error = record.get(f"influence_{name}"), record.get("standard_error") if name == "null_step" else None
        remark = f"± {unit.size(error)}" if formatting.is_finite(error) else ""
        return Cell(unit.text(value), remark, value if formatting.is_finite(value) else None)

    tokens, status = record.get("tokens"), record.get("status", "not measured").replace("_", " ")
    return [
        influence("null_step"),
        influence("student"),
        Cell(formatting.count(tokens), "truncated" if record.get("truncated") else "", tokens),
        Cell(status, key=status),
    ]


def rejections_of(sets: Sequence[SynthesisData]) -> dict[str, Any]:
    """Return rejected candidates by reason, spread evenly so that rare reasons are shown."""
    totals: Counter[str] = Counter()
    by_reason: dict[str, list[dict[str, str]]] = {}
    for part in sets:
        if part.instructions is None:
            continue
        rejected = part.instructions.filter(pc.is_valid(part.instructions["rejection"]))
        for reason in pc.unique(rejected["rejection"]).to_pylist():
            candidates = rejected.filter(pc.equal(rejected["rejection"], reason))
            totals[reason] += candidates.num_rows
            shown = by_reason.setdefault(reason, [])
            shown += [
                {"set": part.label, "text": row["instruction"] or row["raw_output"]}
                for row in candidates.slice(0, REJECTIONS_SHOWN - len(shown)).to_pylist()
            ]
    numbers = _rows_each([len(rows) for rows in by_reason.values()])
    return {
        "total": totals.total(),
        "shown": sum(numbers),
        "reasons": [
            (reason, totals[reason], rows[:number])
            for (reason, rows), number in zip(by_reason.items(), numbers, strict=True)
        ],
    }


def _rows_each(available: Sequence[int]) -> list[int]:
    """Return the number of rows to show of each group, as even as possible, `REJECTIONS_SHOWN` together."""
    taken = [0] * len(available)
    for turn in range(max(available, default=0)):
        for group, number in enumerate(available):
            if number > turn and sum(taken) < REJECTIONS_SHOWN:
                taken[group] += 1
    return taken


def _texts(examples: pa.Table | None, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the texts of some examples, by their ids."""
    if examples is None:
        return {}
    wanted = pc.is_in(examples["example_id"], pa.array(ids, pa.string()))
    return {row["example_id"]: row for row in examples.filter(wanted).to_pylist()}

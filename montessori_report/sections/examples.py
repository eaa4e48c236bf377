"""Texts of the report: preference pairs (Table 3), examples, rejected candidates. Models wrote them: untrusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from montessori_core import formatting
from montessori_core.formatting import Unit
from montessori_report.html import visible
from montessori_report.run_data import IterationData, RunData, SynthesisData

PAIRS_SHOWN = 20
EXAMPLES_SHOWN = 10_000
REJECTIONS_SHOWN = 30
_BASELINES = {"null_step": "null step", "student": "student"}


def pairs_of(iteration: IterationData) -> list[dict[str, Any]]:
    """Return the pairs with the largest influence gap, each side with the texts of its example."""
    texts = _by_id(iteration.probing.examples)
    gaps = [
        (row["chosen_influence_student"] - row["rejected_influence_student"], row)
        for row in _rows(iteration.preferences)
    ]
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
        for gap, row in sorted(gaps, key=lambda pair: -pair[0])[:PAIRS_SHOWN]
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
        texts = _by_id(iteration.probing.examples)
        measured = iteration.influence.table.to_pylist() if iteration.influence else []
        records = [texts.get(row["example_id"], {}) | row for row in measured] or list(texts.values())
        total += len(records)
        number = [Cell(str(iteration.number), key=iteration.number)] if several else []
        rows += [
            Example(
                visible(record.get("instruction") or record["example_id"]),
                visible(record["response"]) if "response" in record else None,
                "Response" if record.get("response_finished", True) else "Response, cut at the token limit",
                [*number, *_cells(record, unit)],
            )
            for record in records[: EXAMPLES_SHOWN - len(rows)]
        ]
    columns = ["Against null step", "Against student", "Tokens", "Status"]
    return Examples(["Instruction", *["Iteration"] * several, *columns], rows, total)


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
    by_reason: dict[str, list[dict[str, str]]] = {}
    for part in sets:
        for row in _rows(part.instructions):
            if row["rejection"] is not None:
                text = row["instruction"] or row["raw_output"]
                by_reason.setdefault(row["rejection"], []).append({"set": part.label, "text": text})
    numbers = _rows_each([len(rows) for rows in by_reason.values()])
    return {
        "total": sum(map(len, by_reason.values())),
        "shown": sum(numbers),
        "reasons": [
            (reason, len(rows), rows[:number])
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


def _rows(table: pa.Table | None) -> list[dict[str, Any]]:
    return table.to_pylist() if table is not None else []


def _by_id(examples: pa.Table | None) -> dict[str, dict[str, Any]]:
    return {row["example_id"]: row for row in _rows(examples)}

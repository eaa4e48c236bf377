"""Write an export: a folder with a data file and its card, which `datasets.load_dataset` reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from montessori_core.data.cards import CARD
from montessori_core.errors import UserError
from montessori_core.export.card import data_card
from montessori_core.export.formats import FORMATS, Format
from montessori_core.export.jsonl import json_line
from montessori_core.export.sets import RunSet
from montessori_core.files import commit, refuse_existing


@dataclass(frozen=True)
class Exported:
    """The counts of a written export.

    Attributes:
        rows: number of rows.
        unfinished: those of them whose response was cut at the token limit.
        left_out: rows that were left out for that reason.
    """

    rows: int
    unfinished: int
    left_out: int


def format_named(name: str, data: RunSet) -> Format:
    """Return a format that can hold a set.

    Raises:
        UserError: there is no such format, or it cannot hold the set.
    """
    if name not in FORMATS:
        raise UserError(f"--to {name}: no such format; give one of {', '.join(FORMATS)}")
    if data.name not in FORMATS[name].sets:
        able = [form.name for form in FORMATS.values() if data.name in form.sets]
        raise UserError(
            f"--to {name} has no place for {data.title}: prompts have the teacher's chat template already; give "
            f"{' or '.join(able)}"
        )
    return FORMATS[name]


def write_export(data: RunSet, form: Format, output: Path, finished_only: bool = False) -> Exported:
    """Write a set of a run to a new folder.

    Args:
        data: the set.
        form: see `format_named`.
        output: the folder.
        finished_only: leave out examples whose response was cut at the token limit.

    Raises:
        UserError: the folder exists; nothing is overwritten.
        DataError: a table of the run is missing or damaged.
    """
    refuse_existing(output, "folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with commit(output) as folder:
        file = Path("data") / f"train{form.suffix}"
        (folder / "data").mkdir(parents=True)
        counts = write_rows(data, form, folder / file, finished_only)
        card = data_card(data, form, file.as_posix(), counts.rows, counts.unfinished, counts.left_out)
        (folder / CARD).write_text(card, encoding="utf-8")
        refuse_existing(output, "folder")
    return counts


def write_rows(data: RunSet, form: Format, path: Path, finished_only: bool = False) -> Exported:
    """Write the rows of a set to a file; see `write_export`."""
    tables = _Tables(data, finished_only)
    write = _write_parquet if form.suffix == ".parquet" else _write_jsonl
    write(tables, form, form.schema(data.schema), path)
    return Exported(tables.rows, tables.unfinished, tables.left_out)


class _Tables:
    """The tables of a set, counted as they are read."""

    def __init__(self, data: RunSet, finished_only: bool) -> None:
        self._data, self._finished_only = data, finished_only
        self.rows = self.unfinished = self.left_out = 0

    def __iter__(self) -> Iterator[pa.Table]:
        for table in self._data.tables():
            if "response_finished" in table.column_names:
                unfinished = pc.sum(pc.invert(table["response_finished"])).as_py() or 0
                if self._finished_only:
                    table = table.filter(table["response_finished"])
                    self.left_out += unfinished
                else:
                    self.unfinished += unfinished
            self.rows += table.num_rows
            yield table


def _write_jsonl(tables: _Tables, form: Format, schema: pa.Schema, path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for table in tables:
            for row in form.rows(table):
                stream.write(json_line({name: row[name] for name in schema.names}))


def _write_parquet(tables: _Tables, form: Format, schema: pa.Schema, path: Path) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table.select(schema.names).cast(schema))

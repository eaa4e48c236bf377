"""Columns of a user's examples that hold no texts, such as a source or a licence: they are passed on to a selection."""

from collections.abc import Iterable
from itertools import islice

import pyarrow as pa

from montessori_core.config import DataSource
from montessori_core.data.formats import CONVERSATIONS
from montessori_core.program import Row

_READ = {"instruction", "input", "output", "prompt", "completion", "system", "history", *CONVERSATIONS}
_CHUNK = 1024  # rows


def text_columns(source: DataSource) -> set[str]:
    """Return the columns that texts are read from, in any format: `montessori train` would read them again."""
    named = (source.instruction_field, source.input_field, source.output_field, source.conversation_field)
    return _READ | set(filter(None, named))


def schema_of_rows(rows: Iterable[Row]) -> pa.Schema:
    """Return the columns of rows, with types that hold their values; null where no type does.

    A row may lack columns. A few rows are in memory at a time.
    """
    types: dict[str, pa.DataType] = {}
    mixed: set[str] = set()
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        for name in dict.fromkeys(name for row in chunk for name in row):
            try:
                found = pa.array([row.get(name) for row in chunk]).type
                fields = [pa.field(name, kind) for kind in (types.get(name, pa.null()), found)]
                unified = pa.unify_schemas([pa.schema([field]) for field in fields], promote_options="permissive")
                types[name] = unified.field(name).type
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                mixed.add(name)
    return pa.schema(
        [pa.field(name, pa.null() if name in mixed else types[name]) for name in types | dict.fromkeys(mixed)]
    )

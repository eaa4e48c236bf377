"""Columns of a user's examples that hold no texts, such as a source or a licence: they are passed on to a selection."""

import logging
from collections.abc import Iterable
from itertools import islice

import pyarrow as pa

from montessori_core.config import DataSource
from montessori_core.data.formats import CONVERSATIONS
from montessori_core.formatting import first_names
from montessori_core.program import Row

log = logging.getLogger(__name__)

_READ = {"instruction", "input", "output", "prompt", "completion", "system", "history", *CONVERSATIONS}
_CHUNK = 1024  # rows


def text_columns(source: DataSource) -> set[str]:
    """Return the columns that texts are read from, in any format: `montessori train` would read them again."""
    named = (source.instruction_field, source.input_field, source.output_field, source.conversation_field)
    return _READ | set(filter(None, named))


def schema_of_rows(rows: Iterable[Row]) -> pa.Schema:
    """Return the columns of rows, with types that hold their values; columns that no type holds are left out.

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
    mixed |= {name for name, kind in types.items() if _has_empty_struct(kind)}
    if mixed:
        log.warning(
            "columns that are not passed on, since their values have no common type: %s", first_names(sorted(mixed))
        )
    return pa.schema([pa.field(name, kind) for name, kind in types.items() if name not in mixed])


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Whether Parquet cannot hold a type."""
    if pa.types.is_struct(kind) and kind.num_fields == 0:
        return True
    return any(_has_empty_struct(kind.field(number).type) for number in range(kind.num_fields))

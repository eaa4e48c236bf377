"""Write the tasks of a large set as the input rows of a program, with a few of them in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import pyarrow as pa

from montessori_core.data.rows import Rows, optional_fields, schema_of
from montessori_core.data.sources import Task
from montessori_core.data.tables import ROW_GROUP, write_table


def write_task_rows(
    tasks: Iterable[Task], path: Path, kind: type, row_of: Callable[[Task], Mapping[str, object]]
) -> None:
    """Write tasks to a table that `task_rows` reads.

    Args:
        tasks: read once.
        path: of the table.
        kind: TypedDict of the rows.
        row_of: returns the row of a task.

    Raises:
        DataError: a task cannot be read, or a table cannot hold it.
    """
    schema = schema_of(kind, optional_fields(kind))

    def batches() -> Iterator[pa.RecordBatch]:
        remaining = iter(tasks)
        while chunk := list(islice(remaining, ROW_GROUP)):
            for table in Rows.of([row_of(task) for task in chunk], kind).tables():
                # A chunk without conversations lacks their column.
                yield from pa.concat_tables([schema.empty_table(), table], promote_options="default").to_batches()

    write_table(pa.RecordBatchReader.from_batches(schema, batches()), path, schema)


def task_rows(path: Path, kind: type) -> Rows:
    """Return the rows of a table that `write_task_rows` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    return Rows.of_file(path, schema_of(kind, optional_fields(kind)), kind)

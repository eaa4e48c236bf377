"""The Parquet tables of a run: declared once, with versions and descriptions, and checked on read and write.

Tables have results only, never times or host names, so that their bytes do not depend on the cut into shards, interruptions
or repetitions. Text columns may have text that a model wrote, which is untrusted.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from montessori_core.errors import DataError
from montessori_core.files import OUT_OF_SPACE, commit

ROW_GROUP = 8192
"""Rows that are written, and can be read, at a time: about 30 MB of the longest texts."""


def _field(name: str, kind: pa.DataType, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


def _schema(name: str, version: int, *fields: pa.Field) -> pa.Schema:
    return pa.schema(fields, metadata={"montessori.table": name, "montessori.version": str(version)})


_TEXT, _REAL, _WHOLE, _TRUTH = pa.string(), pa.float64(), pa.int32(), pa.bool_()


DRAWN_TOKENS = ("output_ids", "vocabulary")
"""The columns with the tokens of a raw output; in a pair, they are prefixed with `chosen_` and `rejected_`."""


def _drawn_tokens(output: str = "") -> tuple[pa.Field, pa.Field]:
    """Return the columns DRAWN_TOKENS of a row or, with a prefix, of one of its two outputs."""
    ids, vocabulary = (f"{output}{name}" for name in DRAWN_TOKENS)
    return (
        _field(ids, pa.list_(_WHOLE), "token ids of thinking and raw output as drawn; null from an API", nullable=True),
        _field(vocabulary, _TEXT, "SHA-256 of the vocabulary that these ids are of", nullable=True),
    )


GENERATION = _schema(
    "generation",
    4,
    _field("example_id", _TEXT, "the example that it is for"),
    _field("prompt", _TEXT, "the exact text the model continued, chat template included"),
    _field("raw_output", _TEXT, "what the model wrote after its thinking, stop string included"),
    _field("thinking", _TEXT, "what a reasoning model wrote before, between <think> and </think>", nullable=True),
    _field("finish_reason", _TEXT, "'stop' (end token or stop string) or 'length' (token limit)"),
    _field("tokens", _WHOLE, "tokens generated"),
    *_drawn_tokens(),
)

INSTRUCTIONS = _schema(
    "instructions",
    2,
    _field("example_id", _TEXT, "prompt id and sample number"),
    _field("prompt_id", _TEXT, "the prompt p that it answers"),
    _field("prompt", _TEXT, "the exact text the teacher continued, chat template included"),
    _field("demonstrations", pa.list_(_TEXT), "ids of the demonstrations in the prompt, in order"),
    _field("raw_output", _TEXT, "what the teacher wrote"),
    _field("instruction", _TEXT, "the instruction x extracted from it", nullable=True),
    _field("rejection", _TEXT, "why it was rejected; null if it was accepted", nullable=True),
)

EXAMPLES = _schema(
    "examples",
    2,
    _field("example_id", _TEXT, "candidate id of the instruction"),
    _field("prompt_id", _TEXT, "the prompt p"),
    _field("prompt", _TEXT, "the exact text the teacher continued, chat template included"),
    _field("raw_output", _TEXT, "the teacher's raw output that holds the instruction"),
    _field("instruction", _TEXT, "instruction x"),
    _field("response", _TEXT, "response y"),
    _field("response_finished", _TRUTH, "false if the response was cut at the token limit"),
    *_drawn_tokens(),
)

INFLUENCE = _schema(
    "influence",
    4,
    _field("example_id", _TEXT, "the example"),
    _field("prompt_id", _TEXT, "its prompt"),
    _field("status", _TEXT, "'ok', 'no_response_tokens' or 'non_finite'; only 'ok' rows carry influence"),
    _field("tokens", _WHOLE, "tokens of prompt and response after truncation"),
    _field("response_tokens", _WHOLE, "tokens the step was taken on"),
    _field("truncated", _TRUTH, "the example was longer than the student's max_length"),
    _field("example_loss", _REAL, "student's mean loss on the response, nats per token", nullable=True),
    _field("influence_student", _REAL, "L(ref; student) - L(ref; stepped), nats. Positive = helps", nullable=True),
    _field("influence_null_step", _REAL, "L(ref; null step) - L(ref; stepped), nats", nullable=True),
    _field(
        "standard_error",
        _REAL,
        "standard error of influence_null_step over the reference examples, nats; of a first-order row by two halves of the "
        "set (one degree of freedom: take the root mean square of many rows); NaN with a single reference example",
        nullable=True,
    ),
    _field("reference_tokens", pa.int64(), "tokens of the reference set read for this row"),
    _field(
        "estimator", _TEXT, "how the row's influence was measured: 'exact', 'first_order', 'linear' or 'stored_steps'"
    ),
    _field("audited", _TRUTH, "the row is of the audit sample of estimator: screened"),
    _field(
        "first_order_null_step",
        _REAL,
        "estimate of influence_null_step, nats, by first order (or linear, if influence.screening.estimator is), before an "
        "exact one replaced or the audit corrected it",
        nullable=True,
    ),
    _field("gradient_norm", _REAL, "norm of the example's gradient, before influence.example_weight", nullable=True),
    _field(
        "dominated_share",
        _REAL,
        "share of the coordinates in which (1 - beta2) (w g)^2 exceeds beta2 v: the example's own gradient, of weight w, "
        "decides AdamW's denominator",
        nullable=True,
    ),
)

INFLUENCE_BY_TARGET = _schema(
    "influence_by_target", 1, _field("target", _WHOLE, "number of the reference set, from 0"), *INFLUENCE
)

STEPS = _schema(
    "steps",
    1,
    *map(INFLUENCE.field, ("example_id", "prompt_id", "status", "tokens", "response_tokens", "truncated")),
    *map(INFLUENCE.field, ("example_loss", "gradient_norm", "dominated_share")),
    _field("scale", _REAL, "factor of the numbers"),
    _field(
        "numbers", pa.binary(), "projection of the step against the null step, little-endian fp16; empty unless 'ok'"
    ),
)

REFERENCE_PROJECTION = _schema(
    "reference projection",
    1,
    _field("full", pa.list_(_REAL), "projection of the gradient of the reference loss"),
    _field("half", pa.list_(_REAL), "that of half of the reference examples"),
    _field("references", _WHOLE, "number of reference examples"),
    _field("notes", pa.map_(_TEXT, _REAL), "numbers of the student, see `influence.table.NOTES`"),
)

PREFERENCES = _schema(
    "preferences",
    2,
    _field("prompt_id", _TEXT, "the prompt p"),
    _field("prompt", _TEXT, "the exact text the teacher continued, chat template included"),
    _field("chosen", _TEXT, "raw output with the helpful instruction x+"),
    _field("rejected", _TEXT, "raw output with the harmful instruction x-"),
    _field("chosen_id", _TEXT, "example x+"),
    _field("rejected_id", _TEXT, "example x-"),
    _field("chosen_influence_student", _REAL, "influence of x+ against the student, nats"),
    _field("rejected_influence_student", _REAL, "influence of x- against the student, nats"),
    _field("chosen_influence_null_step", _REAL, "influence of x+ against the null step, nats"),
    _field("rejected_influence_null_step", _REAL, "influence of x- against the null step, nats"),
    *_drawn_tokens("chosen_"),
    *_drawn_tokens("rejected_"),
)

UTILITY = _schema(
    "utility",
    1,
    _field("example_id", _TEXT, "the example"),
    _field("prompt_id", _TEXT, "its prompt"),
    _field(
        "utility",
        _REAL,
        "what stands in for influence, higher is better; null if it could not be computed",
        nullable=True,
    ),
)

UTILITY_PREFERENCES = _schema(
    "utility_preferences",
    2,
    _field("prompt_id", _TEXT, "the prompt p"),
    _field("prompt", _TEXT, "the exact text the teacher continued, chat template included"),
    _field("chosen", _TEXT, "raw output of higher utility"),
    _field("rejected", _TEXT, "raw output of lower utility"),
    _field("chosen_id", _TEXT, "example of the chosen output"),
    _field("rejected_id", _TEXT, "example of the rejected output"),
    _field("chosen_utility", _REAL, "utility of the chosen example"),
    _field("rejected_utility", _REAL, "utility of the rejected example"),
    *_drawn_tokens("chosen_"),
    *_drawn_tokens("rejected_"),
)

RETRAINING = _schema(
    "retraining",
    1,
    _field("training_id", _TEXT, "the training: 'none', 'all', or which examples"),
    _field("example_ids", pa.list_(_TEXT), "the examples of an epoch, in their order"),
    _field("steps", _WHOLE, "optimizer steps from the warm student"),
    _field("response_tokens", _WHOLE, "response tokens of an epoch"),
    _field("reference_loss", _REAL, "the student's reference loss after the training, nats per token"),
)

PREDICTIONS = _schema(
    "predictions",
    1,
    _field("example_id", _TEXT, "the example"),
    _field("predictor", _TEXT, "what predicts the effect of training on it"),
    _field("value", _REAL, "its value: nats for influence; null if the example has no response tokens", nullable=True),
)

SIMILARITY = _schema(
    "similarity",
    1,
    _field("example_id", _TEXT, "the synthetic example"),
    _field("norm_sim", _REAL, "inner product with the nearest real example, of centred features of norm 1"),
)

EMBEDDINGS = _schema(
    "embeddings",
    1,
    _field("example_id", _TEXT, "the instruction"),
    _field("vector", pa.list_(pa.float32()), "its embedding, of norm 1"),
)

CODE_RUNS = _schema(
    "code_runs",
    1,
    _field("example_id", _TEXT, "the example"),
    _field("outcome", _TEXT, "of the Python code in its response: 'runs', 'fails', 'limits' or 'no code'"),
)

REFERENCE_LOSS = _schema(
    "reference_loss",
    1,
    _field("example_id", _TEXT, "the evaluated example"),
    _field("loss", _REAL, "summed loss of its response, nats"),
    _field("response_tokens", _WHOLE, "tokens of its response"),
)

PAIRWISE = _schema(
    "pairwise",
    1,
    _field("question_id", _TEXT, "the question that both answered"),
    _field(
        "outcome",
        _TEXT,
        "of the answer against the other, over both orders: 'win', 'loss', 'tie' (also when the orders disagree) or "
        "'unparsed' (a judgement that could not be read)",
    ),
    _field(
        "preference",
        _REAL,
        "win 1, tie 0.5, loss 0; by the published prompt the judge's probability that the answer is better, mean over both "
        "orders; null if unparsed",
        nullable=True,
    ),
    _field("characters", _WHOLE, "length of the answer"),
    _field("other_characters", _WHOLE, "length of the other answer"),
)

MT_BENCH = _schema(
    "mt_bench",
    1,
    _field("question_id", _TEXT, "the question"),
    _field("category", _TEXT, "its category"),
    _field("turn", _WHOLE, "which of its two turns the score is for: 1 or 2"),
    _field("score", _REAL, "the judge's score, 1 to 10; null if it could not be read", nullable=True),
)

ITEMS = _schema(
    "items",
    1,
    _field("benchmark", _TEXT, "the benchmark, as the configuration names it"),
    _field("task", _TEXT, "the task of lm-evaluation-harness that it belongs to"),
    _field("item", _WHOLE, "its place in the task's evaluation set, from 0"),
    _field("text", _TEXT, "question and right answer"),
)

ITEM_SCORES = _schema(
    "item_scores",
    1,
    _field("benchmark", _TEXT, "the benchmark, as the configuration names it"),
    _field("task", _TEXT, "the task of lm-evaluation-harness that it belongs to"),
    _field("item", _WHOLE, "its place in the task's evaluation set, from 0"),
    _field("metric", _TEXT, "what was measured, and by which filter of answers if the task has several"),
    _field("score", _REAL, "its value"),
    _field("higher_is_better", _TRUTH, "whether a model is better the higher it is"),
    _field("answer", _TEXT, "what the model wrote, or the likelihoods it gave"),
    _field("target", _TEXT, "the right answer"),
)


def table_from_rows(rows: list[dict[str, object]], schema: pa.Schema) -> pa.Table:
    """Build a table of `schema` from a mapping per row."""
    return check(pa.Table.from_pylist(rows, schema=schema), schema, "rows")


def check(table: pa.Table, schema: pa.Schema, source: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return `table` if it has `schema`, or those of its `columns`.

    Raises:
        DataError: the name, version, columns, types or null values do not match.
    """
    name, version, *actual = (
        (metadata or {}).get(key, b"?").decode(errors="replace")
        for metadata in (schema.metadata, table.schema.metadata)
        for key in (b"montessori.table", b"montessori.version")
    )
    if actual != [name, version]:
        raise DataError(
            f"{source}: expected table {name!r} version {version}, found {actual[0]!r} version {actual[1]}; it was "
            "written by another version or is another table"
        )
    for field in schema if columns is None else map(schema.field, columns):
        if field.name not in table.column_names:
            raise DataError(f"{source}: column {field.name!r} is missing")
        column = table.column(field.name)
        if column.type != field.type:
            raise DataError(f"{source}: column {field.name!r} is {column.type}, expected {field.type}")
        if not field.nullable and column.null_count:
            raise DataError(f"{source}: column {field.name!r} holds {column.null_count} nulls")
    return table


def name_of_table(schema: pa.Schema) -> str:
    """Return the name in a table's metadata; '' if it is no table of a run."""
    return str((schema.metadata or {}).get(b"montessori.table", b"").decode(errors="replace"))


def write_table(table: pa.Table | pa.RecordBatchReader, path: Path, schema: pa.Schema) -> None:
    """Write a table, or a stream of its rows, atomically.

    The bytes depend only on rows and metadata, not on the batches of the table or stream.

    Raises:
        DataError: the table does not have `schema`.
    """
    reader = table.to_reader(ROW_GROUP) if isinstance(table, pa.Table) else table
    check(reader.schema.empty_table(), schema, str(path))
    options = {"compression": "zstd", "write_page_checksum": True}
    with commit(path) as temporary, pq.ParquetWriter(temporary, reader.schema, **options) as writer:
        for group in regroup((pa.Table.from_batches([batch]) for batch in reader), reader.schema, ROW_GROUP):
            writer.write_table(check(group, schema, str(path)))


def regroup(tables: Iterable[pa.Table], schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """Yield the rows of tables in tables of `size` rows, the last of fewer; without rows, yield an empty table."""
    waiting = schema.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows > size:
            yield waiting.slice(0, size).combine_chunks()
            waiting = waiting.slice(size)
    yield waiting.combine_chunks()


def take_rows(
    file: pq.ParquetFile, columns: Sequence[str] | None, positions: npt.NDArray[np.int64]
) -> Iterator[pa.Table]:
    """Yield rows of a file by their ascending positions, with one row group in memory at a time."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    groups = np.searchsorted(ends, positions, side="right")
    for group in np.unique(groups):
        table = file.read_row_group(group, columns)
        table.validate(full=True)
        yield table.take(positions[groups == group] - (ends[group] - sizes[group]))


def read_table(path: Path | Sequence[Path], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table of `schema`, or some columns of it; the parts of a table, in their order, are read as one.

    Raises:
        DataError: a file is missing, damaged, or another table.
    """
    if not isinstance(path, Path):
        return pa.concat_tables([read_table(part, schema, columns) for part in path]).combine_chunks()
    with open_parquet(path, "; delete it and resume the run") as file:
        table, rows = file.read(columns), file.metadata.num_rows
        table.validate(full=True)  # UTF-8 and list offsets
        if table.num_rows != rows:  # no checksum covers the number of rows
            raise ValueError(f"{table.num_rows} rows where {rows} were written")
    return check(table, schema, str(path), columns)


@contextmanager
def open_parquet(path: Path, remedy: str = "") -> Iterator[pq.ParquetFile]:
    """Open a table to read parts of it.

    Raises:
        DataError: the file is missing, or damaged where it is read; the message ends with `remedy`.
    """
    try:
        if path.is_fifo():
            raise DataError(f"{path}: not a file; give one, not a pipe")
        # Not a data set, which would take most of the time with thousands of small parts.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read (no such file); check the path") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        if getattr(error, "errno", None) in OUT_OF_SPACE:  # of a file that the caller writes
            raise
        raise DataError(f"{path}: not a readable Parquet file ({error}){remedy}") from error

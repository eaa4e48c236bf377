"""Measure `montessori select` on 1,000,000 rows.

    python benchmarks/selection.py [--rows 1000000] [--k 10000] [--folder .]

Pools: a Parquet file as `montessori export --what scored --to parquet` writes it, and the table of `montessori influence`
with its examples in JSONL. A row has 200 B of instruction and 500 B of response; its source is one of eight. Each choice is
the command in a new process, whose peak memory is reported. CPU seconds are the sum over its threads. The first line of the
output describes the machine.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from montessori_core.data.tables import INFLUENCE, ROW_GROUP, write_table
from montessori_core.export.sets import SCHEMAS
from montessori_core.influence.table import NOTES, schema_with_metadata

INSTRUCTION, RESPONSE = 200, 500  # bytes
SOURCES = 8


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of a pool")
    parser.add_argument("--k", type=int, default=10_000, help="chosen rows")
    parser.add_argument("--folder", type=Path, default=Path(), help="parent of a scratch folder of 2 GB")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        select(arguments.measure)
        return
    from machine import describe_machine  # imports torch, which the command does not

    print(f"{describe_machine()}\n")  # noqa: T201
    print(f"| pool of {arguments.rows:,} rows | choice | s | CPU, s | peak, MB |\n|{'---|' * 5}")  # noqa: T201
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        write_pools(folder, arguments.rows)
        k = f"--k {arguments.k}"
        choices = [k, "--share 0.1", f"{k} --per source", f"{k} --max-rouge-l 0.7", f"{k} --control length_matched"]
        for options in choices:
            measure(folder, "exported", options, "exported.parquet")
        for options in (k, "--share 0.1", f"{k} --max-rouge-l 0.7"):
            measure(folder, "influence table", options, "influence.parquet", "--examples", "examples.jsonl")


def select(options: list[str]) -> None:
    """Run the command, then print its seconds and its peak memory."""
    from flows.cli import app

    started = time.perf_counter()
    app(["select", *options], standalone_mode=False)
    seconds, cpu = time.perf_counter() - started, time.process_time()
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024
    print(json.dumps([seconds, cpu, peak]))  # noqa: T201


def measure(folder: Path, pool: str, options: str, *files: str) -> None:
    """Run a choice in a new process, and print its row."""
    output = folder / "chosen.jsonl"
    paths = [option if option.startswith("--") else str(folder / option) for option in files]
    command = [sys.executable, __file__, "--measure", *paths, *options.split(), "--output", str(output)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, cpu, peak = json.loads(printed.splitlines()[-1])
    output.unlink()
    print(f"| {pool} | `{options}` | {seconds:.0f} | {cpu:.0f} | {peak:.0f} |", flush=True)  # noqa: T201


def write_pools(folder: Path, rows: int) -> None:
    """Write `exported.parquet`, `influence.parquet` and `examples.jsonl`."""
    draw = np.random.default_rng(0)
    text = words(draw, 30_000_000)
    schema = schema_with_metadata(dict.fromkeys(NOTES, 0.0))

    with (
        (folder / "examples.jsonl").open("w") as examples,
        pq.ParquetWriter(folder / "exported.parquet", SCHEMAS["scored"]) as exported,
    ):

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, rows, ROW_GROUP):
                count = min(ROW_GROUP, rows - start)
                measured = measurements(draw, start, count)
                texts = [draw_texts(text, place) for place in draw.integers(0, len(text) - RESPONSE, count)]
                for id, pair in zip(measured["example_id"], texts, strict=True):
                    examples.write(json.dumps({"id": id, "instruction": pair[0], "output": pair[1]}) + "\n")
                exported.write_table(export(measured, texts))
                yield pa.RecordBatch.from_pydict(measured, schema=schema)

        write_table(pa.RecordBatchReader.from_batches(schema, batches()), folder / "influence.parquet", schema)


def measurements(draw: np.random.Generator, start: int, count: int) -> dict[str, list[object]]:
    """Return the columns of an influence table."""
    columns: dict[str, list[object]] = {field.name: [None] * count for field in INFLUENCE}
    influence = draw.normal(size=count)
    return columns | {
        "example_id": [f"example-{start + number:07d}" for number in range(count)],
        "prompt_id": [f"prompt-{(start + number) // 4:07d}" for number in range(count)],
        "status": ["ok"] * count,
        "tokens": [240] * count,
        "response_tokens": draw.integers(1, 1000, count).tolist(),
        "truncated": [False] * count,
        "influence_student": influence.tolist(),
        "influence_null_step": influence.tolist(),
        "reference_tokens": [90_000] * count,
        "estimator": ["first_order"] * count,
        "audited": [False] * count,
    }


def export(measured: dict[str, list[object]], texts: list[tuple[str, str]]) -> pa.Table:
    """Return the rows of an exported set."""
    count = len(texts)
    columns = {field.name: measured.get(field.name, [None] * count) for field in SCHEMAS["scored"]}
    columns |= {
        "id": measured["example_id"],
        "instruction": [instruction for instruction, _ in texts],
        "output": [response for _, response in texts],
        "response_finished": [True] * count,
        "influence": measured["influence_student"],
        "source": [f"source-{number % SOURCES}" for number in range(count)],
        "teacher": ["teacher"] * count,
        "iteration": [1] * count,
    }
    return pa.Table.from_pydict(columns, schema=SCHEMAS["scored"])


def draw_texts(text: str, place: int) -> tuple[str, str]:
    """Return an instruction and a response."""
    return text[place : place + INSTRUCTION], text[place : place + RESPONSE]


def words(draw: np.random.Generator, size: int) -> str:
    """Return random text that compresses about as well as natural text."""
    vocabulary = ["".join(map(chr, draw.integers(97, 123, draw.integers(2, 10)))) for _ in range(5000)]
    return " ".join(vocabulary[word] for word in draw.integers(0, len(vocabulary), size // 7))[:size]


if __name__ == "__main__":
    main()

"""Measure joins of up to 1,000,000 rows and plans of up to 10,000 shards.

    python benchmarks/scale.py [--rows 10000 100000 1000000] [--at-once 100000] [--shards 100 1000 10000] [--folder .]

Join: the parts of an influence stage, 100 rows each, become one table. Preference pairs are made from it and from an example
table with rows of the size that completion prompts with eight demonstrations have: 2.5 kB of prompt, 200 B of instruction,
500 B of response, four rows per prompt. For up to --at-once rows, the same is computed with all rows loaded as Python
dictionaries; the pairs must be equal. Plan: from the call of the fan-out until the jobs are submitted, for shards of 100 such
rows. Each size runs in a separate process, whose peak memory is reported. CPU seconds are the sum over its threads; they are
more reliable than wall time if other programs use the same cores.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.fanout import fan_out
from cluster.progress import Progress
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import Cluster, Preferences, Resources
from montessori_core.data.rows import ExampleRow, Rows
from montessori_core.data.tables import EXAMPLES, INFLUENCE, PREFERENCES, ROW_GROUP, read_table, write_table
from montessori_core.influence.preferences import PAIRED, pair_by_influence, write_preferences
from montessori_core.influence.table import NOTES, join_influence, schema_with_metadata

SHARD = 100  # rows
PROMPT, INSTRUCTION, RESPONSE = 2500, 200, 500  # bytes
OUTPUT_TOKENS = 50
SAMPLES = 4  # per prompt
_POLL = 1.0  # seconds between polls


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="numbers of table rows"
    )
    parser.add_argument(
        "--at-once", type=int, default=100_000, help="largest number of rows loaded at once for comparison"
    )
    parser.add_argument("--shards", type=int, nargs="*", default=[100, 1000, 10_000], help="numbers of shards")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="parent of scratch folders; the default sizes need 3 GB"
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        operation, size, folder = arguments.measure
        result = {"join": join, "at_once": join_at_once, "plan": plan}[operation](Path(folder), int(size))
        print(json.dumps({**result, "megabytes": peak_memory()}))  # noqa: T201
        return
    head = "| rows | parts | pairs | join, s | pairs, s | CPU, s | peak, MB | at once: s | CPU, s | peak, MB |"
    print(f"{head}\n|{'---|' * 10}")  # noqa: T201
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            make_tables(Path(scratch), rows)
            streamed = measure("join", rows, scratch)
            comparison = "- | - | -"
            if rows <= arguments.at_once:
                at_once = measure("at_once", rows, scratch)
                if read_table(Path(scratch, "at-once.parquet"), PREFERENCES) != read_table(
                    Path(scratch, "preferences.parquet"), PREFERENCES
                ):
                    raise SystemExit("the two procedures make different pairs")
                comparison = f"{at_once['seconds']:.1f} | {at_once['cpu']:.1f} | {at_once['megabytes']:.0f}"
        print(  # noqa: T201
            f"| {rows:,} | {rows // SHARD:,} | {streamed['pairs']:,} | {streamed['joining']:.1f} | "
            f"{streamed['pairing']:.1f} | {streamed['cpu']:.1f} | {streamed['megabytes']:.0f} | {comparison} |",
            flush=True,
        )
    print(f"\n| shards | rows | from the call to the jobs submitted, s | CPU, s | peak, MB |\n|{'---|' * 5}")  # noqa: T201
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            make_examples(Path(scratch), shards * SHARD)
            planned = measure("plan", shards, scratch)
        cells = f"{planned['seconds']:.1f} | {planned['cpu']:.1f} | {planned['megabytes']:.0f}"
        print(f"| {shards:,} | {shards * SHARD:,} | {cells} |", flush=True)  # noqa: T201


def measure(operation: str, size: int, folder: str) -> dict[str, Any]:
    """Run an operation in a new process; return its seconds, memory and counts."""
    command = [sys.executable, __file__, "--measure", operation, str(size), folder]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def peak_memory() -> float:
    """Return the peak memory of this process, MB. `getrusage` would include the process that started it."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def make_tables(folder: Path, rows: int) -> None:
    """Write an example table and the parts of its influence stage."""
    draw = make_examples(folder, rows)
    for number, start in enumerate(range(0, rows, SHARD)):
        numbers = range(start, min(start + SHARD, rows))
        influence = draw.normal(size=len(numbers))
        columns = {
            "example_id": [name_of(n) for n in numbers],
            "prompt_id": [prompt_of(n) for n in numbers],
            "status": ["ok"] * len(numbers),
            "tokens": [240] * len(numbers),
            "response_tokens": [160] * len(numbers),
            "truncated": [False] * len(numbers),
            "example_loss": draw.random(len(numbers)),
            "influence_student": influence,
            "influence_null_step": influence + 0.001,
            "standard_error": draw.random(len(numbers)),
            "reference_tokens": [90_000] * len(numbers),
            "estimator": ["exact"] * len(numbers),
            "audited": [False] * len(numbers),
            "first_order_null_step": [None] * len(numbers),
            "gradient_norm": draw.random(len(numbers)),
            "dominated_share": draw.random(len(numbers)),
        }
        table = pa.Table.from_pydict(columns, schema=schema_with_metadata(dict.fromkeys(NOTES, 0.0)))
        pq.write_table(table, folder / f"part-{number:05d}.parquet", compression="zstd")  # not flushed one by one


def make_examples(folder: Path, rows: int) -> np.random.Generator:
    """Write an example table; return the generator that drew it."""
    from selection import words  # imports more than the measured processes need

    draw = np.random.default_rng(0)
    text = words(draw, 30_000_000)

    def examples() -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, ROW_GROUP):
            numbers = range(start, min(start + ROW_GROUP, rows))
            places = draw.integers(0, len(text) - PROMPT, (2, len(numbers)))
            prompts = [int(n // SAMPLES * 7919 % (len(text) - PROMPT)) for n in numbers]
            instructions = [text[place : place + INSTRUCTION] for place in places[0]]
            columns = {
                "example_id": [name_of(n) for n in numbers],
                "prompt_id": [prompt_of(n) for n in numbers],
                "prompt": [text[place : place + PROMPT] for place in prompts],
                "raw_output": [f"{instruction}</instruction>" for instruction in instructions],
                "instruction": instructions,
                "response": [text[place : place + RESPONSE] for place in places[1]],
                "response_finished": [True] * len(numbers),
                "output_ids": draw.integers(0, 128_000, (len(numbers), OUTPUT_TOKENS), dtype=np.int32).tolist(),
                "vocabulary": ["0" * 64] * len(numbers),
            }
            yield pa.RecordBatch.from_pydict(columns, schema=EXAMPLES)

    write_table(pa.RecordBatchReader.from_batches(EXAMPLES, examples()), folder / "examples.parquet", EXAMPLES)
    return draw


def name_of(number: int) -> str:
    return f"{prompt_of(number)}-{number % SAMPLES}"


def prompt_of(number: int) -> str:
    return f"iteration-1-probing-{number // SAMPLES}"


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def join(folder: Path, rows: int) -> dict[str, Any]:
    """Join and pair as the tasks do."""
    started, before = time.perf_counter(), time.process_time()
    write_table(join_influence(parts_of(folder)), folder / "influence.parquet", INFLUENCE)
    joined = time.perf_counter()
    table = read_table(folder / "influence.parquet", INFLUENCE, PAIRED)
    pairs = pair_by_influence(table, Preferences(baseline="student"))
    write_preferences(pairs, folder / "examples.parquet", folder / "preferences.parquet", PREFERENCES)
    ended, cpu = time.perf_counter(), time.process_time() - before
    return {"joining": joined - started, "pairing": ended - joined, "cpu": cpu, "pairs": pairs.num_rows}


def join_at_once(folder: Path, rows: int) -> dict[str, Any]:
    """Join and pair with all rows in memory."""
    started, before = time.perf_counter(), time.process_time()
    influence = [row for part in parts_of(folder) for row in read_table(part, INFLUENCE).to_pylist()]
    texts = {row["example_id"]: row for row in read_table(folder / "examples.parquet", EXAMPLES).to_pylist()}
    helpful: dict[str, list[dict[str, Any]]] = defaultdict(list)
    harmful: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in influence:
        (helpful if row["influence_student"] > 0 else harmful)[row["prompt_id"]].append(row)
    pairs = [
        {
            "prompt_id": prompt,
            "prompt": texts[best["example_id"]]["prompt"],
            "chosen": texts[best["example_id"]]["raw_output"],
            "rejected": texts[worst["example_id"]]["raw_output"],
            "chosen_id": best["example_id"],
            "rejected_id": worst["example_id"],
            "chosen_influence_student": best["influence_student"],
            "rejected_influence_student": worst["influence_student"],
            "chosen_influence_null_step": best["influence_null_step"],
            "rejected_influence_null_step": worst["influence_null_step"],
            "chosen_output_ids": texts[best["example_id"]]["output_ids"],
            "chosen_vocabulary": texts[best["example_id"]]["vocabulary"],
            "rejected_output_ids": texts[worst["example_id"]]["output_ids"],
            "rejected_vocabulary": texts[worst["example_id"]]["vocabulary"],
        }
        for prompt in helpful
        for best in helpful[prompt]
        for worst in harmful[prompt]
    ]
    write_table(pa.Table.from_pylist(pairs, schema=PREFERENCES), folder / "at-once.parquet", PREFERENCES)
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - before}


def plan(folder: Path, shards: int) -> dict[str, Any]:
    """Start a fan-out and interrupt it after its jobs are submitted."""
    rows = Rows.of_file(folder / "examples.parquet", EXAMPLES, ExampleRow)
    stage = Stage("influence", 1, "no_program:to_load", {}, {}, {}, folder.resolve() / "stage")
    polls: list[float] = []

    def stop(progress: Progress) -> None:
        polls.append(time.perf_counter())
        if len(polls) == 2:  # jobs are submitted between the first two polls
            raise KeyboardInterrupt

    started, before = time.perf_counter(), time.process_time()
    try:
        fan_out(stage, Shards(rows, SHARD), Resources(), Cluster(poll_seconds=_POLL), stop)
    except KeyboardInterrupt:
        return {"seconds": polls[1] - _POLL - started, "cpu": time.process_time() - before}
    raise SystemExit("the fan-out ended before it was interrupted")


if __name__ == "__main__":
    main()

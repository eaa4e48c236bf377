"""Other signals than influence: how hard the student finds examples, what they show it, and how good a judge finds them."""

from pathlib import Path
from typing import cast

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from cluster.stage import cut_into_shards
from montessori_core.errors import UserError
from montessori_core.program import Row
from montessori_core.schema import EXAMPLES, REFERENCE_LOSS, UTILITY, read_table, table_from_rows, write_table
from montessori_core.sources import Task
from tasks.evaluation import evaluate
from tasks.run import Model, Run

_PIECE = 64
"""Examples that a killed job has to measure again, or to look up in the cache of answers."""


def measure_training_loss(
    run: Run, folder: Path, label: str, student: Model, examples: Path, first: int, last: int
) -> Path:
    """The student's mean loss on the responses of some examples, nats per token, as their utility.

    Args:
        run: the run.
        folder: of the stage; the table `utility.parquet` goes there.
        label: for people.
        student: who is taught.
        examples: an example table.
        first: its first row to measure.
        last: the one behind the last.

    Returns:
        A table of schema `UTILITY`. Higher is better: what the student finds hard it can learn from.
    """
    rows = read_table(examples, EXAMPLES).to_pylist()[first:last]
    tasks = [Task(row["example_id"], row["instruction"], row["response"]) for row in rows]
    losses = evaluate(run, folder, label, student, tasks, upstream=[examples])
    return _write(
        f"{label}: table", folder / "utility.parquet", {r["example_id"]: r["prompt_id"] for r in rows}, losses
    )


def measure_in_context(
    run: Run, folder: Path, label: str, student: Model, examples: Path, first: int, last: int
) -> Path:
    """What some examples are worth to the student as demonstrations, as their utility; a table of schema `UTILITY`."""
    settings = run.experiment.influence
    rows = _rows(examples, first, last)
    parts = run.execute(
        folder,
        label,
        "influence",
        "montessori_core.in_context:open_in_context",
        {
            "student": run.experiment.student.model_dump(mode="json"),
            "batch_tokens": settings.reference_batch_tokens,
            "reference_reduction": settings.reference_reduction,
        },
        cut_into_shards(rows, settings.examples_per_shard),
        models={"student": student},
        files={"reference": run.source_file("reference")},
        upstream=[examples],
        piece_rows=_PIECE,
    )
    return _join(f"{label}: table", folder / "utility.parquet", parts)


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def _join(label: str, path: Path, parts: list[Path]) -> Path:
    write_table(pa.concat_tables([read_table(part, UTILITY) for part in parts]).combine_chunks(), path, UTILITY)
    return path


def ask_judge(
    run: Run, folder: Path, label: str, examples: Path, first: int, last: int, response_only: bool = False
) -> Path:
    """A judge's score of some examples as their utility; a table of schema `UTILITY`, null where no score could be read.

    With `response_only`, instructions earn no point.

    Raises:
        UserError: the experiment has no judge.
    """
    judge = run.experiment.judge
    if judge is None:
        raise UserError("no judge: set judge.model, and judge.base_url if it is not OpenAI's")
    rows = _rows(examples, first, last)
    (scores,) = run.execute(
        folder,
        label,
        "judging",
        "montessori_core.judging:open_judge",
        {"response_only": response_only, **run.endpoint_settings("judge", judge)},
        [rows],
        upstream=[examples],
        piece_rows=_PIECE,
    )
    _count_unread(f"{label}: scores", cast(Path, scores))
    return cast(Path, scores)


def _rows(examples: Path, first: int, last: int) -> list[Row]:
    return [
        {key: row[key] for key in ("example_id", "prompt_id", "instruction", "response")}
        for row in read_table(examples, EXAMPLES).to_pylist()[first:last]
    ]


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def _count_unread(label: str, scores: Path) -> None:
    """Publish how many answers had no score: they are counted, never guessed."""
    table = read_table(scores, UTILITY)["utility"]
    create_table_artifact(
        [{"examples": len(table), "scored": len(table) - table.null_count, "no score": table.null_count}],
        description=label,
    )


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def _write(label: str, path: Path, prompts: dict[str, str], losses: Path) -> Path:
    table = read_table(losses, REFERENCE_LOSS).to_pylist()
    rows: list[dict[str, object]] = [
        {
            "example_id": row["example_id"],
            "prompt_id": prompts[row["example_id"]],
            "utility": row["loss"] / row["response_tokens"],
        }
        for row in table
    ]
    write_table(table_from_rows(rows, UTILITY), path, UTILITY)
    return path

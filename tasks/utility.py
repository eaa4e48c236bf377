"""Other signals than influence: how hard the student finds examples, and how good a judge does."""

from pathlib import Path
from typing import cast

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core.errors import UserError
from montessori_core.program import Row
from montessori_core.schema import EXAMPLES, REFERENCE_LOSS, UTILITY, read_table, table_from_rows, write_table
from montessori_core.sources import Task
from tasks.evaluation import evaluate
from tasks.run import Model, Run

_PIECE = 64
"""Examples whose answers a killed job has to look up again in the cache."""


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


def ask_judge(run: Run, folder: Path, label: str, examples: Path, first: int, last: int) -> Path:
    """A judge's score of some examples as their utility; a table of schema `UTILITY`, null where no score could be read.

    Raises:
        UserError: the experiment has no judge.
    """
    judge = run.experiment.judge
    if judge is None:
        raise UserError("no judge: set judge.model, and judge.base_url if it is not OpenAI's")
    rows: list[Row] = [
        {key: row[key] for key in ("example_id", "prompt_id", "instruction", "response")}
        for row in read_table(examples, EXAMPLES).to_pylist()[first:last]
    ]
    (scores,) = run.execute(
        folder,
        label,
        "judging",
        "montessori_core.judging:open_judge",
        run.endpoint_settings("judge", judge),
        [rows],
        upstream=[examples],
        piece_rows=_PIECE,
    )
    _count_unread(f"{label}: scores", cast(Path, scores))
    return cast(Path, scores)


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

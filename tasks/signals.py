"""Signals other than influence: training loss, in-context value, and judge scores."""

from pathlib import Path

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import layout, programs
from montessori_core.config import Sampling
from montessori_core.data.rows import ExampleRow, GenerationRow, Rows
from montessori_core.data.tables import EXAMPLES, GENERATION, UTILITY, read_table, table_from_rows, write_table
from montessori_core.errors import UserError
from montessori_core.judging.points import points_for, question_about, read_score
from montessori_core.judging.responses import Answer
from montessori_core.program import Row
from montessori_core.seeding import seed_of
from tasks.generation import generate
from tasks.run import Model
from tasks.stage import Step

_JUDGEMENTS = 3
_JUDGING = Sampling(temperature=0.7, top_p=0.9, presence_penalty=0.0, max_tokens=256)


def measure_training_loss(step: Step, student: Model, examples: Path, first: int, last: int) -> Path:
    """Measure the student's mean loss on the responses of rows `first` to `last` of an example table, nats per token.

    Returns:
        A table of schema `UTILITY`, `utility.parquet` in the step's folder. Higher is better: the student can learn from what
        it finds hard.
    """
    settings = programs.ModelLoss(**_evaluation(step))
    parts = step.execute(
        programs.TRAINING_LOSS,
        settings,
        Rows.of_file(examples, EXAMPLES, ExampleRow, first, last),
        step.experiment.influence.examples_per_shard,
        models={"student": student},
        upstream=[examples],
    )
    return _join(step, parts)


def measure_in_context(step: Step, student: Model, examples: Path, first: int, last: int) -> Path:
    """Measure the value of rows `first` to `last` as demonstrations for the student; return a table as above."""
    influence = step.experiment.influence
    settings = programs.ReferenceSignal(reference_reduction=influence.reference_reduction, **_evaluation(step))
    parts = step.execute(
        programs.IN_CONTEXT,
        settings,
        Rows.of_file(examples, EXAMPLES, ExampleRow, first, last),
        influence.examples_per_shard,
        models={"student": student},
        files={"reference": step.run.source_file("reference")},
        upstream=[examples],
    )
    return _join(step, parts)


def _evaluation(step: Step) -> dict[str, int]:
    return {
        "max_length": step.experiment.student.max_length,
        "batch_tokens": step.experiment.influence.reference_batch_tokens,
    }


def ask_judge(step: Step, examples: Path, first: int, last: int, response_only: bool = False) -> Path:
    """Take a judge's scores of rows `first` to `last` as their utility; return a table as above.

    The utility is null if no score could be read. With `response_only`, instructions earn no point.

    Raises:
        UserError: the experiment has no judge.
    """
    if step.experiment.judge is None:
        raise UserError("no judge: set judge.model, and judge.base_url if it is not OpenAI's")
    rows = Rows.of_file(examples, EXAMPLES, ExampleRow, first, last)
    parts = step.ask("judge", programs.JUDGE, {"response_only": response_only}, rows, [examples])
    return _join(step, parts)


def judge_own_responses(step: Step, student: Model, examples: Path) -> Path:
    """Take the student's own scores of responses, five points each, as their utility; return a table as above.

    A utility is the mean over those of three judgements that end with a score (Yuan et al., 2024).
    """
    rows = read_table(examples, EXAMPLES, ["example_id", "prompt_id", "instruction", "response"]).to_pylist()
    asked: list[GenerationRow] = [
        {
            "example_ids": [f"{row['example_id']}-j{sample}" for sample in range(_JUDGEMENTS)],
            "turns": [question_about(row["instruction"], row["response"], response_only=True)],
            "seeds": [
                seed_of(step.experiment.seed, "judgement", row["example_id"], sample) for sample in range(_JUDGEMENTS)
            ],
        }
        for row in rows
    ]
    size = step.experiment.synthesis.instructions_per_shard
    _, parts = generate(step, student, asked, size, _JUDGING, "request", [examples])
    return _join(step, [_score(step, rows, parts)])


@task(task_run_name="{step.label}: scores", cache_policy=NO_CACHE, persist_result=False)
def _score(step: Step, rows: list[Row], parts: list[Path]) -> Path:
    """Write the mean of the scores of each row; `parts` has the judgements in the order of the rows."""
    judgements = read_table(parts, GENERATION).to_pylist()
    answers = [Answer(row["raw_output"], row["finish_reason"], 0, row["tokens"]) for row in judgements]
    most = len(points_for(response_only=True))
    scores: list[Row] = []
    for number, row in enumerate(rows):
        all_scores = (read_score(answer, most) for answer in answers[number * _JUDGEMENTS : (number + 1) * _JUDGEMENTS])
        valid = [score for score in all_scores if score is not None]
        utility = sum(valid) / len(valid) if valid else None
        scores.append({"example_id": row["example_id"], "prompt_id": row["prompt_id"], "utility": utility})
    write_table(table_from_rows(scores, UTILITY), step.folder / "scores.parquet", UTILITY)
    return step.folder / "scores.parquet"


@task(task_run_name="{step.label}: table", cache_policy=NO_CACHE, persist_result=False)
def _join(step: Step, parts: list[Path]) -> Path:
    """Join the parts in the step's folder, and publish how many rows have no utility."""
    table = read_table(parts, UTILITY)
    write_table(table, step.folder / layout.UTILITY, UTILITY)
    missing = table["utility"].null_count
    counts = {"examples": len(table), "with a utility": len(table) - missing, "without": missing}
    create_table_artifact([counts], description=f"{step.label}: table")
    return step.folder / layout.UTILITY

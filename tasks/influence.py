"""Collecting local data influence (Section 3.2): the fan-out over shards of examples, and its join."""

from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core.influence_table import join_influence, summarize_influence
from montessori_core.preferences import threshold_of
from montessori_core.program import Row
from montessori_core.schema import EXAMPLES, INFLUENCE, read_table, write_table
from tasks.run import Model, Run


@task(task_run_name="{label}", cache_policy=NO_CACHE)
def collect_influence(
    run: Run, folder: Path, table: Path, label: str, student: Model, examples: Path, first: int, last: int
) -> Path:
    """Measure rows `first` to `last` of an example table and join the shards into `table`."""
    settings = run.experiment.influence
    rows: list[Row] = [
        {
            "example_id": row["example_id"],
            "prompt_id": row["prompt_id"],
            "instruction": row["instruction"],
            "response": row["response"],
            "finished": row["response_finished"],
        }
        for row in read_table(examples, EXAMPLES).to_pylist()[first:last]
    ]
    size = settings.examples_per_shard
    parts = run.execute(
        folder,
        label,
        "influence",
        "montessori_core.influence.jobs:open_influence",
        {
            "student": run.experiment.student.model_dump(mode="json"),
            "influence": settings.model_dump(
                mode="json", exclude={"probing_examples", "later_probing_examples", "examples_per_shard"}
            ),
            "warmup": run.experiment.warmup.model_dump(mode="json"),
        },
        [rows[start : start + size] for start in range(0, len(rows), size)],
        models={"student": student, "moments": student},
        files={"reference": run.source_file("reference")},
    )
    joined = join_influence([read_table(part, INFLUENCE) for part in parts])
    write_table(joined, table, INFLUENCE)
    _publish(label, summarize_influence(joined, threshold_of(joined, run.experiment.preferences.baseline)))
    return table


def _publish(label: str, summary: dict[str, float | int]) -> None:
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in summary.items()]
    create_markdown_artifact("\n".join([f"### {label}", "", "| | |", "|---|---|", *lines]), description=label)

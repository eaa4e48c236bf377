"""Preference pairs and the teacher update (Section 3.3)."""

from pathlib import Path
from typing import cast

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core.errors import UserError
from montessori_core.influence_table import summarize_influence
from montessori_core.preferences import build_preferences, threshold_of
from montessori_core.schema import EXAMPLES, INFLUENCE, PREFERENCES, read_table, write_table
from tasks.run import Model, Run


@task(task_run_name="iteration {number}: preference pairs", cache_policy=NO_CACHE)
def collect_preferences(run: Run, number: int, examples: Path, influence: Path) -> Path:
    """Build the preference table of an iteration.

    Raises:
        UserError: no prompt has both a helpful and a harmful example.
    """
    table = read_table(influence, INFLUENCE)
    settings = run.experiment.preferences
    pairs = build_preferences(read_table(examples, EXAMPLES), table, settings)
    if pairs.num_rows == 0:
        summary = summarize_influence(table, threshold_of(table, settings.baseline))
        raise UserError(
            f"iteration {number}: no preference pairs: no prompt has both an example above and one below the threshold "
            f"(baseline {settings.baseline}, {summary['share_positive']:.0%} of {summary['measured']} examples positive). "
            "Set preferences.baseline=median, lower preferences.margin, or raise influence.probing_examples"
        )
    path = run.iteration(number) / "preferences.parquet"
    write_table(pairs, path, PREFERENCES)
    create_table_artifact(
        [
            {
                "pairs": pairs.num_rows,
                "prompts": len(set(pairs["prompt_id"].to_pylist())),
                "baseline": settings.baseline,
            },
        ],
        description=f"Preference pairs of iteration {number}",
    )
    return path


def update_teacher(run: Run, number: int, teacher: Model, preferences: Path) -> Model:
    """Train the teacher on the preference pairs with DPO (Eq. 4)."""
    rows = read_table(preferences, PREFERENCES).select(["prompt", "chosen", "rejected"]).to_pylist()
    (updated,) = run.execute(
        run.iteration(number) / "teacher",
        f"iteration {number}: teacher update",
        "training",
        "montessori_core.training.dpo:open_dpo",
        {
            "teacher": run.experiment.teacher.model_dump(mode="json"),
            "recipe": run.experiment.teacher_update.model_dump(mode="json"),
            "zero": run.experiment.zero.model_dump(mode="json"),
            "seed": run.experiment.seed,
        },
        [rows],
        models={"teacher": teacher},
        upstream=[preferences],
        suffix="",
        read=Model.of,
    )
    return cast(Model, updated)

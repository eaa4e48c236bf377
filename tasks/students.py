"""Warm-up and training of the student."""

from pathlib import Path
from typing import cast

from montessori_core.config import Training, Warmup
from montessori_core.program import Row
from montessori_core.schema import EXAMPLES, read_table
from tasks.run import Model, Run


def train_student(
    run: Run, folder: Path, label: str, examples: Path, recipe: Warmup | Training, first: int, save_moments: bool
) -> Model:
    """Train a student, from its first weights, on the first so many rows of an example table."""
    rows = training_rows(examples)[:first]
    (trained,) = run.execute(
        folder,
        label,
        "training",
        "montessori_core.training.sft:open_sft",
        {
            "student": run.experiment.student.model_dump(mode="json"),
            "recipe_kind": "warmup" if isinstance(recipe, Warmup) else "training",
            "recipe": recipe.model_dump(mode="json"),
            "zero": run.experiment.zero.model_dump(mode="json"),
            "seed": run.experiment.seed,
            "save_moments": save_moments,
        },
        [rows],
        models={"student": run.first_student()},
        upstream=[examples],
        suffix="",
        read=Model.of,
    )
    return cast(Model, trained)


def training_rows(examples: Path) -> list[Row]:
    """Examples as rows of the training program."""
    return [
        {"instruction": row["instruction"], "response": row["response"], "finished": row["response_finished"]}
        for row in read_table(examples, EXAMPLES).to_pylist()
    ]

"""Warm-up and training of the student."""

import logging
from pathlib import Path
from typing import cast

from montessori_core.config import Optimization, Warmup
from montessori_core.program import Row
from montessori_core.schema import EXAMPLES, read_table
from montessori_core.training.files import MOMENTS_FILE
from tasks.run import Model, Run

log = logging.getLogger(__name__)


def train_student(
    run: Run, folder: Path, label: str, examples: Path, recipe: Optimization, first: int, save_moments: bool
) -> Model:
    """Train a student, from its first weights, on the first so many rows of an example table.

    AdamW's moments take twice the room of the weights: they are saved only if `save_moments`, for an iteration that
    continues from this student. If that is decided after the training, it is repeated.
    """
    result = folder / "part-00000"
    if (result / MOMENTS_FILE).exists():
        save_moments = True
    elif save_moments and result.exists():
        log.warning("%s: training again, since a later iteration needs the AdamW moments that were not kept", label)
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

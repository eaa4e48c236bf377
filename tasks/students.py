"""Warm-up and training of the student."""

import logging
from pathlib import Path

from montessori_core import programs
from montessori_core.config import Optimization
from montessori_core.data.rows import Rows, TrainingRow
from montessori_core.data.tables import EXAMPLES
from montessori_core.layout import MOMENTS_FILE
from tasks.run import Model
from tasks.stage import Step

log = logging.getLogger(__name__)


def train_student(step: Step, examples: Path, recipe: Optimization, count: int, save_moments: bool = False) -> Model:
    """Train a student from its initial weights on the first `count` rows of an example table.

    AdamW's moments are twice as large as the weights. They are saved only with `save_moments`, for an iteration that
    continues from this student; if they are needed later, the training is repeated.
    """
    result = step.folder / "part-00000"
    if (result / MOMENTS_FILE).exists():
        save_moments = True
    elif save_moments and result.exists():
        log.warning(
            "%s: training again, since a later iteration needs the AdamW moments that were not kept", step.label
        )
    experiment = step.experiment
    settings = programs.Sft(
        max_length=experiment.student.max_length,
        lora=experiment.student.lora,
        recipe=recipe.shared(),
        zero=experiment.zero,
        seed=experiment.seed,
        save_moments=save_moments,
    )
    models = {"student": step.run.initial_student()}
    rows = Rows.of_file(examples, EXAMPLES, TrainingRow, last=count)
    return step.train(programs.SFT, settings, rows, models, upstream=[examples])

"""Warm-up and training of the student."""

import logging
from pathlib import Path

from montessori_core import programs
from montessori_core.config import Experiment, Optimization, Student, Training
from montessori_core.data.rows import Rows, TrainingRow
from montessori_core.data.tables import EXAMPLES
from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.adapters import check_adapter
from montessori_core.models.fetch import fetch_model
from montessori_core.models.positions import check_positions
from montessori_core.models.templates import configured_template, with_template
from montessori_core.models.weight_names import check_weight_files
from tasks.run import Model
from tasks.stage import Step

log = logging.getLogger(__name__)


def train_on_set(step: Step, examples: Path, save_moments: bool = False, recipe: Training | None = None) -> Model:
    """Train the experiment's student in a part of a step, by a recipe and within its sizes; by default `training`."""
    recipe = recipe or step.experiment.training
    return train_student(step.at("student", "student training"), examples, recipe, recipe.examples, save_moments)


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
    settings = sft_settings(step.experiment, recipe, save_moments)
    models = {"student": step.run.initial_student()}
    rows = Rows.of_file(examples, EXAMPLES, TrainingRow, last=count)
    return step.train(programs.SFT, settings, rows, models, upstream=[examples])


def sft_settings(experiment: Experiment, recipe: Optimization, save_moments: bool) -> programs.Sft:
    """Return the settings of a training of an experiment's student.

    A recipe of the section `training` limits the response tokens; rows after the limit are not used.
    """
    return programs.Sft(
        max_length=experiment.student.max_length,
        lora=experiment.student.lora,
        recipe=recipe.shared(),
        zero=experiment.zero,
        seed=experiment.seed,
        save_moments=save_moments,
        response_tokens=recipe.response_tokens if isinstance(recipe, Training) else None,
    )


def check_student(student: Student) -> Path:
    """Find and check a student that belongs to no run, and write nothing; return its folder.

    Raises:
        UserError: it cannot be used; the message names the setting.
    """
    folder = fetch_model(student.model, student.revision)
    check_weight_files(folder)
    check_adapter(folder, student.lora, "student.lora")
    check_positions(folder, student.max_length, "student.max_length")
    configured_template(folder, student, "student")
    return folder


def open_student(student: Student, folder: Path) -> Model:
    """Find and check a student that belongs to no run.

    Args:
        student: the student.
        folder: gets its links if a chat template is configured.

    Raises:
        UserError: it cannot be used; the message names the setting.
    """
    model = check_student(student)
    if (template := configured_template(model, student, "student")) is not None:
        model = with_template(model, template, folder / "student")
    return Model.of(model)

"""What LLM2LLM and Self-Reward begin with: the seed pool, answered by the teacher, and a student fine-tuned on it."""

from pathlib import Path

from montessori_core.schema import EXAMPLES, read_table
from tasks.run import Model, Run
from tasks.students import train_student
from tasks.synthesis import answer_seeds


def answer_seed_pool(run: Run) -> Path:
    """Return the seeds with the first teacher's responses, an example table: a seed pool has no responses."""
    return answer_seeds(run, run.folder / "answered-seeds", "the teacher answers the seed pool", run.first_teacher())


def train_on_seeds(run: Run, answered: Path) -> Model:
    """Train the student, from its first weights, on all answered seeds, with the recipe of `training`."""
    label, count = "student training on the seeds", read_table(answered, EXAMPLES).num_rows
    return train_student(
        run, run.folder / "seed-student", label, answered, run.experiment.training, count, save_moments=False
    )

"""The start of LLM2LLM and Self-Reward: the teacher answers the seed pool, and a student is fine-tuned on it."""

from pathlib import Path

from montessori_core.data.tables import EXAMPLES, read_table
from tasks.run import Model, Run
from tasks.stage import Step
from tasks.students import train_student
from tasks.synthesis import answer_seeds


def answer_seed_pool(run: Run) -> Path:
    """Return an example table of the seeds with responses: a seed pool has none."""
    return answer_seeds(Step(run, run.folder / "answered-seeds", "the teacher answers the seed pool"))


def train_on_seeds(run: Run, answered: Path) -> Model:
    """Train the student from its initial weights on all answered seeds, with the recipe `training`."""
    step = Step(run, run.folder / "seed-student", "student training on the seeds")
    return train_student(step, answered, run.experiment.training, read_table(answered, EXAMPLES).num_rows)

"""Space on the disk for the models that a run or a study keeps; all are in fp32.

Other files are small beside them, except checkpoints with AdamW's moments: a training keeps the last until it ends.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.status import stages_of
from montessori_core.config import Experiment, Study
from montessori_core.models.fetch import full_model
from montessori_core.models.fingerprints import count_weights
from tasks.resume import run_root_option
from tasks.run import Run

# Bytes for each weight. A checkpoint has moments and two copies of the weights, for transformers and for DeepSpeed: both in
# fp32, or both in bf16 beside fp32 masters.
_WEIGHT, _MOMENTS, _CHECKPOINT = 4, 8, 16


@dataclass(frozen=True)
class Kept:
    """Bytes of what trainings of an experiment's models keep; adapters count as nothing.

    Attributes:
        teacher, student: weights of an updated teacher, and of a trained student.
        moments: AdamW's moments of a student.
        checkpoints: of the larger model while it is trained: the last one, and the next while it is written.
    """

    teacher: int
    student: int
    moments: int
    checkpoints: int

    @staticmethod
    def of(run: Run) -> "Kept":
        """Read the sizes of a run's initial models."""
        experiment = run.experiment
        teacher = 0 if experiment.teacher_update.lora else count_weights(full_model(Path(run.initial_teacher().path)))
        student = 0 if experiment.student.lora else count_weights(full_model(Path(run.initial_student().path)))
        checkpoints = 2 * _CHECKPOINT * max(teacher, student)
        return Kept(_WEIGHT * teacher, _WEIGHT * student, _MOMENTS * student, checkpoints)

    def of_run(self, experiment: Experiment) -> int:
        """Return the bytes of a run: warm student, and teachers and students of its iterations."""
        comparison, rounds = experiment.comparison, experiment.iterations
        teachers = rounds * (1 + comparison.teacher_checkpoints)
        students = 1 + teachers + comparison.unmodified_teacher
        return teachers * self.teacher + students * self.student + rounds * self.moments

    def of_study(self, study: Study, transfer: Sequence["Kept"]) -> int:
        """Return the most bytes that a study keeps: each method may update a teacher.

        Args:
            study: the study.
            transfer: bytes of its transfer students, which each method trains.
        """
        others = study.equal_response_tokens * self.student + sum(kept.student for kept in transfer)
        methods = len(study.methods)
        of_methods = (methods - 1) * (self.teacher + self.student) + methods * others
        return len(study.seeds) * (self.of_run(study.experiment) + of_methods)


def warn_of_space(folder: Path, needed: int) -> list[str]:
    """Return a warning if a folder's disk has less free space than is needed, bytes."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [
        f"{folder}: models may need {needed / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are free. Free space, or choose "
        f"another {run_root_option()}. If the disk fills up, finished work is kept, and the same command continues"
    ]


def warn_of_run(run: Run) -> list[str]:
    """Return a warning if a new run may fill the disk; a resumed run has models there already."""
    if stages_of(run.folder):
        return []
    kept = Kept.of(run)
    return warn_of_space(run.folder, kept.of_run(run.experiment) + kept.checkpoints)


def warn_of_study(study: Study, runs: Sequence[Run], folder: Path) -> list[str]:
    """Return a warning if a new study may fill the disk, as `warn_of_run`.

    Args:
        study, folder: the study and its folder.
        runs: of a seed: of its student, and of transfer students.
    """
    if stages_of(folder):
        return []
    kept, *transfer = map(Kept.of, runs)
    checkpoints = max(of.checkpoints for of in (kept, *transfer))
    return warn_of_space(folder, kept.of_study(study, transfer) + checkpoints)

"""Tailoring a teacher to a student: what every method with a preference signal shares (the paper's Figure 2)."""

from dataclasses import dataclass
from pathlib import Path

from montessori_core.config import Endpoint
from montessori_core.sources import Task
from tasks.approval import approve_update
from tasks.influence import collect_influence
from tasks.run import Model, Run
from tasks.students import train_student
from tasks.synthesis import Synthesized, synthesize
from tasks.teachers import collect_preferences, update_teacher


@dataclass(frozen=True)
class Probed:
    """A probing set and the warm student it is for: rows `first` to `last` of the synthesized examples."""

    synthesized: Synthesized
    student: Model
    first: int
    last: int


@dataclass(frozen=True)
class Tailored:
    """What tailoring leaves: the updated teacher, the training set it wrote, and how it came to be."""

    probed: Probed
    influence: Path
    preferences: Path
    teacher: Model
    training: Synthesized


def tailor(
    run: Run, number: int, teacher: Model, student: Model | None, synthetic_pool: Path | None, approve: bool = False
) -> Tailored:
    """Measure what helps the student, update the teacher with it, and let it write the training set.

    Args:
        run: the run.
        number: of the iteration.
        teacher: the last iteration's, or the first.
        student: the last iteration's, with its moments; None warms one up.
        synthetic_pool: training examples of the last iteration.
        approve: wait for a person before the update.
    """
    folder, name = run.iteration(number), f"iteration {number}"
    probed = probe(run, number, teacher, student, synthetic_pool)
    influence = measure(run, number, probed)
    preferences = collect_preferences(run, folder, name, probed.synthesized.examples, influence)
    if approve:
        approve_update(run, number, influence, preferences)
    keep = run.experiment.comparison.teacher_checkpoints
    updated = update_teacher(run, folder / "teacher", f"{name}: teacher update", teacher, preferences, keep=keep)
    training = write_training_set(run, folder / "training", name, updated, number, synthetic_pool)
    return Tailored(probed, influence, preferences, updated, training)


def probe(run: Run, number: int, teacher: Model, student: Model | None, synthetic_pool: Path | None) -> Probed:
    """Let the teacher write the probing set of an iteration; without a student, its first examples warm one up."""
    experiment, folder, name = run.experiment, run.iteration(number), f"iteration {number}"
    warming = experiment.warmup.examples if student is None else 0
    probing = experiment.influence.probing_examples if student is None else experiment.influence.later_probing_examples
    synthesized = synthesize(
        run,
        folder,
        f"{name}: {'warm-up and ' if warming else ''}probing set",
        teacher,
        count=warming + probing,
        draw=f"i{number}-probing",
        earlier=[],
        synthetic_pool=synthetic_pool,
    )
    if student is None:
        student = train_student(
            run,
            folder / "warmup",
            f"{name}: student warm-up",
            synthesized.examples,
            experiment.warmup,
            warming,
            save_moments=True,
        )
    return Probed(synthesized, student, warming, warming + probing)


def measure(run: Run, number: int, probed: Probed) -> Path:
    """Local data influence of the probing set of an iteration."""
    folder = run.iteration(number)
    return collect_influence(
        run,
        folder / "influence",
        folder / "influence.parquet",
        f"iteration {number}: influence of the probing set",
        probed.student,
        probed.synthesized.examples,
        probed.first,
        probed.last,
        paired=True,
    )


def write_training_set(
    run: Run,
    folder: Path,
    label: str,
    teacher: Model | Endpoint,
    number: int = 1,
    synthetic_pool: Path | None = None,
    seed_pool: list[Task] | None = None,
) -> Synthesized:
    """Let a teacher write the training set of an iteration, from the prompts that every method has.

    What was probed may be written again, as in the authors' code: only a tailored teacher has a probing set, and a set that
    avoids it would lack what that teacher writes most.

    Args:
        run: the run.
        folder: of the set.
        label: for people.
        teacher: who writes: a model, or one behind an API.
        number: of the iteration.
        synthetic_pool: training examples of the last iteration.
        seed_pool: what prompts demonstrate; None takes the run's.
    """
    return synthesize(
        run,
        folder,
        f"{label}: training set",
        teacher,
        count=run.experiment.training.examples,
        draw=f"i{number}-training",
        earlier=[],
        synthetic_pool=synthetic_pool,
        seed_pool=seed_pool,
    )

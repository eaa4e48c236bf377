"""Tailoring a teacher to a student: what every method with a preference signal shares (the paper's Figure 2)."""

from dataclasses import dataclass
from pathlib import Path

from montessori_core.config import Endpoint
from montessori_core.data.sources import Task
from tasks.approval import approve_update
from tasks.influence import collect_influence
from tasks.run import Model
from tasks.stage import Step
from tasks.students import train_student
from tasks.synthesis import SynthesisResult, synthesize
from tasks.teachers import collect_preferences, update_teacher


@dataclass(frozen=True)
class ProbingSet:
    """A probing set and the warm student it is for: rows `first` to `last` of the synthesized examples."""

    synthesized: SynthesisResult
    student: Model
    first: int
    last: int


@dataclass(frozen=True)
class TailoringResult:
    """What tailoring leaves: the updated teacher, the training set it wrote, and how it came to be."""

    probed: ProbingSet
    influence: Path
    preferences: Path
    teacher: Model
    training: SynthesisResult


def tailor(
    step: Step, number: int, teacher: Model, student: Model | None, synthetic_pool: Path | None, approve: bool = False
) -> TailoringResult:
    """Measure what helps the student, update the teacher with it, and let it write the training set.

    Args:
        step: the iteration.
        number: of the iteration; names its random draws.
        teacher: the last iteration's, or the first.
        student: the last iteration's, with its moments; None warms one up.
        synthetic_pool: training examples of the last iteration.
        approve: wait for a person before the update.
    """
    probed = probe(step, number, teacher, student, synthetic_pool)
    influence = measure(step, probed)
    preferences = collect_preferences(step, probed.synthesized.examples, influence)
    if approve:
        approve_update(step.run, number, influence, preferences)
    keep = step.experiment.comparison.teacher_checkpoints
    updated = update_teacher(step.at("teacher", "teacher update"), teacher, preferences, keep=keep)
    training = write_training_set(step, updated, number, synthetic_pool)
    return TailoringResult(probed, influence, preferences, updated, training)


def probe(
    step: Step, number: int, teacher: Model, student: Model | None = None, synthetic_pool: Path | None = None
) -> ProbingSet:
    """Let the teacher write the probing set of an iteration; without a student, its first examples warm one up."""
    experiment = step.experiment
    warming = experiment.warmup.examples if student is None else 0
    probing = experiment.influence.probing_examples if student is None else experiment.influence.later_probing_examples
    written = step.renamed(f"{step.label}: {'warm-up and ' if warming else ''}probing set")
    synthesized = synthesize(
        written, teacher, warming + probing, draw=f"i{number}-probing", synthetic_pool=synthetic_pool
    )
    if student is None:
        warmup = step.at("warmup", "student warm-up")
        student = train_student(warmup, synthesized.examples, experiment.warmup, warming, save_moments=True)
    return ProbingSet(synthesized, student, warming, warming + probing)


def measure(step: Step, probed: ProbingSet) -> Path:
    """Local data influence of the probing set of an iteration."""
    measuring, examples = step.at("influence", "influence of the probing set"), probed.synthesized.examples
    return collect_influence(measuring, probed.student, examples, probed.first, probed.last, paired=True)


def write_training_set(
    step: Step,
    teacher: Model | Endpoint,
    number: int = 1,
    synthetic_pool: Path | None = None,
    seed_pool: list[Task] | None = None,
    folder: str = "training",
) -> SynthesisResult:
    """Let a teacher write a training set, in a folder of the step, from the prompts that every method has.

    What was probed may be written again, as in the authors' code: only a tailored teacher has a probing set, and a set that
    avoids it would lack what that teacher writes most.

    Args:
        step: that the set belongs to.
        teacher: who writes: a model, or one behind an API.
        number: of the iteration.
        synthetic_pool: training examples of the last iteration.
        seed_pool: what prompts demonstrate; None takes the run's.
        folder: its name.
    """
    return synthesize(
        step.at(folder, "training set"),
        teacher,
        step.experiment.training.examples,
        draw=f"i{number}-training",
        synthetic_pool=synthetic_pool,
        seed_pool=seed_pool,
    )

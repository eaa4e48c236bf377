"""Tailor a teacher to a student (the paper's Figure 2); methods with a preference signal share these steps."""

from dataclasses import dataclass
from pathlib import Path

from montessori_core import layout
from montessori_core.data.sources import Task
from tasks.approval import WhenUnapproved, check_approval
from tasks.influence import collect_influence
from tasks.run import ApiModel, Model
from tasks.stage import Step
from tasks.students import train_student
from tasks.synthesis import SynthesisResult, synthesize
from tasks.teachers import collect_preferences, update_teacher


@dataclass(frozen=True)
class ProbingSet:
    """A probing set, rows `first` to `last` of the synthesized examples, and its warm student."""

    synthesized: SynthesisResult
    student: Model
    first: int
    last: int


@dataclass(frozen=True)
class TailoringResult:
    """Results of tailoring: the updated teacher, its training set, and the files behind the update."""

    probed: ProbingSet
    influence: Path
    preferences: Path
    teacher: Model
    training: SynthesisResult


def tailor(
    step: Step,
    number: int,
    teacher: Model,
    student: Model | None,
    synthetic_pool: Path | None,
    when_unapproved: WhenUnapproved | None = None,
) -> TailoringResult:
    """Measure the influence of the teacher's data, update the teacher with DPO, and let it write the training set.

    Args:
        step: the iteration.
        number: index of the iteration; its random draws depend on it.
        teacher: teacher of the last iteration, or the initial teacher.
        student: student of the last iteration, with its moments; None: warm up a student.
        synthetic_pool: training set of the last iteration.
        when_unapproved: what to do with pairs that are not approved; None: they need no approval.
    """
    probed = probe(step, number, teacher, student, synthetic_pool)
    influence = measure(step, probed)
    preferences = collect_preferences(step, probed.synthesized.examples, influence)
    if when_unapproved is not None:
        check_approval(step.run, number, influence, preferences, when_unapproved)
    keep = step.experiment.comparison.teacher_checkpoints
    updated = update_teacher(step.at("teacher", "teacher update"), teacher, preferences, keep=keep)
    training = write_training_set(step, updated, number, synthetic_pool)
    return TailoringResult(probed, influence, preferences, updated, training)


def probe(
    step: Step, number: int, teacher: Model, student: Model | None = None, synthetic_pool: Path | None = None
) -> ProbingSet:
    """Let the teacher write the probing set of an iteration; without a student, warm one up on its first examples."""
    experiment = step.experiment
    warming = experiment.warmup.examples if student is None else 0
    probing = experiment.influence.probing_examples if student is None else experiment.influence.later_probing_examples
    synthesized = write_probing_set(step, number, teacher, warming, probing, synthetic_pool)
    if student is None:
        warmup = step.at("warmup", "student warm-up")
        student = train_student(warmup, synthesized.examples, experiment.warmup, warming, save_moments=True)
    return ProbingSet(synthesized, student, warming, warming + probing)


def write_probing_set(
    step: Step, number: int, teacher: Model, warming: int, probing: int, synthetic_pool: Path | None = None
) -> SynthesisResult:
    """Let the teacher write an iteration's `warming` examples of the warm-up and, after them, `probing` probing examples."""
    synthesis = step.renamed(f"{step.label}: {'warm-up and ' if warming else ''}probing set")
    return synthesize(synthesis, teacher, warming + probing, draw=f"i{number}-probing", synthetic_pool=synthetic_pool)


def measure(step: Step, probed: ProbingSet) -> Path:
    """Measure the local data influence of a probing set."""
    measuring, examples = step.at("influence", "influence of the probing set"), probed.synthesized.examples
    return collect_influence(measuring, probed.student, examples, probed.first, probed.last, paired=True)


def measure_training_set(step: Step, student: Model, examples: Path) -> Path | None:
    """Measure the influence of the first `comparison.influence_examples` of a training set; None if that is 0."""
    count = step.experiment.comparison.influence_examples
    if not count:
        (step.folder / layout.TRAINING_INFLUENCE).unlink(missing_ok=True)  # of an earlier configuration
        return None
    return collect_influence(
        step.at("training-influence", "influence of the training set"), student, examples, 0, count
    )


def write_training_set(
    step: Step,
    teacher: Model | ApiModel,
    number: int = 1,
    synthetic_pool: Path | None = None,
    seed_pool: list[Task] | None = None,
    folder: str = "training",
    answerer: Model | None = None,
) -> SynthesisResult:
    """Let a teacher write a training set in a folder of the step; all methods have the same prompts.

    The set may repeat examples of the probing set, as in the authors' code: only a tailored teacher has a probing set, and
    without repeats its training set would lack what it writes most often.

    Args:
        step: step of the set.
        teacher: a model, or one behind an API.
        number: index of the iteration.
        synthetic_pool: training set of the last iteration.
        seed_pool: demonstrations of the prompts; None: the run's seed pool.
        folder: name of the folder.
        answerer: model that answers in place of the one of `synthesis.answers`.
    """
    return synthesize(
        step.at(folder, "training set"),
        teacher,
        step.experiment.training.examples,
        draw=f"i{number}-training",
        synthetic_pool=synthetic_pool,
        seed_pool=seed_pool,
        answerer=answerer,
    )

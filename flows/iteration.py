"""One iteration of Montessori-Instruct, top to bottom as in the paper's Figure 2."""

from dataclasses import asdict, dataclass
from pathlib import Path

from prefect import flow

from flows.methods.tailoring import ProbingSet, tailor, write_training_set
from flows.teacher_checkpoints import evaluate_checkpoints
from montessori_core import layout
from montessori_core.program import Row
from tasks.benchmarks import check_contamination, compare_answers
from tasks.evaluation import StudentEvaluation, evaluate
from tasks.influence import collect_influence
from tasks.metrics import IterationBenchmarks, IterationFiles, write_metrics
from tasks.run import Model, Run
from tasks.stage import Step
from tasks.students import train_student
from tasks.synthesis import SynthesisResult


@dataclass(frozen=True)
class Iteration:
    """What an iteration hands to the next.

    Attributes:
        teacher: the updated teacher.
        student: the student trained on its data.
        training: that data.
        evaluated: what students are worth, by their name.
    """

    teacher: Model
    student: Model
    training: SynthesisResult
    evaluated: dict[str, StudentEvaluation]


@dataclass(frozen=True)
class Unmodified:
    """What the unmodified teacher's data is worth: the data, and the student trained on it."""

    training: SynthesisResult
    evaluated: StudentEvaluation


@flow(flow_run_name="{run.experiment.name}: unmodified teacher", validate_parameters=False)
def unmodified_teacher(run: Run, probed: ProbingSet) -> Unmodified:
    """Train a student on as many examples of the unmodified teacher, from the same prompts as iteration 1.

    The influence of its examples is measured on the same warm student as that of the updated teacher's (Figure 3d).
    """
    step, recipe = Step(run, run.folder / layout.UNMODIFIED, "unmodified teacher"), run.experiment.training
    training = write_training_set(step, run.initial_teacher())
    student = train_student(step.at("student", "student training"), training.examples, recipe, recipe.examples)
    _measure_training_influence(step, probed.student, training.examples)
    return Unmodified(training, evaluate(step.at("evaluation"), student))


def _measure_training_influence(step: Step, student: Model, examples: Path) -> Path | None:
    """The influence of the first examples of a training set, unless that is switched off."""
    count = step.experiment.comparison.influence_examples
    if not count:
        return None
    return collect_influence(
        step.at("training-influence", "influence of the training set"), student, examples, 0, count
    )


@flow(flow_run_name="{run.experiment.name}: iteration {number}", validate_parameters=False)
def iteration(run: Run, number: int, previous: Iteration | None, approve: bool, continued: bool) -> Iteration:
    """Tailor the teacher to the student once, and train the student on what the teacher then writes.

    Args:
        run: the run.
        number: of the iteration, counted from 1.
        previous: what the iteration before left.
        approve: wait for a person before the teacher update.
        continued: a later iteration goes on from the student.
    """
    experiment, step = run.experiment, Step.iteration(run, number)
    tailored = tailor(
        step,
        number,
        previous.teacher if previous else run.initial_teacher(),
        previous.student if previous else None,
        previous.training.examples if previous else None,
        approve,
    )
    examples, recipe = tailored.training.examples, experiment.training
    training = step.at("student", "student training")
    trained = train_student(training, examples, recipe, recipe.examples, save_moments=continued)
    training_influence = _measure_training_influence(step, tailored.probed.student, examples)
    evaluated = {"student": evaluate(step.at("evaluation"), trained)}
    if previous is not None:
        evaluated |= {part: one for part, one in previous.evaluated.items() if part in ("untrained", "unmodified")}
        evaluated["previous"] = previous.evaluated["student"]
    else:
        untrained = Step(run, run.folder / layout.UNTRAINED, "untrained student")
        evaluated["untrained"] = evaluate(untrained, run.initial_student())
        if experiment.comparison.unmodified_teacher:
            evaluated["unmodified"] = unmodified_teacher(run, tailored.probed).evaluated
    trajectory = []
    if experiment.comparison.teacher_checkpoints:
        pool = previous.training.examples if previous else None
        trajectory = evaluate_checkpoints(run, number, tailored, evaluated["student"], pool)
    write_metrics(
        run,
        number,
        IterationFiles(
            tailored.probed.synthesized,
            tailored.influence,
            tailored.preferences,
            tailored.training,
            training_influence,
            {part: one.losses for part, one in evaluated.items()},
        ),
        trajectory,
        IterationBenchmarks(
            {part: one.benchmarks.scores for part, one in evaluated.items()},
            _head_to_head(run, number, evaluated),
            check_contamination(run, f"{step.label}: copies", step.folder / "contamination.json", examples),
        ),
    )
    return Iteration(tailored.teacher, trained, tailored.training, evaluated)


def _head_to_head(run: Run, number: int, evaluated: dict[str, StudentEvaluation]) -> list[Row]:
    """The student's answers against those of the unmodified teacher's student and of the last iteration's (Figure 4)."""
    own = evaluated["student"].benchmarks.answers
    if own is None:
        return []
    others = {part: evaluated[part].benchmarks.answers for part in ("unmodified", "previous") if part in evaluated}
    rows = []
    for part, answers in others.items():
        if answers is not None:
            against = Step.iteration(run, number).at(f"head-to-head/{part}", f"student against {part}")
            rates = compare_answers(against, own, answers)
            prompts = run.experiment.benchmarks.judge_prompts
            rows.append({"model": "student", "against": part, "judge_prompts": prompts, **asdict(rates)})
    return rows

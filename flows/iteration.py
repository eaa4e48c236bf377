"""One iteration of Montessori-Instruct, in the order of the paper's Figure 2."""

from dataclasses import asdict, dataclass

from prefect import flow

from flows.methods.tailoring import ProbingSet, measure_training_set, tailor, write_training_set
from flows.teacher_checkpoints import evaluate_checkpoints
from montessori_core import layout
from montessori_core.program import Row
from tasks.approval import WhenUnapproved
from tasks.benchmarks import check_contamination, compare_answers
from tasks.evaluation import StudentEvaluation, evaluate
from tasks.metrics import IterationBenchmarks, IterationFiles, write_metrics
from tasks.run import Model, Run
from tasks.stage import Step
from tasks.students import train_on_set
from tasks.synthesis import SynthesisResult


@dataclass(frozen=True)
class Iteration:
    """Results that an iteration passes to the next.

    Attributes:
        teacher: updated teacher.
        student: student trained on the updated teacher's data.
        training: training set of the updated teacher.
        evaluated: evaluations of students, by name.
    """

    teacher: Model
    student: Model
    training: SynthesisResult
    evaluated: dict[str, StudentEvaluation]


@flow(flow_run_name="{run.experiment.name}: unmodified teacher", validate_parameters=False)
def unmodified_teacher(run: Run, probed: ProbingSet) -> tuple[StudentEvaluation, list[Row]]:
    """Train a student on as many examples of the unmodified teacher, from the prompts of iteration 1, and evaluate it.

    Also return what the examples share with evaluation data.
    Their influence is measured on the same warm student as that of the updated teacher's examples (Figure 3d).
    """
    step = Step(run, run.folder / layout.UNMODIFIED, "unmodified teacher")
    training = write_training_set(step, run.initial_teacher())
    student = train_on_set(step, training.examples)
    measure_training_set(step, probed.student, training.examples)
    copies = check_contamination(step, training.examples, "unmodified teacher's training set")
    return evaluate(step.at("evaluation"), student), copies


@flow(flow_run_name="{run.experiment.name}: iteration {number}", validate_parameters=False)
def iteration(
    run: Run, number: int, previous: Iteration | None, when_unapproved: WhenUnapproved | None, continued: bool
) -> Iteration:
    """Tailor the teacher to the student, and train the student on the updated teacher's data.

    Args:
        run: the run.
        number: index of the iteration, from 1.
        previous: results of the last iteration; None in the first.
        when_unapproved: what to do with preference pairs that are not approved; None: they need no approval.
        continued: whether a later iteration starts from the student.
    """
    experiment, step = run.experiment, Step.iteration(run, number)
    pool = previous.training.examples if previous else None
    tailored = tailor(
        step,
        number,
        previous.teacher if previous else run.initial_teacher(),
        previous.student if previous else None,
        pool,
        when_unapproved,
    )
    examples = tailored.training.examples
    trained = train_on_set(step, examples, save_moments=continued)
    training_influence = measure_training_set(step, tailored.probed.student, examples)
    evaluated = {"student": evaluate(step.at("evaluation"), trained)}
    copies = check_contamination(step, examples)
    if previous is not None:
        evaluated |= {
            name: previous.evaluated[name] for name in ("untrained", "unmodified") if name in previous.evaluated
        }
        evaluated["previous"] = previous.evaluated["student"]
    else:
        untrained = Step(run, run.folder / layout.UNTRAINED, "untrained student")
        evaluated["untrained"] = evaluate(untrained, run.initial_student())
        if experiment.comparison.unmodified_teacher:
            evaluated["unmodified"], copies_of_unmodified = unmodified_teacher(run, tailored.probed)
            copies += copies_of_unmodified
    checkpoints = []
    if experiment.comparison.teacher_checkpoints:
        checkpoints = evaluate_checkpoints(run, number, tailored.teacher, evaluated["student"], pool)
    write_metrics(
        run,
        number,
        IterationFiles(
            tailored.probed.synthesized,
            tailored.influence,
            tailored.preferences,
            tailored.training,
            training_influence,
            {name: evaluation.losses for name, evaluation in evaluated.items()},
        ),
        checkpoints,
        IterationBenchmarks(
            {name: evaluation.benchmarks.scores for name, evaluation in evaluated.items()},
            _compare_with_others(run, number, evaluated),
            copies,
        ),
    )
    return Iteration(tailored.teacher, trained, tailored.training, evaluated)


def _compare_with_others(run: Run, number: int, evaluated: dict[str, StudentEvaluation]) -> list[Row]:
    """Compare the student's answers with those of the unmodified teacher's and the last iteration's student (Figure 4)."""
    student_answers = evaluated["student"].benchmarks.answers
    if student_answers is None:
        return []
    others = {name: evaluated[name].benchmarks.answers for name in ("unmodified", "previous") if name in evaluated}
    rows = []
    for name, answers in others.items():
        if answers is not None:
            step = Step.iteration(run, number).at(f"head-to-head/{name}", f"student against {name}")
            rates = compare_answers(step, student_answers, answers)
            prompts = run.experiment.benchmarks.judge_prompts
            rows.append({"model": "student", "against": name, "judge_prompts": prompts, **asdict(rates)})
    return rows

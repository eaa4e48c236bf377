"""One iteration of Montessori-Instruct, top to bottom as in the paper's Figure 2."""

from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from tasks.approval import approve_update
from tasks.evaluation import evaluate
from tasks.influence import collect_influence
from tasks.metrics import IterationFiles, write_metrics
from tasks.run import Model, Run
from tasks.students import train_student
from tasks.synthesis import Synthesized, synthesize
from tasks.teachers import collect_preferences, update_teacher


@dataclass(frozen=True)
class Iteration:
    """What an iteration hands to the next.

    Attributes:
        teacher: the updated teacher.
        student: the student trained on its data.
        training: that data.
        losses: held-out loss tables by the name of the model.
    """

    teacher: Model
    student: Model
    training: Synthesized
    losses: dict[str, Path]


@dataclass(frozen=True)
class Unmodified:
    """What the unmodified teacher's data is worth: the data, and the held-out loss of the student trained on it."""

    training: Synthesized
    loss: Path


@flow(flow_run_name="{run.experiment.name}: unmodified teacher", validate_parameters=False)
def unmodified_teacher(run: Run, earlier: list[Path]) -> Unmodified:
    """Train a student on as many examples of the unmodified teacher, from the same prompts as iteration 1."""
    experiment, folder = run.experiment, run.folder / "unmodified"
    label = "unmodified teacher"
    training = synthesize(
        run,
        folder / "training",
        f"{label}: training set",
        run.first_teacher(),
        count=experiment.training.examples,
        draw="i1-training",
        earlier=earlier,
        synthetic_pool=None,
    )
    student = train_student(
        run,
        folder / "student",
        f"{label}: student training",
        training.examples,
        experiment.training,
        experiment.training.examples,
        save_moments=False,
    )
    return Unmodified(training, evaluate(run, folder / "evaluation", f"{label}: held-out loss", student))


@flow(flow_run_name="{run.experiment.name}: iteration {number}", validate_parameters=False)
def iteration(run: Run, number: int, previous: Iteration | None, approve: bool) -> Iteration:
    """Tailor the teacher to the student once, and train the student on what the teacher then writes."""
    experiment, folder = run.experiment, run.iteration(number)
    name = f"iteration {number}"
    teacher = previous.teacher if previous else run.first_teacher()
    synthetic_pool = previous.training.examples if previous else None

    # The unmodified teacher's first examples warm the student (iteration 1 only); the next are probed.
    warming = experiment.warmup.examples if previous is None else 0
    probing = experiment.influence.probing_examples if previous is None else experiment.influence.later_probing_examples
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
    if previous is None:
        student = train_student(
            run,
            folder / "warmup",
            f"{name}: student warm-up",
            synthesized.examples,
            experiment.warmup,
            warming,
            save_moments=True,
        )
    else:
        student = previous.student

    influence = collect_influence(
        run,
        folder / "influence",
        folder / "influence.parquet",
        f"{name}: influence of the probing set",
        student,
        synthesized.examples,
        warming,
        warming + probing,
    )
    preferences = collect_preferences(run, number, synthesized.examples, influence)
    if approve:
        approve_update(run, number, influence, preferences)
    updated = update_teacher(run, number, teacher, preferences)

    training = synthesize(
        run,
        folder / "training",
        f"{name}: training set",
        updated,
        count=experiment.training.examples,
        draw=f"i{number}-training",
        earlier=[synthesized.examples],
        synthetic_pool=synthetic_pool,
    )
    trained = train_student(
        run,
        folder / "student",
        f"{name}: student training",
        training.examples,
        experiment.training,
        experiment.training.examples,
        save_moments=True,
    )

    training_influence = None
    if experiment.comparison.influence_examples:
        training_influence = collect_influence(
            run,
            folder / "training-influence",
            folder / "training-influence.parquet",
            f"{name}: influence of the training set",
            student,
            training.examples,
            0,
            experiment.comparison.influence_examples,
        )
    losses = {"student": evaluate(run, folder / "evaluation", f"{name}: held-out loss", trained)}
    if previous is not None:
        losses |= {part: table for part, table in previous.losses.items() if part in ("untrained", "unmodified")}
        losses["previous"] = previous.losses["student"]
    else:
        losses["untrained"] = evaluate(
            run, run.folder / "untrained", "untrained student: held-out loss", run.first_student()
        )
        if experiment.comparison.unmodified_teacher:
            losses["unmodified"] = unmodified_teacher(run, [synthesized.examples]).loss
    write_metrics(
        run, number, IterationFiles(synthesized, influence, preferences, training, training_influence, losses)
    )
    return Iteration(updated, trained, training, losses)

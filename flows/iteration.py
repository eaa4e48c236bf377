"""One iteration of Montessori-Instruct, top to bottom as in the paper's Figure 2."""

from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from flows.methods.self_instruct import imitate_seeds
from flows.methods.tailoring import tailor
from tasks.evaluation import evaluate
from tasks.influence import collect_influence
from tasks.metrics import IterationFiles, write_metrics
from tasks.run import Model, Run
from tasks.students import train_student
from tasks.synthesis import Synthesized


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
    training = imitate_seeds(run, folder / "training", label, earlier)
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
    tailored = tailor(
        run,
        number,
        previous.teacher if previous else run.first_teacher(),
        previous.student if previous else None,
        previous.training.examples if previous else None,
        approve,
    )
    trained = train_student(
        run,
        folder / "student",
        f"{name}: student training",
        tailored.training.examples,
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
            tailored.probed.student,
            tailored.training.examples,
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
            losses["unmodified"] = unmodified_teacher(run, [tailored.probed.synthesized.examples]).loss
    write_metrics(
        run,
        number,
        IterationFiles(
            tailored.probed.synthesized,
            tailored.influence,
            tailored.preferences,
            tailored.training,
            training_influence,
            losses,
        ),
    )
    return Iteration(tailored.teacher, trained, tailored.training, losses)

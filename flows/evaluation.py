"""The evaluation of any model, without a run: `montessori evaluate` and the flow of that name."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from cluster.lock import only_driver
from flows.experiment import end_jobs_of, run_root
from montessori_core.config import RUN_NAME, Experiment, FolderName, Teacher
from montessori_core.files import write_json
from tasks.benchmarks import list_items
from tasks.evaluation import evaluate as evaluate_student
from tasks.evaluation import summarize_loss
from tasks.run import Run, open_run
from tasks.stage import Step

RESULT = "evaluation.json"


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook, after an evaluation was cancelled: end what jobs its driver could not end itself."""
    end_jobs_of(run_root() / flow_run.parameters["name"])


@flow(name="evaluate", flow_run_name="{name}", on_cancellation=[end_jobs])
def evaluate(
    experiment: Experiment, model: str, name: Annotated[FolderName, Field(pattern=RUN_NAME)] = "evaluation"
) -> None:
    """Evaluate a model: held-out loss, and the benchmarks of the configuration. The same name again goes on after a failure.

    Args:
        experiment: its evaluation set, benchmarks, judge, student (length, no model) and cluster are what counts.
        model: folder or Hugging Face id of the model.
        name: of the evaluation, and of its folder.
    """
    run, _ = open_evaluation(experiment, model, run_root() / name)
    _evaluate(run)


@flow(flow_run_name="{run.experiment.name}", validate_parameters=False)
def evaluate_opened(run: Run) -> None:
    """The same for an evaluation whose folder is open already."""
    _evaluate(run)


def open_evaluation(experiment: Experiment, model: str, folder: Path) -> tuple[Run, list[str]]:
    """Create the folder of an evaluation, or open it if it is of the same model and settings; also return warnings.

    Raises:
        UserError: something is wrong; the message says what and how to mend it. Nothing has been computed then.
    """
    sections = {
        "name": folder.name,
        "teacher": Teacher(model=model),
        "student": experiment.student.model_copy(update={"model": model, "revision": None}),
    }
    return open_run(experiment.model_copy(update=sections), folder)


def _evaluate(run: Run) -> None:
    with only_driver(run.folder):
        list_items(run)
        evaluated = evaluate_student(Step(run, run.folder / "evaluation", run.experiment.name), run.initial_student())
        loss = summarize_loss(evaluated.losses)
        result = {
            "model": run.experiment.student.model,
            "held_out_loss": loss,
            "scores": evaluated.benchmarks.scores,
        }
        write_json(result, run.folder / RESULT)

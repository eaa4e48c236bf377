"""Evaluate any model without a run: `montessori evaluate` and the flow `evaluate`."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from cluster.lock import only_driver
from flows.experiment import end_jobs_of, log_warnings, run_root
from montessori_core.config import RUN_NAME, Experiment, FolderName, Teacher
from montessori_core.files import write_json
from tasks.benchmarks import list_items
from tasks.evaluation import evaluate as evaluate_student
from tasks.evaluation import summarize_loss
from tasks.run import Run, open_run
from tasks.stage import Step

RESULT = "evaluation.json"
_NAME = "evaluation"


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """End the remaining jobs of a cancelled evaluation (Prefect hook)."""
    end_jobs_of(flow_run.parameters.get("name", _NAME), flow_run)


@flow(name="evaluate", flow_run_name="{name}", on_cancellation=[end_jobs])
def evaluate(experiment: Experiment, model: str, name: Annotated[FolderName, Field(pattern=RUN_NAME)] = _NAME) -> None:
    """Evaluate a model: held-out loss, and the benchmarks of the configuration. The same name again resumes an evaluation.

    Args:
        experiment: provides the evaluation set, benchmarks, judge, student settings (not its model) and cluster.
        model: folder or Hugging Face id of the model.
        name: name of the evaluation and of its folder.
    """
    run, warnings = open_evaluation(experiment, model, run_root() / name)
    log_warnings(warnings)
    _evaluate(run)


@flow(flow_run_name="{run.experiment.name}", validate_parameters=False)
def evaluate_opened(run: Run) -> None:
    """Run an opened evaluation."""
    _evaluate(run)


def open_evaluation(experiment: Experiment, model: str, folder: Path) -> tuple[Run, list[str]]:
    """Create the folder of an evaluation, or open it if model and settings are the same; also return warnings.

    Raises:
        UserError: an input is invalid; the message names it and the remedy. Nothing has been computed yet.
    """
    student = experiment.student.model_copy(update={"model": model, "revision": None})
    teacher = Teacher(
        model=model, chat_template=student.chat_template, chat_template_kwargs=student.chat_template_kwargs
    )
    sections = {"name": folder.name, "teacher": teacher, "student": student}
    return open_run(experiment.model_copy(update=sections), folder)


def _evaluate(run: Run) -> None:
    with only_driver(run.folder):
        list_items(run)
        evaluated = evaluate_student(Step(run, run.folder / "evaluation", run.experiment.name), run.initial_student())
        loss = summarize_loss(evaluated.losses)
        result = {"model": run.experiment.student.model, "held_out_loss": loss, "scores": evaluated.benchmarks.scores}
        write_json(result, run.folder / RESULT)

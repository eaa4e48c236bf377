"""The evaluation of any model, without a run: `montessori evaluate` and the flow of that name."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from pydantic import Field
from rich.console import Console
from rich.table import Table

from flows.experiment import end_jobs_of, run_root
from montessori_core.atomic import read_json, write_json
from montessori_core.config import RUN_NAME, Experiment, FolderName, Teacher
from tasks.benchmarks import list_items
from tasks.evaluation import evaluate as evaluate_student
from tasks.evaluation import summarize_loss
from tasks.run import Run, only_driver, open_run
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
        evaluated = evaluate_student(Step(run, run.folder / "evaluation", run.experiment.name), run.first_student())
        loss = summarize_loss(evaluated.losses)
        result = {
            "model": run.experiment.student.model,
            "held_out_loss": loss,
            "scores": evaluated.benchmarks.scores,
        }
        write_json(result, run.folder / RESULT)


def print_evaluation(folder: Path, console: Console) -> None:
    """Print the result of an evaluation, with 95 % confidence intervals."""
    result = read_json(folder / RESULT)
    table = Table("benchmark", "metric", "score", "95 % interval", "over", "unparsed", box=None)
    loss = result["held_out_loss"]
    table.add_row("held-out", "loss, nats per token", *_numbers(loss["mean"], loss["standard_error"]))
    for one in result["scores"]:
        counts = str(one["examples"]), str(one["unparsed"] or "")
        table.add_row(one["benchmark"], one["metric"], *_numbers(one["mean"], one["standard_error"]), *counts)
    console.print(table)
    console.print(f"written to {folder / RESULT}; every item beside it, in Parquet", soft_wrap=True)


def _numbers(mean: float | None, error: float | None) -> tuple[str, str]:
    if mean is None:
        return "-", ""
    return f"{mean:.4f}", "" if error is None else f"{mean - 1.96 * error:.4f} to {mean + 1.96 * error:.4f}"

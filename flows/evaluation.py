"""Evaluate any model without a run: `montessori evaluate` and the flow `evaluate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from pydantic import Field

from cluster.backends import open_backend
from cluster.lock import no_driver, only_driver
from flows.experiment import end_jobs_of, log_warnings, run_root
from flows.state_watch import watched_state
from montessori_core import layout
from montessori_core.config import (
    RUN_NAME,
    Experiment,
    FolderName,
    Influence,
    StageResources,
    Student,
    Synthesis,
    Used,
    parse_experiment,
    read_experiment,
    used_of_model,
    without_other_revision,
    write_yaml,
)
from montessori_core.data.bad_rows import BadRow, write_bad_rows
from montessori_core.data.origins import Origin, write_origins
from montessori_core.data.sources import Task, load_tasks, read_tasks, write_tasks
from montessori_core.data.tables import open_parquet
from montessori_core.errors import UserError
from montessori_core.export.card_scores import Evaluated, add_scores
from montessori_core.export.published import name_of, public_names
from montessori_core.files import read_json, write_json
from montessori_core.models.fetch import commit_of
from montessori_core.models.thinking import thinking_warning
from montessori_core.provenance import write_provenance
from tasks.benchmark_files import check_benchmarks, copied_benchmarks
from tasks.benchmarks import list_items
from tasks.changed_settings import differences_of_method
from tasks.evaluation import evaluate as evaluate_student
from tasks.evaluation import summarize_loss
from tasks.gpu_check import idle_gpus
from tasks.resume import STUDY, command_of, command_to_evaluate, record_command, refusal_of_changes, refuse_other_files
from tasks.run import Model, Run, check_environment, revision_name
from tasks.stage import Step
from tasks.students import check_student, open_student

RESULT = "evaluation.json"
_NAME = "evaluation"
_USED: Used = {
    "": (
        Experiment,
        ("name", "seed", "student", "evaluation", "synthesis", "influence", "judge", "benchmarks", "cluster"),
    ),
    "student": (Student, ("model", "revision", "max_length", "chat_template", "chat_template_kwargs")),
    "synthesis": (Synthesis, ("engine", "engine_options", "instructions_per_shard")),
    "influence": (Influence, ("reference_batch_tokens",)),
    "cluster.resources": (StageResources, ("generation", "evaluation", "judging")),
}
"""The fields of a configuration that an evaluation uses, by the path of their section; all fields of other sections."""


@dataclass(frozen=True)
class Evaluation:
    """An opened evaluation.

    Attributes:
        run: its folder and its configuration, whose student is the model.
        model: the model.
    """

    run: Run
    model: Model


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
    content = without_other_revision(experiment.model_dump(mode="json"), model)
    used = evaluated_experiment(content, model, name, "experiment")
    evaluation, warnings = open_evaluation(used, run_root() / name)
    log_warnings(warnings)
    _evaluate(evaluation)


@flow(flow_run_name="{evaluation.run.experiment.name}", validate_parameters=False)
def evaluate_opened(evaluation: Evaluation) -> None:
    """Run an opened evaluation."""
    _evaluate(evaluation)


def evaluated_experiment(content: Mapping[str, Any], model: str, name: str, source: str) -> Experiment:
    """Return the configuration of a model's evaluation; only settings that it uses are checked.

    Args:
        content: a configuration as plain data.
        model: folder or Hugging Face id of the model.
        name: name of the evaluation.
        source: names the configuration in errors.

    Raises:
        ConfigError: a setting that is used is not valid, or there is no such setting.
    """
    return parse_experiment(used_of_model(content, _USED, model) | {"name": name}, source)


def open_evaluation(experiment: Experiment, folder: Path) -> tuple[Evaluation, list[str]]:
    """Create the folder of an evaluation, or open it if model and settings are the same; also return warnings.

    Files are read again: if their content has changed, what depends on it is computed again.

    Args:
        experiment: see `evaluated_experiment`.
        folder: of the evaluation.

    Raises:
        UserError: an input is invalid; the message names it and the remedy. Nothing has been computed yet.
    """
    experiment.cluster.resources.refuse_idle_processes(() if experiment.asks_api else ("judging",))
    commits, config = _check_folder(experiment, folder), folder / layout.CONFIG
    if not config.exists():
        experiment.benchmarks.refuse_equal_files()
    run, bad_rows, origins = Run(folder.resolve(), experiment), list[BadRow](), dict[str, Origin]()
    examples = read_tasks(experiment.evaluation, "evaluation", True, bad_rows, origins)
    check_benchmarks(experiment.benchmarks, {})
    check_environment(experiment)
    student, name = experiment.student, revision_name(experiment.student)
    pinned = student.model_copy(update={"revision": commits.get(name, student.revision)})
    commit = commit_of(check_student(pinned))
    folder.mkdir(parents=True, exist_ok=True)
    with no_driver(folder):
        model = open_student(pinned, run.folder)
        warnings = [*thinking_warning("evaluation.path", examples), *idle_gpus(experiment.cluster)]
        changed = [*_copy_examples(examples, bad_rows, run), *_changed_model(run, model)]
        if changed or (config.exists() and read_experiment(config).benchmarks != experiment.benchmarks):
            (folder / RESULT).unlink(missing_ok=True)
        warnings += changed
        with copied_benchmarks(experiment.benchmarks, run.folder / layout.SOURCES, {}):
            pass
        write_json({} if commit is None else {name: commit}, folder / layout.MODEL_COMMITS)
        write_origins(origins, folder / layout.ORIGINS)
        write_provenance(folder, {"student": model.sha256})
        command = command_to_evaluate(student.model, folder)
        record_command(folder, command, student.model, folder / RESULT, experiment.cluster)
        write_yaml(experiment, config)
    open_backend(experiment.cluster, experiment.cluster.resources.evaluation, None).prepare()
    return Evaluation(run, model), warnings


def _check_folder(experiment: Experiment, folder: Path) -> dict[str, str]:
    """Check that a folder is new or of this evaluation; return the commit of its model, if that is on a hub.

    Raises:
        UserError: it is of something else, or of an evaluation with other settings.
    """
    config, command = folder / layout.CONFIG, command_of(folder)
    if command is None and (config.exists() or (folder / STUDY).exists()):
        raise UserError(f"{folder} holds a run or a study; give the evaluation another --name")
    if command is None:
        refuse_other_files(folder)
    if command is None or not config.exists():
        return {}
    changed = differences_of_method(read_experiment(config), experiment)
    if changed := [line for line in changed if not line.startswith("teacher.")]:  # it is the student's model
        raise refusal_of_changes(folder, changed)
    return read_json(folder / layout.MODEL_COMMITS) or {}


def _copy_examples(examples: list[Task], bad_rows: list[BadRow], run: Run) -> list[str]:
    """Copy the evaluation set to the folder of an evaluation; return a warning if another one was there."""
    copy = run.source_file("evaluation")
    changed = copy.exists() and load_tasks(copy) != examples
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_tasks(examples, copy)
    write_bad_rows(bad_rows, copy.parent)
    if not changed:
        return []
    return [
        f"evaluation.path: {run.experiment.evaluation.path} has changed since the last evaluation named "
        f"{run.experiment.name}; the held-out loss is computed again. To keep both results, use another --name"
    ]


def _changed_model(run: Run, model: Model) -> list[str]:
    """Return a warning if the model is another than at the last evaluation in a folder."""
    before = (read_json(run.folder / layout.PROVENANCE) or {}).get("student_sha256")
    if before in (None, model.sha256):
        return []
    return [
        f"{run.experiment.student.model} has changed since the last evaluation named {run.experiment.name}; it is evaluated "
        "again. To keep both results, use another --name"
    ]


def _evaluate(evaluation: Evaluation) -> None:
    run = evaluation.run
    with watched_state(), only_driver(run.folder):
        list_items(run)
        evaluated = evaluate_student(Step(run, run.folder / "evaluation", run.experiment.name), evaluation.model)
        loss = summarize_loss(evaluated.losses)
        result = {"model": run.experiment.student.model, "held_out_loss": loss, "scores": evaluated.benchmarks.scores}
        write_json(result, run.folder / RESULT)
        _write_card(run, evaluated.losses, result)


def _write_card(run: Run, losses: Path, result: Mapping[str, Any]) -> None:
    """Write the result of an evaluation into the card of its model, if that is a folder with a card of ours."""
    folder = Path(run.experiment.student.model).expanduser()
    if not folder.is_dir():
        return
    measured = datetime.fromtimestamp(losses.stat().st_mtime, UTC).date().isoformat()  # the same when it is repeated
    with open_parquet(losses) as table:
        examples = table.metadata.num_rows
    data = name_of(run.experiment.evaluation.path, public_names(run.folder, run.experiment))
    loss, scores = result["held_out_loss"], result["scores"]
    add_scores(Evaluated(run.experiment.name, data, measured, examples, loss, scores), folder)

"""A study: methods side by side, each proposing data to the same student, over several seeds."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from cluster.oversight import cancel_jobs, stages_of
from flows.experiment import run_root
from flows.methods import REGISTRY
from flows.methods.environment import Feedback, Method, Round
from montessori_core.atomic import commit, read_json, write_json
from montessori_core.config import write_yaml
from montessori_core.errors import ConfigError, UserError
from montessori_core.report.study import render_study
from montessori_core.schema import EXAMPLES, REFERENCE_LOSS, read_table
from montessori_core.study import Outcome, Study, compare_outcomes
from tasks.evaluation import evaluate
from tasks.run import Run, only_driver, open_run, stage_seconds
from tasks.students import train_student

RESULT, PAGE = "comparison.json", "comparison.html"


def find_method(name: str) -> Method:
    """A method by its name, or your own by module:NAME.

    Raises:
        ConfigError: there is none.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ConfigError(
            f"methods: no method {name!r}; there are {', '.join(REGISTRY)}, or name your own as module:NAME"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"methods: {name}: {error}; the module must be importable where the driver runs") from error
    if not isinstance(found, Method):
        raise ConfigError(f"methods: {name} is no flows.methods.environment.Method")
    return found


def open_study(study: Study, folder: Path) -> tuple[list[Run], list[str]]:
    """Create a study's folder with a run for each seed, or open it if it is the same study; also return warnings.

    Raises:
        UserError: methods, configuration, data, models or folder are wrong; nothing has been computed then.
    """
    for name in study.methods:
        needed = find_method(name).needs
        if needed is not None and getattr(study.experiment, needed) is None:
            raise ConfigError(
                f"methods: {name} needs experiment.{needed}; set its model (and base_url, if it is not OpenAI's), or leave "
                "the method out"
            )
    opened = [open_run(study.seeded(seed), folder / f"seed-{seed}") for seed in study.seeds]
    write_yaml(study, folder / "study.yaml")
    return [run for run, _ in opened], sorted({warning for _, warnings in opened for warning in warnings})


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook, after a study was cancelled: end what jobs its driver could not end itself."""
    study = Study.model_validate(flow_run.parameters["study"])
    for seed in study.seeds:
        folder = run_root() / study.name / f"seed-{seed}"
        for stage in stages_of(folder):
            cancel_jobs(stage, study.experiment.cluster)


@flow(name="compare", flow_run_name="{study.name}", on_cancellation=[end_jobs])
def compare(study: Study) -> None:
    """Compare methods of making training data: the same models, sets, sizes, recipe and seeds for each.

    A study of the same name is continued: what is done is read from its folder, not repeated.

    Args:
        study: methods, seeds, and the experiment that they share.
    """
    folder = run_root() / study.name
    runs, _ = open_study(study, folder)
    _compare(study, folder, runs)


@flow(flow_run_name="{study.name}", validate_parameters=False)
def compare_opened(study: Study, folder: Path, runs: list[Run]) -> None:
    """The same for a study whose folder is open already."""
    _compare(study, folder, runs)


def _compare(study: Study, folder: Path, runs: list[Run]) -> None:
    methods = [find_method(name) for name in study.methods]
    played: dict[str, list[tuple[Path, float]]] = {method.name: [] for method in methods}
    with only_driver(folder):
        for run in runs:
            with only_driver(run.folder):
                for method in methods:
                    own = replace(run, stages=[])
                    last = play(own, method)
                    seconds = sum(stage_seconds(stage) for stage in dict.fromkeys(own.stages))
                    played[method.name].append((last.losses, seconds))
        write_comparison(study, folder, played)


@flow(flow_run_name="{run.experiment.name}: {method.name}", validate_parameters=False)
def play(run: Run, method: Method) -> Feedback:
    """All rounds of a method: it proposes, the student is trained from its first weights, its losses come back.

    Raises:
        UserError: the method proposed less data than every method is given.
    """
    training, rounds = run.experiment.training, method.rounds(run.experiment)
    feedback: Feedback | None = None
    for number in range(1, rounds + 1):
        folder = run.folder / "methods" / method.name / f"round-{number}"
        label = method.name if rounds == 1 else f"{method.name}, round {number}"
        proposal = method.propose(Round(run, folder, label, number, rounds, feedback))
        last = number == rounds
        proposed = read_table(proposal.examples, EXAMPLES).num_rows
        if last and proposed < training.examples:
            raise UserError(f"{label}: {proposed} examples proposed, but all methods train on {training.examples}")
        student = train_student(
            run,
            folder / "student",
            f"{label}: student training",
            proposal.examples,
            training,
            training.examples,
            save_moments=not last,
        )
        losses = evaluate(run, folder / "evaluation", f"{label}: held-out loss", student)
        feedback = Feedback(proposal, student, losses)
    assert feedback is not None
    return feedback


@task(task_run_name="comparison", cache_policy=NO_CACHE, persist_result=False)
def write_comparison(study: Study, folder: Path, played: dict[str, list[tuple[Path, float]]]) -> None:
    """Write `comparison.json` and `comparison.html` of a study."""
    outcomes = []
    for method, of_seeds in played.items():
        tables = [read_table(losses, REFERENCE_LOSS) for losses, _ in of_seeds]
        losses = np.stack([table["loss"].to_numpy() / table["response_tokens"].to_numpy() for table in tables])
        outcomes.append(Outcome(method, losses, np.array([seconds for _, seconds in of_seeds])))
    rows = compare_outcomes(outcomes, find_method(study.baseline).name)
    write_json({"study": study.name, "seeds": study.seeds, "methods": rows}, folder / RESULT)
    with commit(folder / PAGE) as temporary:
        temporary.write_text(render_study(study, rows), encoding="utf-8")
    shown = [{key: value for key, value in row.items() if key != "gain_of_seeds"} for row in rows]
    create_table_artifact(shown, description=f"Comparison of methods: {study.name}")


def read_comparison(folder: Path) -> dict[str, Any]:
    """The result of a study.

    Raises:
        UserError: it has none yet.
    """
    result: dict[str, Any] | None = read_json(folder / RESULT)
    if result is None:
        raise UserError(f"{folder}: no result yet; montessori compare goes on with the study")
    return result

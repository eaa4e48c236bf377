"""A study: methods side by side, each proposing data to the same student, over several seeds."""

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from cluster.lock import driver_of, only_driver
from cluster.status import cancel_jobs, stages_of
from cluster.usage import use_of
from flows.experiment import run_root
from flows.methods import REGISTRY
from flows.methods.method import Feedback, Method, Proposal, Round
from montessori_core import layout
from montessori_core.config import RUN_NAME, Study, write_yaml
from montessori_core.data.tables import EXAMPLES, REFERENCE_LOSS, read_table
from montessori_core.errors import ConfigError, UserError
from montessori_core.evaluation.scores import judged_benchmark, mean_over_seeds, win_rate_scores
from montessori_core.evaluation.statistics import Outcome, compare_outcomes
from montessori_core.files import write_json
from montessori_report.study_page import study_page
from tasks.benchmarks import compare_answers, list_items
from tasks.evaluation import StudentEvaluation, evaluate, per_token, summarize_loss
from tasks.run import Model, Run, open_run
from tasks.stage import Step
from tasks.students import train_student
from tasks.studies import PAGE, RESULT, STUDY


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
        raise ConfigError(f"methods: {name} is no flows.methods.method.Method")
    return found


@dataclass(frozen=True)
class SeedRuns:
    """The run of a seed, and a run for each other student that its data is tried on."""

    run: Run
    others: list[Run]


def open_study(study: Study, folder: Path) -> tuple[list[SeedRuns], list[str]]:
    """Create a study's folder with the runs of each seed, or open it if it is the same study; also return warnings.

    Raises:
        UserError: methods, configuration, data, models or folder are wrong; nothing has been computed then.
    """
    _check_methods(study)
    seeded: list[SeedRuns] = []
    warnings: set[str] = set()
    for seed in study.seeds:
        own = folder / f"seed-{seed}"
        opened = [open_run(study.seeded(seed), own)]
        opened += [
            open_run(study.seeded(seed, student), own / f"student-{number}")
            for number, student in enumerate(study.transfer, 1)
        ]
        seeded.append(SeedRuns(opened[0][0], [run for run, _ in opened[1:]]))
        warnings.update(warning for _, of_run in opened for warning in of_run)
    if len(seeded[0].run.sources().evaluation) < 2:
        raise ConfigError("experiment.evaluation: a comparison needs at least two evaluation examples; raise its limit")
    for method in map(find_method, study.methods):
        if method.check is not None:
            method.check(seeded[0].run)
    write_yaml(study, folder / STUDY)
    return seeded, sorted(warnings)


def _check_methods(study: Study) -> None:
    methods = {name: find_method(name) for name in study.methods}
    for name, method in methods.items():
        if method.needs is not None and getattr(study.experiment, method.needs) is None:
            raise ConfigError(
                f"methods: {name} needs experiment.{method.needs}; set its model (and base_url, if it is not OpenAI's), or "
                "leave the method out"
            )
        if not re.fullmatch(RUN_NAME, method.name) or [own.name for own in methods.values()].count(method.name) > 1:
            raise ConfigError(
                f"methods: {name}: its name {method.name!r} is another method's too, or no name of a folder; rename it"
            )
        if method.trains_student and study.experiment.student.lora is not None:
            raise ConfigError(
                f"methods: {name} trains all weights of the student; leave it out, or set student.lora: null"
            )
    if study.transfer and methods[study.baseline].trains_student:
        raise ConfigError(f"transfer: {study.baseline} has no data to try on other students; name another baseline")


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook, after a study was cancelled: end what jobs its driver could not end itself."""
    study = Study.model_validate(flow_run.parameters["study"])
    if driver_of(run_root() / study.name) is not None:
        return  # somebody else's: this flow run was refused, or cancelled before it drove anything
    for stage in stages_of(run_root() / study.name):
        cancel_jobs(stage, study.experiment.cluster)


@flow(name="compare", flow_run_name="{study.name}", on_cancellation=[end_jobs])
def compare(study: Study) -> None:
    """Compare methods of making training data: the same models, sets, sizes, recipe and seeds for each.

    A study of the same name is continued: what is done is read from its folder, not repeated.

    Args:
        study: methods, seeds, and the experiment that they share.
    """
    folder = run_root() / study.name
    seeded, _ = open_study(study, folder)
    _compare(study, folder, seeded)


@flow(flow_run_name="{study.name}", validate_parameters=False)
def compare_opened(study: Study, folder: Path, seeded: list[SeedRuns]) -> None:
    """The same for a study whose folder is open already."""
    _compare(study, folder, seeded)


@dataclass(frozen=True)
class Cost:
    """Of all jobs: seconds, and floating-point operations."""

    seconds: float
    flops: int

    @staticmethod
    def of(*runs: Run) -> "Cost":
        """Of the stages executed by way of some runs."""
        stages = [stage for run in runs for stage in dict.fromkeys(run.stages)]
        uses = list(map(use_of, stages))
        return Cost(sum(use.seconds for use in uses), sum(use.flops for use in uses))


Played = dict[str, list[tuple[StudentEvaluation, Cost]]]
"""Of each method, by seed: what its student is worth, and the cost."""


def _compare(study: Study, folder: Path, seeded: list[SeedRuns]) -> None:
    methods = [find_method(name) for name in study.methods]
    played: list[Played] = [{method.name: [] for method in methods} for _ in range(1 + len(study.transfer))]
    with only_driver(folder):
        first = seeded[0].run
        for one in seeded:
            for run in (one.run, *one.others):
                list_items(run)
        untrained = evaluate(
            Step(first, folder.resolve() / layout.UNTRAINED, "untrained student"), first.initial_student()
        )
        for one in seeded:
            with only_driver(one.run.folder):
                for method in methods:
                    own = replace(one.run, stages=[])
                    last = run_method(own, method)
                    played[0][method.name].append((last.evaluated, Cost.of(own)))
                    for number, other in enumerate([] if method.trains_student else one.others, 1):
                        tried = replace(other, stages=[])
                        evaluated = transfer(tried, method, last.proposal)
                        played[number][method.name].append((evaluated, Cost.of(own, tried)))
                _against_baseline(study, one.run, {name: of_seeds[-1][0] for name, of_seeds in played[0].items()})
        write_comparison(study, folder, untrained.losses, played)


def _against_baseline(study: Study, run: Run, evaluated: dict[str, StudentEvaluation]) -> None:
    """Add how each method's answers to AlpacaEval's instructions fare against the baseline's (Table 1)."""
    baseline = find_method(study.baseline).name
    others = evaluated[baseline].benchmarks.answers
    benchmark = judged_benchmark("alpaca_eval", run.experiment.benchmarks.judge_prompts)
    for name, one in evaluated.items():
        if others is not None and one.benchmarks.answers is not None and name != baseline:
            folder = run.folder / "methods" / name / f"against-{baseline}"
            against = Step(run, folder, f"{name}: against {baseline}")
            rates = compare_answers(against, one.benchmarks.answers, others)
            one.benchmarks.scores.extend(win_rate_scores(f"{benchmark} against {baseline}", rates))


def transfer(run: Run, method: Method, proposal: Proposal) -> StudentEvaluation:
    """What another student is worth, trained on the data that a method proposed (Section 5.4)."""
    step = Step(run, run.folder / method.name, f"{method.name}, to {run.folder.name}")
    return evaluate(step.at("evaluation"), _train(step, proposal))


def _train(step: Step, proposal: Proposal, save_moments: bool = False) -> Model:
    """The run's student, trained from its first weights on as many of the proposed examples as every method is given."""
    recipe, training = step.experiment.training, step.at("student", "student training")
    return train_student(training, proposal.examples, recipe, recipe.examples, save_moments)


@flow(flow_run_name="{run.experiment.name}: {method.name}", validate_parameters=False)
def run_method(run: Run, method: Method) -> Feedback:
    """All rounds of a method: it proposes, the student is trained from its first weights, its losses come back.

    Raises:
        UserError: the method proposed less data than every method is given.
    """
    wanted, rounds = run.experiment.training.examples, method.rounds(run.experiment)
    feedback: Feedback | None = None
    for number in range(1, rounds + 1):
        folder = run.folder / "methods" / method.name / f"round-{number}"
        label = method.name if rounds == 1 else f"{method.name}, round {number}"
        step = Step(run, folder, label)
        proposal = method.propose(Round(step, number, rounds, feedback))
        last = number == rounds
        proposed = read_table(proposal.examples, EXAMPLES).num_rows
        if last and not method.trains_student and proposed < wanted:
            raise UserError(f"{label}: {proposed} examples proposed, but all methods train on {wanted}")
        student = proposal.student or _train(step, proposal, save_moments=not last)
        feedback = Feedback(proposal, student, evaluate(step.at("evaluation"), student))
    assert feedback is not None
    return feedback


@task(task_run_name="comparison", cache_policy=NO_CACHE, persist_result=False)
def write_comparison(study: Study, folder: Path, untrained: Path, played: list[Played]) -> None:
    """Write `comparison.json` and `comparison.html` of a study; `played` is of its student, and of each other."""
    baseline = find_method(study.baseline).name
    rows, *of_others = (compare_outcomes(_outcomes(of_student), baseline) for of_student in played)
    for row in rows:
        row["scores"] = mean_over_seeds([one.benchmarks.scores for one, _ in played[0][row["method"]]])
    result = {
        "study": study.name,
        "seeds": study.seeds,
        "untrained_loss": summarize_loss(untrained)["mean"],
        "methods": rows,
        "transfer": [
            {"student": student.model, "methods": own} for student, own in zip(study.transfer, of_others, strict=True)
        ],
    }
    write_json(result, folder / RESULT)
    study_page(study, result, folder).write(folder / PAGE)
    shown = [{key: value for key, value in row.items() if key not in ("gain_of_seeds", "scores")} for row in rows]
    create_table_artifact(shown, description=f"Comparison of methods: {study.name}")


def _outcomes(played: Played) -> list[Outcome]:
    outcomes = []
    for method, of_seeds in played.items():
        if not of_seeds:
            continue
        tables = [read_table(evaluated.losses, REFERENCE_LOSS) for evaluated, _ in of_seeds]
        if any(table["example_id"] != tables[0]["example_id"] for table in tables):
            raise UserError(
                "the seeds of this study were evaluated on different examples: the evaluation set was changed after the "
                "first of them; give the study another name"
            )
        losses = np.stack([per_token(table) for table in tables])
        costs = [cost for _, cost in of_seeds]
        seconds, operations = (
            np.array([cost.seconds for cost in costs]),
            np.array([float(cost.flops) for cost in costs]),
        )
        outcomes.append(Outcome(method, losses, seconds, operations))
    return outcomes

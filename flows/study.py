"""A study: compare methods that propose data to the same student, over several seeds."""

import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow

from cluster.fanout import ShardsFailed
from cluster.lock import only_driver
from flows.disk import warn_of_study
from flows.driver_job import check_driver_job, drive_by_job
from flows.experiment import end_jobs_in, log_warnings, run_root
from flows.learning import follow_teacher
from flows.methods import REGISTRY
from flows.methods.method import Feedback, Method, Proposal, Round
from flows.methods.montessori import MONTESSORI
from flows.state_watch import watched_state
from flows.study_result import Cost, EqualTokens, MethodResults, StudyOutcome, write_comparison
from montessori_core import layout
from montessori_core.config import RUN_NAME, Experiment, Study, read_yaml, write_yaml
from montessori_core.data.sources import Sources
from montessori_core.data.tables import EXAMPLES, read_table
from montessori_core.errors import ConfigError, UserError
from montessori_core.evaluation.scores import judged_benchmark, win_rate_scores
from montessori_core.files import hash_path, read_json
from montessori_core.formatting import is_finite, task_name
from montessori_core.program import Row, load
from tasks.benchmarks import check_contamination, compare_answers, list_items, warn_of_references
from tasks.evaluation import StudentEvaluation, evaluate, measure_loss, summarize_loss
from tasks.resume import STUDY, command_to_compare, refuse_command_folder, run_root_option, seeds_of
from tasks.run import Model, Run, open_run, take_lock
from tasks.stage import Step, warn
from tasks.students import train_on_set, train_student
from tasks.studies import RESULT
from tasks.tracking import start_tracking, track_method


def find_method(name: str) -> Method:
    """Return a method of the registry by its name, or a user's method by `module:NAME`.

    Raises:
        ConfigError: no such method.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if ":" not in name:
        raise ConfigError(f"methods: no method {name!r}; available: {', '.join(REGISTRY)}, or your own as module:NAME")
    try:
        method = load(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: no module, or a relative one
        raise ConfigError(f"methods: {name}: {error}; the module must be importable where the driver runs") from error
    if not isinstance(method, Method):
        raise ConfigError(f"methods: {name} is not a flows.methods.method.Method")
    return method


@dataclass(frozen=True)
class SeedRuns:
    """The run of a seed, and a run per transfer student, which is trained on the data of the first."""

    run: Run
    others: list[Run]


def open_study(study: Study, folder: Path) -> tuple[list[SeedRuns], list[str]]:
    """Create a study's folder with the runs of each seed, or open it if the study is the same; also return warnings.

    Raises:
        UserError: methods, configuration, data, models or folder are invalid; nothing has been computed yet.
    """
    _check_methods(study)
    refuse_command_folder(folder)
    with ExitStack() as lock:
        if (folder / STUDY).exists():
            if not (folder / layout.DRIVER_LOCK).exists() and not seeds_of(folder):
                raise UserError(
                    f"{folder}: its {STUDY} is not that of a study that has begun, and is not overwritten: choose another "
                    f"name or {run_root_option()}"
                )
            # Its driver holds the lock of one run at a time, so that a run may seem to have no driver.
            take_lock(folder, lock)
        seeded, warnings = _open_seeds(study, folder)
        if (folder / STUDY).exists() and _compares_otherwise(study, folder / STUDY):
            (folder / RESULT).unlink(missing_ok=True)  # of other methods, seeds or settings: the study is not finished
        write_yaml(study, folder / STUDY)
    return seeded, sorted(warnings)


def _compares_otherwise(study: Study, file: Path) -> bool:
    """Return whether a study differs from that in a file in more than where its jobs run."""
    before, now = read_yaml(file), study.model_dump(mode="json")
    for content in (before, now):
        content["experiment"].pop("cluster", None)
    return before != now


def _open_seeds(study: Study, folder: Path) -> tuple[list[SeedRuns], set[str]]:
    """Open the runs of each seed, and check them; also return warnings. If a check fails, new runs are removed again."""
    seeded: list[SeedRuns] = []
    warnings: set[str] = set()
    with ExitStack() as undo:
        for seed in study.seeds:
            seed_folder = folder / f"seed-{seed}"
            opened = [_open_seed(study.seeded(seed), seed_folder, undo)]
            opened += [
                _open_seed(study.seeded(seed, student), seed_folder / f"student-{number}", undo)
                for number, student in enumerate(study.transfer, 1)
            ]
            seeded.append(SeedRuns(opened[0][0], [run for run, _ in opened[1:]]))
            warnings.update(warning for _, run_warnings in opened for warning in run_warnings)
        _refuse_other_inputs(seeded)
        if len(seeded[0].run.sources().evaluation) < 2:
            raise ConfigError(
                "experiment.evaluation: a comparison needs at least two evaluation examples; raise its limit"
            )
        for method in map(find_method, study.methods):
            if method.check is not None:
                method.check(seeded[0].run)
        undo.pop_all()
    return seeded, warnings


def _open_seed(experiment: Experiment, folder: Path, undo: ExitStack) -> tuple[Run, list[str]]:
    """Open a run of a study. If the run is new, `undo` gets its removal: a corrected study may have other settings."""
    is_new, has_folder = not (folder / layout.CONFIG).exists(), folder.exists()
    run, warnings = open_run(experiment, folder)
    if not has_folder:
        undo.callback(shutil.rmtree, run.folder)
    elif is_new:
        undo.callback((run.folder / layout.CONFIG).unlink)  # without it, a folder is no run
    return run, warnings


def _refuse_other_inputs(seeded: list[SeedRuns]) -> None:
    """Refuse seeds that were opened with different data or models: a study's gains are means over its seeds.

    Raises:
        UserError: a run has other data or models than the runs of the first seed.
    """
    first = seeded[0]
    sets = _sets(first.run)
    for seed in seeded:
        for run, same in zip((seed.run, *seed.others), (first.run, *first.others), strict=True):
            differ = (_sets(run).items() ^ sets.items()) | (_models(run).items() ^ _models(same).items())
            if differ:
                names = ", ".join(sorted({name for name, _ in differ}))
                raise UserError(
                    f"{run.folder} has different inputs from {first.run.folder}: {names}. All seeds of a study share the "
                    f"inputs of its start. Restore the original files and delete {run.folder} if it exists, or give the "
                    "study another name"
                )


def _sets(run: Run) -> dict[str, str]:
    """Return the hashes of the copies of a run's data sets, and of its documents' passages, by name."""
    files = {name: run.source_file(name) for name in (*Sources.__annotations__, "passages")}
    return {name: hash_path(file) for name, file in files.items() if file.exists()}


def _models(run: Run) -> dict[str, str]:
    """Return the hashes of a run's initial models, by role, and the commits of its models of the hub, by name."""
    provenance, commits = (read_json(run.folder / name) or {} for name in (layout.PROVENANCE, layout.MODEL_COMMITS))
    return {role: provenance[f"{role}_sha256"] for role in ("teacher", "student")} | commits


def _check_methods(study: Study) -> None:
    methods = {name: find_method(name) for name in study.methods}
    names = [method.name for method in methods.values()]
    for name, method in methods.items():
        if method.needs is not None and getattr(study.experiment, method.needs) is None:
            raise ConfigError(
                f"methods: {name} needs experiment.{method.needs}; set its model (and base_url, if it is not OpenAI's), or "
                "leave the method out"
            )
        if not re.fullmatch(RUN_NAME, method.name) or names.count(method.name) > 1:
            raise ConfigError(
                f"methods: {name}: its name {method.name!r} is taken or not a valid folder name; rename it"
            )
        if method.trains_student and study.experiment.student.lora is not None:
            raise ConfigError(
                f"methods: {name} trains all weights of the student; leave it out, or set student.lora: null"
            )
        if method.trains_student and study.experiment.training.response_tokens is not None:
            raise ConfigError(
                f"methods: {name} trains its student itself, on any number of response tokens; leave it out, or set "
                "training.response_tokens: null"
            )
    if study.transfer and methods[study.baseline].trains_student:
        raise ConfigError(f"transfer: {study.baseline} proposes no data for other students; name another baseline")
    if study.equal_response_tokens and methods[study.baseline].trains_student:
        raise ConfigError(
            f"equal_response_tokens: {study.baseline} trains its student itself, on any number of response tokens; name "
            "another baseline"
        )


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """End the remaining jobs of a cancelled study (Prefect hook)."""
    study = Study.model_validate(flow_run.parameters["study"])
    end_jobs_in(run_root() / study.name, study.experiment.cluster, flow_run)


@flow(name="compare", flow_run_name="{study.name}", on_cancellation=[end_jobs])
def compare(study: Study, submit_driver: bool = False) -> None:
    """Compare methods of making training data with the same models, sets, sizes, recipe and seeds.

    A study of the same name is resumed: finished work is read from its folder, not repeated.

    Args:
        study: methods, seeds, and the experiment that they share.
        submit_driver: run the driver as a Slurm job (study.experiment.cluster.slurm.driver) that this flow run waits for.
    """
    folder = (run_root() / study.name).resolve()

    def start() -> list[SeedRuns]:
        seeded, warnings = open_study(study, folder)
        log_warnings([*warnings, *warn_of_study(study, [seeded[0].run, *seeded[0].others], folder)])
        return seeded

    if submit_driver:
        check_driver_job(study.experiment.cluster)
        drive_by_job(folder, start, command_to_compare(folder), study.experiment.cluster.slurm)
    else:
        _compare(study, folder, start())


@flow(flow_run_name="{study.name}", validate_parameters=False)
def compare_opened(study: Study, folder: Path, seeded: list[SeedRuns]) -> None:
    """Run an opened study."""
    _compare(study, folder, seeded)


def _compare(study: Study, folder: Path, seeded: list[SeedRuns]) -> None:
    methods, baseline = [find_method(name) for name in study.methods], find_method(study.baseline).name
    # Results of the study's student, then of each transfer student.
    results: list[MethodResults] = [{method.name: [] for method in methods} for _ in range(1 + len(study.transfer))]
    proposed: dict[str, list[Path]] = {method.name: [] for method in methods}
    copies: dict[str, list[list[Row]]] = {method.name: [] for method in methods}
    equal = EqualTokens([], {method.name: [] for method in methods if not method.trains_student})
    learned: list[Row] = []
    with watched_state(), only_driver(folder):
        first = seeded[0].run
        for seed in seeded:
            for run in (seed.run, *seed.others):
                list_items(run)
        warn_of_references(first)
        untrained = evaluate(
            Step(first, folder.resolve() / layout.UNTRAINED, "untrained student"), first.initial_student()
        )
        for seed in seeded:
            with only_driver(seed.run.folder):
                start_tracking(seed.run.folder, seed.run.experiment)
                ended: dict[str, Feedback] = {}
                stages: dict[str, list[Path]] = {}
                for method in methods:
                    method_run = replace(seed.run, stages=[])
                    last = ended[method.name] = run_method(method_run, method)
                    stages[method.name], cost = method_run.stages, Cost.of(method_run)
                    results[0][method.name].append((last.evaluated, cost))
                    track_method(seed.run.folder, seed.run.experiment, method.name, _numbers(last.evaluated, cost))
                    proposed[method.name].append(last.proposal.examples)
                    if last.evaluated.benchmarks.scores:
                        step = Step(seed.run, seed.run.method(method.name), method.name)
                        copies[method.name].append(check_contamination(step, last.proposal.examples))
                    for number, other in enumerate([] if method.trains_student else seed.others, 1):
                        transfer_run = replace(other, stages=[])
                        evaluated = transfer(transfer_run, method, last.proposal)
                        results[number][method.name].append((evaluated, Cost.of(method_run, transfer_run)))
                _compare_with_baseline(baseline, seed.run, {name: pairs[-1][0] for name, pairs in results[0].items()})
                if MONTESSORI.name in ended:
                    two = {name: ended[name] for name in (MONTESSORI.name, baseline)}
                    learned.append(follow_teacher(seed.run, two, baseline, stages[MONTESSORI.name]))
                if study.equal_response_tokens:
                    limit, losses = train_on_equal_tokens(
                        seed.run, {name: ended[name] for name in equal.results}, baseline
                    )
                    equal.limits.append(limit)
                    for name, table in losses.items():
                        equal.results[name].append((table, results[0][name][-1][1]))
        outcome = StudyOutcome(untrained, results, proposed, copies, equal, learned)
        write_comparison(study, folder, baseline, outcome)


def _numbers(evaluated: StudentEvaluation, cost: Cost) -> dict[str, float]:
    """Return the numbers of a method's student for trackers; those that are not finite are left out."""
    scores = {f"{task_name(row['benchmark'])}/{row['metric']}": row["mean"] for row in evaluated.benchmarks.scores}
    numbers = {"held_out_loss": summarize_loss(evaluated.losses)["mean"], "seconds": cost.seconds, **scores}
    return {name: number for name, number in numbers.items() if is_finite(number)}


def _compare_with_baseline(baseline: str, run: Run, evaluated: dict[str, StudentEvaluation]) -> None:
    """Add the win rates of each method's answers to AlpacaEval's instructions against the baseline's (Table 1)."""
    baseline_answers = evaluated[baseline].benchmarks.answers
    title = judged_benchmark("alpaca_eval", run.experiment.benchmarks.judge_prompts)
    for name, evaluation in evaluated.items():
        benchmarks = evaluation.benchmarks
        if baseline_answers is not None and benchmarks.answers is not None and name != baseline:
            folder = run.method(name) / f"against-{baseline}"
            step = Step(run, folder, f"{name}: against {baseline}")
            rates = compare_answers(step, benchmarks.answers, baseline_answers)
            benchmarks.scores.extend(win_rate_scores(f"{title} against {baseline}", rates))


def transfer(run: Run, method: Method, proposal: Proposal) -> StudentEvaluation:
    """Train another student on the data that a method proposed, and evaluate it (Section 5.4)."""
    step = Step(run, run.folder / method.name, f"{method.name}, to {run.folder.name}")
    return _evaluate(step, train_on_set(step, proposal.examples))


def _evaluate(step: Step, student: Model) -> StudentEvaluation:
    """Evaluate the student of a method. Its stages do not count for the method's cost: all methods pay the same."""
    uncounted = replace(step, run=replace(step.run, stages=[]))
    return evaluate(uncounted.at("evaluation"), student)


def train_on_equal_tokens(run: Run, ended: dict[str, Feedback], baseline: str) -> tuple[int, dict[str, Path]]:
    """Train the student on the first examples of each method within the response tokens of the method that has the fewest.

    Methods that cannot be compared are left out with a warning: the main comparison does not depend on them.

    Args:
        run: the run of a seed.
        ended: the last round of each method.
        baseline: name of the method without which there is no comparison.

    Returns:
        The number of response tokens, and the table of held-out losses of each method's student.
    """
    tokens = _with_enough_tokens(ended)
    losses: dict[str, Path] = {}
    limit = min(tokens.values(), default=0)
    for name in tokens if baseline in tokens else ():
        feedback = ended[name]
        if tokens[name] == limit:
            losses[name] = feedback.evaluated.losses
            continue
        step = Step(run, run.method(name) / "equal-tokens", f"{name}, {limit:,} response tokens")
        recipe = feedback.proposal.recipe or run.experiment.training
        within = recipe.model_copy(update={"response_tokens": limit})
        try:
            student = train_student(step.at("student"), feedback.proposal.examples, within, recipe.examples)
            losses[name] = measure_loss(step.at("evaluation"), student)
        except ShardsFailed as error:
            warn(step.label, f"left out of the comparison at equal response tokens: {error}")
    return limit, losses


def _with_enough_tokens(ended: dict[str, Feedback]) -> dict[str, int]:
    """Return the response tokens of methods by name, without those that have fewer than the first batch of another one."""
    paths = {name: Path(feedback.student.path) / layout.COUNTS_FILE for name, feedback in ended.items()}
    counts = {name: read_json(path) or {} for name, path in paths.items()}
    tokens = {name: count.get("response_tokens", 0) for name, count in counts.items()}
    for name in sorted(tokens, key=lambda name: tokens[name]):
        most = max(counts[other].get("response_tokens_of_first_batch", 1) for other in tokens)
        if tokens[name] >= most:
            break
        problem = f"its training set has {tokens.pop(name)} response tokens, a batch of another {most}"
        warn(name, f"left out of the comparison at equal response tokens: {problem}")
    return tokens


@flow(flow_run_name="{run.experiment.name}: {method.name}", validate_parameters=False)
def run_method(run: Run, method: Method) -> Feedback:
    """Run all rounds of a method: it proposes data, the student is trained from its initial weights and evaluated.

    Raises:
        UserError: the method proposed fewer examples than the students train on.
    """
    required, rounds = run.experiment.training.examples, method.rounds(run.experiment)
    feedback: Feedback | None = None
    for number in range(1, rounds + 1):
        folder = run.method(method.name) / f"round-{number}"
        label = method.name if rounds == 1 else f"{method.name}, round {number}"
        step = Step(run, folder, label)
        proposal = method.propose(Round(step, number, rounds, feedback))
        last = number == rounds
        proposed = read_table(proposal.examples, EXAMPLES).num_rows
        if last and not method.trains_student and proposed < required:
            raise UserError(f"{label}: {proposed} examples proposed, but all methods train on {required}")
        student = proposal.student or train_on_set(step, proposal.examples, not last, proposal.recipe)
        feedback = Feedback(proposal, student, _evaluate(step, student), feedback)
    assert feedback is not None
    return feedback

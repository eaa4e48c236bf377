"""A run: its folder, configuration and data sets; opening and checking it."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.backends import open_backend
from cluster.lock import no_driver
from cluster.scripts import check_jobs
from cluster.stage import Stage
from montessori_core import layout
from montessori_core.config import (
    CodeRunsFilter,
    Experiment,
    GroundedStrategy,
    Influence,
    SemanticFilter,
    Student,
    Teacher,
    read_experiment,
    write_yaml,
)
from montessori_core.data.bad_rows import BadRow, write_bad_rows
from montessori_core.data.origins import Origin, origin_of, write_origins
from montessori_core.data.sources import Sources, Task, check_sources, load_tasks, read_sources, write_tasks
from montessori_core.errors import UserError
from montessori_core.files import commit, hash_path, read_json, write_json
from montessori_core.models.adapters import check_adapter
from montessori_core.models.fetch import commit_of, fetch_model, fingerprint
from montessori_core.models.positions import check_positions
from montessori_core.models.templates import TEMPLATE, configured_template, with_template
from montessori_core.models.thinking import thinking_warning
from montessori_core.models.weight_names import check_weight_files
from montessori_core.program import Program, SettingsT
from montessori_core.provenance import write_provenance
from montessori_core.synthesis.filtering import check_filters
from montessori_core.synthesis.prompts import check_decoding
from montessori_core.synthesis.sandbox import check_isolation
from montessori_core.synthesis.strategies.opened import check_strategy, read_documents
from montessori_core.tracking.trackers import check_trackers
from montessori_core.versions import check_versions
from tasks.benchmark_files import (
    benchmark_copy,
    check_benchmarks,
    copied_benchmarks,
    current_copies,
    overlap_warnings,
    remove_copies,
)
from tasks.changed_settings import changed_settings, first_stage
from tasks.gpu_check import idle_gpus, memory_warnings
from tasks.resume import is_opened, refuse_other_files, run_root_option

_PASSAGES = "passages"


@dataclass(frozen=True)
class Model:
    """A model as an input of a stage: folder or model name, and content hash."""

    path: str
    sha256: str

    @staticmethod
    def of(folder: Path) -> "Model":
        """Return the model in a folder.

        Raises:
            UserError: a file is missing or damaged, or names of weights are wrong.
        """
        check_weight_files(folder)
        return Model(str(folder), fingerprint(folder))


@dataclass(frozen=True)
class ApiModel:
    """A model behind an API, by the section of the configuration with its endpoint."""

    section: Literal["strong_teacher", "answerer"]


def stage_of(
    program: Program[SettingsT],
    settings: SettingsT,
    folder: Path,
    models: Mapping[str, Model],
    files: Mapping[str, Path],
    unkeyed_files: Mapping[str, Path] | None = None,
) -> Stage:
    """Return the stage that computes a program in a folder.

    Args:
        program, settings, folder: see `Stage.of`.
        models: models the program loads, by input name.
        files: files the program reads, by input name.
        unkeyed_files: files the program reads that do not enter the key, by input name.
    """
    folders = {name: Path(model.path) for name, model in models.items() if Path(model.path).is_dir()}
    hashes = {name: model.sha256 for name, model in models.items()}
    return Stage.of(
        program,
        settings,
        folder,
        inputs={**folders, **files, **(unkeyed_files or {})},
        input_hashes=hashes | {name: hash_path(path) for name, path in files.items()},
    )


@dataclass(frozen=True)
class Run:
    """One experiment on disk; its folder holds all of its state.

    Attributes:
        folder: the run folder.
        experiment: the configuration.
        stages: folders of the stages that this object executed, to compute their cost.
    """

    folder: Path
    experiment: Experiment
    stages: list[Path] = field(default_factory=list, compare=False)

    def sources(self) -> Sources:
        """Return the data sets as they were when the run started."""
        return Sources(*(load_tasks(self.source_file(name)) for name in Sources.__annotations__))

    def source_file(self, name: str) -> Path:
        """Return the path of a data set's copy in the run folder."""
        return self.folder / layout.SOURCES / f"{name}.jsonl"

    def passages(self) -> list[Task]:
        """Return the passages of the strategy's documents as they were when the run started; none if it has none."""
        path = self.source_file(_PASSAGES)
        return load_tasks(path) if path.exists() else []

    def filter_model(self, entry: SemanticFilter) -> Model:
        """Return the model of a filter."""
        commits = read_json(self.folder / layout.MODEL_COMMITS) or {}
        return Model.of(fetch_model(entry.model, commits.get(revision_name(entry), entry.revision)))

    def benchmark_file(self, setting: str) -> Path:
        """Return the path of the copy of a file or folder of the section `benchmarks`."""
        return benchmark_copy(self.experiment.benchmarks, setting, self.folder / layout.SOURCES)

    def iteration(self, number: int) -> Path:
        """Return the folder of an iteration, counted from 1."""
        return self.folder / layout.iteration(number)

    def method(self, name: str) -> Path:
        """Return the folder of a method, if the run is a seed of a study."""
        return self.folder / layout.METHODS / name

    @property
    def finished(self) -> bool:
        """Whether all iterations have finished, and the report shows them."""
        iterations = map(self.iteration, range(1, self.experiment.iterations + 1))
        return (self.folder / layout.REPORT).exists() and all((path / layout.METRICS).exists() for path in iterations)

    def initial_teacher(self) -> Model:
        """Return the configured teacher."""
        return self._configured(self.experiment.teacher)

    def initial_student(self) -> Model:
        """Return the configured student."""
        return self._configured(self.experiment.student)

    def _configured(self, section: Teacher | Student) -> Model:
        # A branch on the hub may move during a run; the run keeps the commit it started with.
        commits = read_json(self.folder / layout.MODEL_COMMITS) or {}
        folder = fetch_model(section.model, commits.get(revision_name(section), section.revision))
        role = _role(section)
        template = _template_copy(self.folder, role)
        if template.exists():
            folder = with_template(folder, template.read_text(encoding="utf-8"), self.folder / layout.MODELS / role)
        return Model.of(folder)


def open_run(experiment: Experiment, folder: Path) -> tuple[Run, list[str]]:
    """Create the folder of a run, or open it if the configuration matches; also return warnings.

    Settings that affect only influence and later stages may change: earlier stages keep their keys and results.
    Configuration, data, models and folder are checked here, before any job.

    Raises:
        UserError: a check failed; the message names the problem and a remedy.
    """
    # The configuration is written last: without it, copies may be of an unfinished opening.
    opened_before = is_opened(folder)
    with ExitStack() as lock:
        if opened_before:
            take_lock(folder, lock)
        else:
            refuse_other_files(folder)
        run, warnings = _check_and_write(experiment, folder, opened_before, lock)
    if not run.finished:
        open_backend(experiment.cluster, experiment.cluster.resources.generation, None).prepare()
    return run, warnings


def _check_and_write(
    experiment: Experiment, folder: Path, opened_before: bool, lock: ExitStack
) -> tuple[Run, list[str]]:
    """Check a run, then write its folder; a new run is locked in between, so that a failed check leaves no folder."""
    config, copies, opened = folder / layout.CONFIG, folder / layout.SOURCES, folder / layout.OPENED
    changed: list[str] = []
    influence_before: Influence | None = None
    benchmarks, benchmarks_copied = experiment.benchmarks, dict[str, Path]()
    benchmarks_before = benchmarks
    if opened_before:
        before = read_experiment(opened if opened.exists() else config)  # runs of earlier releases have no `opened`
        changed = changed_settings(before, experiment, config)
        influence_before, benchmarks_before = before.influence, before.benchmarks
        benchmarks_copied = current_copies(benchmarks, benchmarks_before, copies)
    run = Run(folder, experiment)
    copied = opened_before and all(run.source_file(name).exists() for name in Sources.__annotations__)
    bad_rows, origins = list[BadRow](), dict[str, Origin]()
    sources = run.sources() if copied else read_sources(experiment, bad_rows, origins)
    warnings = _check_data(sources, experiment)
    documents = run.source_file(_PASSAGES)
    passages_copied = opened_before and documents.exists()
    passages = run.passages() if passages_copied else read_documents(experiment.synthesis)
    check_strategy(experiment.synthesis, experiment.teacher.prompt_style, sources.seed_pool, passages)
    if changed:
        first = first_stage(changed, experiment)
        kept = f"the {first} and later stages are computed again, earlier stages are kept"
        warnings.append("\n  ".join([f"changed settings: {kept}:", *changed]))
    questions = check_benchmarks(benchmarks, benchmarks_copied)
    warnings += overlap_warnings(sources.reference, questions, benchmarks.contamination_words)
    if experiment.influence != influence_before:
        experiment.influence.refuse_small_audit()
    if not opened_before or benchmarks != benchmarks_before:
        benchmarks.refuse_equal_files()
    check_environment(experiment)
    finished = run.finished and not changed and benchmarks == benchmarks_before
    unused = () if experiment.asks_api else ("judging",)
    if not finished:
        experiment.cluster.resources.refuse_idle_processes(unused)
    if experiment.cluster.profile == "slurm" and not finished:
        warnings += check_jobs(experiment.cluster, unused)
    warnings += idle_gpus(experiment.cluster)
    recorded = read_json(folder / layout.MODEL_COMMITS) or {}
    teacher, student = (
        fetch_model(section.model, recorded.get(revision_name(section), section.revision))
        for section in (experiment.teacher, experiment.student)
    )
    commits, templates = _check_models(experiment, teacher, student, recorded)
    if not finished:
        warnings += memory_warnings(experiment, teacher, student)
    if not opened_before:
        take_lock(folder, lock)
        if config.exists():
            raise UserError(f"{folder}: another command has just created this run; run this command again")
    try:
        copies.mkdir(exist_ok=True)
        run = Run(folder.resolve(), experiment)
        if not copied:
            for name in Sources.__annotations__:
                write_tasks(getattr(sources, name), run.source_file(name))
            write_bad_rows(bad_rows, copies)
        if passages and not passages_copied:
            write_tasks(passages, documents)
            if isinstance(experiment.synthesis.strategy, GroundedStrategy):
                origins["documents"] = origin_of(experiment.synthesis.strategy.documents)
        _copy_templates(templates, folder, opened_before)
        write_json(commits, folder / layout.MODEL_COMMITS)
        write_origins(origins, folder / layout.ORIGINS)
        if changed or benchmarks != benchmarks_before:
            _mark_unfinished(folder)
        with copied_benchmarks(benchmarks, copies, benchmarks_copied):
            # A copy is that of the file that `opened` names, also if this ends here.
            remove_copies(benchmarks, copies, benchmarks_copied)
            write_yaml(experiment, opened)
        write_yaml(experiment, config)
        write_provenance(folder, {"teacher": run.initial_teacher().sha256, "student": run.initial_student().sha256})
    except OSError as error:
        raise _unwritable(folder, error) from error
    return run, warnings


def take_lock(folder: Path, lock: ExitStack) -> None:
    """Take the lock of a run or a study: a driver must not find other files than those that it was started with.

    Raises:
        UserError: a driver or another command holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(no_driver(folder))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{error.filename or folder}: cannot be written ({error.strerror or error}); free space or choose another "
        f"{run_root_option()}"
    )


def reopen_run(folder: Path) -> Run:
    """Open the folder of an existing run.

    Raises:
        UserError: the folder is not a run.
    """
    config = folder / layout.CONFIG
    if not config.exists():
        raise UserError(f"{folder}: not a run (no config.yaml); runs are subfolders of {run_root_option()}")
    return Run(folder.resolve(), read_experiment(config))


def check_environment(experiment: Experiment) -> None:
    """Check that jobs can be started here and that installed packages have supported versions.

    Raises:
        UserError: jobs cannot be started, or a package is missing or has an unsupported version.
    """
    check_trackers(experiment.tracking)
    if experiment.cluster.profile != "local":
        check_versions()  # montessori doctor checks the worker environment on the nodes
    else:
        check_versions(["benchmarks" if experiment.benchmarks.tasks else "train"])
        if any(isinstance(entry, CodeRunsFilter) and entry.need_isolation for entry in experiment.synthesis.filters):
            check_isolation()
    for stage, resources in experiment.cluster.resources:
        open_backend(experiment.cluster, resources, None, stage)


def _check_models(
    experiment: Experiment, teacher: Path, student: Path, commits: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Check the folders of teacher and student, and fetch the models of filters.

    Returns:
        The commits of hub models, those in `commits` unchanged; configured chat templates, by role.

    Raises:
        UserError: a model or chat template cannot be loaded, a model is an adapter that the training does not continue, or it
            has fewer positions than `max_length`.
    """
    for folder in (teacher, student):
        check_weight_files(folder)
    check_adapter(teacher, experiment.teacher_update.lora, "teacher_update.lora")
    check_adapter(student, experiment.student.lora, "student.lora")
    check_positions(teacher, experiment.teacher_update.max_length, "teacher_update.max_length")
    check_positions(student, experiment.student.max_length, "student.max_length")
    fetched = {
        revision_name(experiment.teacher): commit_of(teacher),
        revision_name(experiment.student): commit_of(student),
    }
    for entry in experiment.synthesis.filters:
        if isinstance(entry, SemanticFilter):
            name = revision_name(entry)
            fetched[name] = commit_of(fetch_model(entry.model, commits.get(name, entry.revision)))
    templates = {}
    for section, model in ((experiment.teacher, teacher), (experiment.student, student)):
        if (template := configured_template(model, section, _role(section))) is not None:
            templates[_role(section)] = template
    return commits | {name: commit for name, commit in fetched.items() if commit is not None}, templates


def _role(section: Teacher | Student) -> str:
    return "teacher" if isinstance(section, Teacher) else "student"


def _check_data(sources: Sources, experiment: Experiment) -> list[str]:
    """Check the data sets, and the settings that depend on them; return warnings."""
    warnings = check_sources(sources, experiment) + check_decoding(experiment.synthesis)
    for name in ("reference", "evaluation"):
        warnings += thinking_warning(f"{name}.path", getattr(sources, name))
    return warnings + check_filters(experiment.synthesis, sources.seed_pool)


def _mark_unfinished(folder: Path) -> None:
    for path in layout.iterations(folder).values():
        (path / layout.METRICS).unlink(missing_ok=True)


def _copy_templates(templates: Mapping[str, str], folder: Path, opened_before: bool) -> None:
    for role, template in templates.items():
        if not (opened_before and _template_copy(folder, role).exists()):
            with commit(_template_copy(folder, role)) as temporary:
                temporary.write_text(template, encoding="utf-8")


def _template_copy(folder: Path, role: str) -> Path:
    """Return the path of a run's copy of the chat template that is configured for its teacher or student."""
    return folder / layout.SOURCES / f"{role}-{TEMPLATE}"


def revision_name(section: Teacher | Student | SemanticFilter) -> str:
    """Return the name under which the commit of a model is recorded."""
    return f"{section.model}@{section.revision or 'main'}"

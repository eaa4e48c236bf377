"""A run: its folder, its configuration, its sets, and how its stages are executed."""

import fcntl
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from cluster.backends import open_backend
from montessori_core.atomic import commit, read_json, write_json
from montessori_core.benchmarks.alpaca_eval import read_difficulties, read_outputs
from montessori_core.benchmarks.contamination import overlapping
from montessori_core.benchmarks.mt_bench import read_dialogues
from montessori_core.config import (
    Experiment,
    Student,
    Teacher,
    differences,
    read_experiment,
    write_yaml,
)
from montessori_core.errors import UserError
from montessori_core.models import commit_of, fetch_model, fingerprint
from montessori_core.processor import generation_dtype, processor_name
from montessori_core.program import Row
from montessori_core.sources import Sources, Task, check_sources, load_tasks, read_sources, write_tasks
from montessori_core.synthesis.prompts import check_decoding
from montessori_core.versions import check_versions

_DRIVER_PATIENCE = 240.0  # seconds; Slurm's jobs may take two minutes to end
_PROVENANCE = "provenance.json"
_COMMITS = "models.json"  # of the hub's models, by name and revision asked for
_FIRST_STAGES = {
    "preferences.": "preference pairs",
    "teacher_update.": "teacher update",
    "training.examples:": "training set",
    "training.": "student training",
}
"""Settings that a run may change, with the first stage that each decides, in the order of the stages."""
_PACKAGES = ("montessori", "torch", "transformers", "trl", "deepspeed", "vllm", "submitit", "prefect", "pyarrow")


@dataclass(frozen=True)
class Model:
    """A model as an input of a stage: what to load, and the hash that says which it is."""

    path: str
    sha256: str

    @staticmethod
    def of(folder: Path) -> "Model":
        """The model in a folder."""
        return Model(str(folder), fingerprint(folder))


@dataclass(frozen=True)
class Run:
    """One experiment on disk; its folder holds all of its state.

    Attributes:
        folder: of the run.
        experiment: its configuration.
        stages: folders of the stages executed by way of this object, for their cost.
    """

    folder: Path
    experiment: Experiment
    stages: list[Path] = field(default_factory=list, compare=False)

    def sources(self) -> Sources:
        """The sets as they were when the run began."""
        return Sources(*(load_tasks(self.folder / "sources" / f"{name}.jsonl") for name in Sources.__annotations__))

    def source_file(self, name: str) -> Path:
        """The copy of a set in the run's folder."""
        return self.folder / "sources" / f"{name}.jsonl"

    def benchmark_file(self, setting: str) -> Path:
        """The copy of a file or folder that a setting of the section `benchmarks` names."""
        named = Path(getattr(self.experiment.benchmarks, setting))
        return self.folder / "sources" / f"{setting}{named.suffix}"

    def iteration(self, number: int) -> Path:
        """Folder of an iteration, counted from 1."""
        return self.folder / f"iteration-{number}"

    @property
    def finished(self) -> bool:
        """Whether all of its iterations came to their end."""
        return all((self.iteration(n) / "metrics.json").exists() for n in range(1, self.experiment.iterations + 1))

    def first_teacher(self) -> Model:
        """The teacher as configured."""
        return self._configured(self.experiment.teacher)

    def first_student(self) -> Model:
        """The student as configured."""
        return self._configured(self.experiment.student)

    def _configured(self, section: Teacher | Student) -> Model:
        # A branch of a hub may move on while a run lasts; the run stays with the commit it began with.
        commits = read_json(self.folder / _COMMITS) or {}
        return Model.of(fetch_model(section.model, commits.get(_name_of(section), section.revision)))


def open_run(experiment: Experiment, folder: Path) -> tuple[Run, list[str]]:
    """Create the folder of a run, or open it if it is of the same configuration; also return warnings.

    Settings that decide only preference pairs and what follows them may change: stages before keep their keys and results.
    Everything that can be wrong with configuration, data, models and folder is found here, before any job.

    Raises:
        UserError: it is wrong; the message says what and how to mend it.
    """
    config = folder / "config.yaml"
    changed: list[str] = []
    if config.exists():
        changed = _changes(experiment, config)
        _refuse_second_driver(folder)
    begun = Run(folder, experiment)
    complete = all(begun.source_file(name).exists() for name in Sources.__annotations__)
    sources = begun.sources() if complete else read_sources(experiment)
    warnings = check_sources(sources, experiment) + check_decoding(experiment.synthesis)
    if changed:
        warnings.append(
            f"changed settings: all before the {_first_stage(changed, experiment)} is kept, the rest is computed again:\n  "
            + "\n  ".join(changed)
        )
    warnings += _seen_references(sources.reference, _check_benchmarks(begun), experiment.benchmarks.contamination_words)
    check_environment(experiment)
    commits: dict[str, str] = read_json(folder / _COMMITS) or {}
    for section in (experiment.teacher, experiment.student):
        commit = commit_of(fetch_model(section.model, commits.get(_name_of(section), section.revision)))
        if commit is not None:
            commits[_name_of(section)] = commit
    try:
        (folder / "sources").mkdir(parents=True, exist_ok=True)
        run = Run(folder.resolve(), experiment)
        for name in Sources.__annotations__:
            if not complete:
                write_tasks(getattr(sources, name), run.source_file(name))
        _copy_benchmarks(run)
        write_json(commits, folder / _COMMITS)
        if changed:
            for metrics in folder.glob("iteration-*/metrics.json"):
                metrics.unlink()  # the run is not finished any more
        write_yaml(experiment, config)
        write_json(_provenance(run), folder / _PROVENANCE)
    except OSError as error:
        raise UserError(
            f"{folder}: the run's folder cannot be written ({error.strerror}); free space or give another place with "
            "--run-root"
        ) from error
    if not run.finished:
        open_backend(experiment.cluster, experiment.cluster.resources.generation, None).prepare()
    return run, warnings


def reopen_run(folder: Path) -> Run:
    """Open the folder of a run that was started before.

    Raises:
        UserError: it is not one.
    """
    config = folder / "config.yaml"
    if not config.exists():
        raise UserError(f"{folder}: not a run (no config.yaml); runs lie in the folder given as --run-root, by name")
    return Run(folder.resolve(), read_experiment(config))


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the run's lock; two drivers on one run would submit everything twice.

    Raises:
        UserError: another driver holds it.
    """
    path = folder / "driver.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse_second_driver(folder)
            raise UserError(f"{folder}: another process drove this run until just now; try again") from None
        _end_orphaned_servers(read_json(path) or {})
        servers = [[child.pid, child.create_time()] for child in psutil.Process().children(recursive=True)]
        lock.truncate(0)
        lock.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "servers": servers}))
        lock.flush()
        yield


def _refuse_second_driver(folder: Path) -> None:
    holder = driver_of(folder)
    if holder is not None:
        raise UserError(
            f"{folder}: another process drives this run (process {holder['process']} on {holder['host']}); "
            "wait for it or end it"
        )


def driver_of(folder: Path) -> dict[str, Any] | None:
    """The process that drives a run at present, and its host; None if nobody does."""
    try:
        lock = (folder / "driver.lock").open()
    except OSError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_json(folder / "driver.lock") or {"process": "unknown", "host": "unknown"}
    return None


def end_driver(folder: Path) -> bool:
    """Interrupt the process that drives a run, and wait until it has cancelled its jobs; whether there was one.

    Raises:
        UserError: it runs on another host, or does not leave.
    """
    holder = driver_of(folder)
    if holder is None:
        return False
    if holder["host"] != socket.gethostname():
        raise UserError(
            f"{folder}: driven by process {holder['process']} on {holder['host']}; give this command there, or end that "
            "process first"
        )
    os.kill(holder["process"], signal.SIGINT)
    deadline = time.monotonic() + _DRIVER_PATIENCE
    while driver_of(folder) is not None:
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: process {holder['process']} does not leave; end it and give this command again")
        time.sleep(0.2)
    return True


def _end_orphaned_servers(holder: dict[str, Any]) -> None:
    """End the temporary Prefect server of a driver that was killed: nothing else would."""
    if holder.get("host") != socket.gethostname():
        return
    for pid, started in holder["servers"]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == started:
                process.kill()


def _check_benchmarks(run: Run) -> dict[str, list[str]]:
    """See that what the section `benchmarks` names can be used: the run's copies, once it has them.

    Returns:
        The texts that answers are judged on, by the setting that names them.

    Raises:
        UserError: something cannot; the message names it.
    """
    paths = {name: own if (own := run.benchmark_file(name)).exists() else path for name, path in _named(run).items()}
    for setting, path in paths.items():
        if not os.path.exists(path):
            raise UserError(f"benchmarks.{setting}: {path}: not found; correct the path")
    texts: dict[str, list[str]] = {}
    if "alpaca_eval" in paths:
        texts["alpaca_eval"] = [one.instruction for one in read_outputs(paths["alpaca_eval"])]
        outputs = len(texts["alpaca_eval"])
        if "alpaca_eval_difficulty" in paths and len(read_difficulties(paths["alpaca_eval_difficulty"])) != outputs:
            raise UserError(
                f"benchmarks.alpaca_eval_difficulty: {paths['alpaca_eval_difficulty']} is not for the {outputs} instructions "
                f"of {paths['alpaca_eval']}; it is for AlpacaEval's own, in their order: leave it out for others"
            )
    if "mt_bench" in paths:
        dialogues = read_dialogues(paths["mt_bench"], paths.get("mt_bench_references"))
        texts["mt_bench"] = [question for one in dialogues for question in one.questions]
    return texts


def _seen_references(reference: list[Task], texts: Mapping[str, list[str]], words: int) -> list[str]:
    """Return a warning for each benchmark that reference instructions stand in; none if `words` is 0.

    Args:
        reference: what influence is measured on.
        texts: what answers are judged on, by the setting that names it.
        words: an instruction stands in a text that has so many of its words in a row.
    """
    warnings = []
    for setting, items in texts.items() if words else ():
        seen = overlapping([task.text for task in reference], items, words)
        if any(seen):
            warnings.append(
                f"{sum(seen)} of {len(reference)} reference examples also stand in benchmarks.{setting}, e.g. "
                f"{reference[seen.index(True)].id}: influence is measured on what students are tested on, so that their "
                "scores there say nothing about other tasks"
            )
    return warnings


def _named(run: Run) -> dict[str, Path]:
    """Files and folders that settings of the section `benchmarks` name."""
    settings = ("task_folder", "alpaca_eval", "alpaca_eval_difficulty", "mt_bench", "mt_bench_references")
    named = {setting: getattr(run.experiment.benchmarks, setting) for setting in settings}
    return {setting: Path(os.path.expanduser(path)) for setting, path in named.items() if path is not None}


def _copy_benchmarks(run: Run) -> None:
    """Keep what the section `benchmarks` names as it is when it is first used."""
    for setting, path in _named(run).items():
        own = run.benchmark_file(setting)
        if not own.exists():
            with commit(own) as temporary:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, temporary)


def check_environment(experiment: Experiment) -> None:
    """See that jobs can be started here, and that what the driver and local jobs import is fit, before any is started.

    Raises:
        UserError: it is not.
    """
    if experiment.cluster.profile == "slurm":
        check_versions()  # the worker environment is on the nodes: montessori doctor looks at it
    else:
        check_versions(["benchmarks" if experiment.benchmarks.tasks else "train"])
    for _, resources in experiment.cluster.resources:
        open_backend(experiment.cluster, resources, None)


def _changes(experiment: Experiment, config: Path) -> list[str]:
    """Return the settings in which an experiment differs from a run's, one `path: before -> after` line each.

    Raises:
        UserError: what was computed before the preference pairs depends on one of them.
    """
    before = read_experiment(config)
    then, now = before.method(), experiment.method()
    if before.judge is None:
        then["judge"] = now["judge"]  # nothing was judged so far
    changed = differences(then, now)
    fixed = [line for line in changed if not line.startswith(tuple(_FIRST_STAGES))]
    if fixed:
        raise UserError(
            f"{config.parent}: this run was started with another configuration:\n  "
            + "\n  ".join(fixed)
            + "\nOnly preferences, teacher_update and training may change. Give the new configuration another --name, or "
            + f"resume the run as it was: montessori resume {config.parent}"
        )
    return changed


def _first_stage(changed: list[str], experiment: Experiment) -> str:
    """Return the first stage whose key, or table, depends on the changed settings, for people."""
    if any(line.startswith("preferences.baseline:") for line in changed):
        # Exact measurements are made for its threshold.
        if experiment.influence.sequential is not None:
            return "influence of the probing set"
        if experiment.influence.estimator == "screened":
            return "confirmation of influence near the threshold"
    return next(stage for setting, stage in _FIRST_STAGES.items() if any(line.startswith(setting) for line in changed))


def _name_of(section: Teacher | Student) -> str:
    return f"{section.model}@{section.revision or 'main'}"


def _provenance(run: Run) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    before = (read_json(run.folder / _PROVENANCE) or {}).get("driver", {})
    return {
        "opened": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "python": platform.python_version(),
        "git_revision": revision.stdout.strip() or None,
        "driver": {
            "system": platform.platform(),
            "processor": processor_name(),
            "generation_dtype": generation_dtype(),
            "cores": os.cpu_count(),
            "gflops": before.get("gflops"),
        },
        "teacher_sha256": run.first_teacher().sha256,
        "student_sha256": run.first_student().sha256,
    }


def record_speed(run: Run, gflops: float) -> None:
    """Add to the provenance how fast this machine multiplies matrices, see `montessori_core.speed`."""
    provenance = read_json(run.folder / _PROVENANCE)
    provenance["driver"]["gflops"] = round(gflops, 1)
    write_json(provenance, run.folder / _PROVENANCE)


def as_rows(tasks: list[Task]) -> list[Row]:
    """Tasks as rows of a shard."""
    return [vars(task) for task in tasks]

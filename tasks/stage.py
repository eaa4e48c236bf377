"""A step of a run: executes programs as stages."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prefect import get_run_logger
from prefect.exceptions import MissingContextError

from cluster.fanout import Progress, fan_out
from cluster.shards import Shards, cut_for_jobs
from cluster.stage import Stage
from montessori_core.config import Endpoint, Experiment, Resources
from montessori_core.data.rows import Rows
from montessori_core.files import read_json, write_json
from montessori_core.judging.client import warnings_file
from montessori_core.layout import COUNTS_FILE
from montessori_core.program import Program, SettingsT
from tasks.progress import ProgressBar
from tasks.run import Model, Run, stage_of
from tasks.stage_progress import StageTaskRuns
from tasks.tracking import show_problems, tracking_input

log = logging.getLogger(__name__)


def warn(label: str, warning: str) -> None:
    """Warn in Prefect's log of the run, if a flow runs, and on the terminal, which does not show that log."""
    with suppress(MissingContextError):
        get_run_logger().warning("%s: %s", label, warning)
    log.warning("%s: %s", label, warning)


@dataclass(frozen=True)
class Step:
    """A step of the method, with the folder of its results and a label for people.

    Attributes:
        run: the run that it belongs to.
        folder: in the run's folder; has the step's stages as folders and its tables as files.
        label: for progress bars, Prefect and errors, e.g. 'iteration 1: student training'.
    """

    run: Run
    folder: Path
    label: str

    @property
    def experiment(self) -> Experiment:
        """The run's configuration."""
        return self.run.experiment

    @staticmethod
    def iteration(run: Run, number: int) -> "Step":
        """Return the step of an iteration, counted from 1."""
        return Step(run, run.iteration(number), f"iteration {number}")

    def at(self, folder: str, label: str = "") -> "Step":
        """Return a part of the step, in a folder inside the step's."""
        return replace(self, folder=self.folder / folder, label=f"{self.label}: {label}" if label else self.label)

    def renamed(self, label: str) -> "Step":
        """Return the same step with another label."""
        return replace(self, label=label)

    def pairing_answers(self) -> "Step":
        """Return the same step with preferences between answers to one instruction; to another they would be wrong."""
        preferences, influence = self.experiment.preferences.within_prompts(), self.experiment.influence
        if preferences.baseline == "prompt":  # no sequential test knows the mean of a prompt
            influence = influence.model_copy(update={"sequential": None})
        experiment = self.experiment.model_copy(update={"preferences": preferences, "influence": influence})
        return replace(self, run=replace(self.run, experiment=experiment))

    def beside(self, suffix: str, label: str = "") -> "Step":
        """Return a part of the step, in a folder beside the step's whose name ends with `suffix`."""
        folder = self.folder.with_name(f"{self.folder.name}-{suffix}")
        return replace(self, folder=folder, label=f"{self.label}{label}")

    def execute(
        self,
        program: Program[SettingsT],
        settings: SettingsT,
        rows: Rows | Sequence[Mapping[str, object]],
        rows_per_shard: int | None = None,
        models: Mapping[str, Model] | None = None,
        files: Mapping[str, Path] | None = None,
        upstream: Sequence[object] = (),
    ) -> list[Path]:
        """Compute a program's table in many jobs; return its parts, in the order of the rows.

        Call it in a flow: groups of the stage's shards are the flow's task runs.

        Args:
            program: see `montessori_core.programs`.
            settings: of the program.
            rows: of the program's type.
            rows_per_shard: the most; shards are smaller if more jobs may run. None: all rows are one shard.
            models: models that the program loads, by input name.
            files: files that the program reads, by input name.
            upstream: other results of earlier tasks that the rows come from, for the edges of Prefect's graph.
        """
        shards = _one_shard(program, rows)
        if rows_per_shard is not None:
            jobs = self._resources(program).parallel_jobs
            shards = cut_for_jobs(self.folder, shards.rows, jobs, rows_per_shard)
        return self._compute(program, settings, shards, models or {}, files or {}, {}, upstream, read=lambda part: part)

    def train(
        self,
        program: Program[SettingsT],
        settings: SettingsT,
        rows: Rows | Sequence[Mapping[str, object]],
        models: Mapping[str, Model],
        upstream: Sequence[object] = (),
    ) -> Model:
        """Train a model in one job; see `execute`."""
        trackers = tracking_input(self.run.folder, self.experiment)
        trained: list[Model] = self._compute(
            program, settings, _one_shard(program, rows), models, {}, trackers, upstream, read=Model.of
        )
        show_problems(self.run.folder, self.experiment)
        counts = read_json(Path(trained[0].path) / COUNTS_FILE) or {}
        for name, meaning in (("left_out", "left out because they are too long"), ("truncated", "cut at max_length")):
            if counts.get(name):
                total = counts["left_out"] + counts.get("examples", counts.get("pairs", 0))
                warn(self.label, f"{counts[name]} of {total} rows were {meaning}; see {COUNTS_FILE} and max_length")
        return trained[0]

    def ask(
        self,
        asked: Literal["judge", "strong_teacher", "answerer"],
        program: Program[SettingsT],
        settings: Mapping[str, Any],
        rows: Rows | Sequence[Mapping[str, object]],
        upstream: Sequence[object],
    ) -> list[Path]:
        """Send rows to a model behind an API, in one job, so that rate limits and cap hold for all; see `execute`.

        Warnings of the client are shown after the stage.

        Args:
            asked: the section of the configuration with the endpoint.
            program: its settings include the endpoint.
            settings: its other settings.
            rows, upstream: see `execute`.
        """
        endpoint: Endpoint = getattr(self.experiment, asked)
        file = self.run.folder / f"{asked}.json"
        write_json(endpoint.model_dump(mode="json"), file)
        complete = program.settings(endpoint=endpoint.identity(), **settings)
        # The file has limits and prices, which do not enter the key: answers do not depend on them.
        shards = _one_shard(program, rows)
        earlier = read_json(warnings_file(file)) or []
        parts = self._compute(program, complete, shards, {}, {}, {"endpoint": file}, upstream, read=lambda part: part)
        for warning in read_json(warnings_file(file)) or []:
            if warning not in earlier:
                warn(self.label, warning)
        return parts

    def _resources(self, program: Program[SettingsT]) -> Resources:
        resources: Resources = getattr(self.experiment.cluster.resources, program.kind)
        return resources

    def _compute(
        self,
        program: Program[SettingsT],
        settings: SettingsT,
        shards: Shards,
        models: Mapping[str, Model],
        files: Mapping[str, Path],
        unkeyed_files: Mapping[str, Path],
        upstream: Sequence[object],
        read: Callable[[Path], Any],
    ) -> list[Any]:
        self.run.stages.append(self.folder)
        cluster, python = self.experiment.cluster, None
        if program.kind == "generation":
            python, file = cluster.generation_python, self.run.folder / "vllm.json"
            write_json(cluster.vllm.model_dump(mode="json"), file)
            unkeyed_files = {**unkeyed_files, "vllm": file}
        stage = stage_of(program, settings, self.folder, models, files, unkeyed_files)
        inputs = [*models.values(), *files.values(), *upstream]
        with ProgressBar(self.label) as bar:
            return self._watch(stage, shards, self._resources(program), python, bar, inputs, read)

    def _watch(
        self,
        stage: Stage,
        shards: Shards,
        resources: Resources,
        python: str | None,
        bar: ProgressBar,
        inputs: Sequence[object],
        read: Callable[[Path], Any],
    ) -> list[Any]:
        """Compute the shards, shown in a progress bar and as task runs of the flow; return what `read` makes of each part."""
        with StageTaskRuns(self.label, stage, len(shards), inputs, read) as view:

            def show(progress: Progress) -> None:
                bar.show(progress)
                view.show(progress)

            fan_out(stage, shards, resources, self.experiment.cluster, show, python)
        return view.results()


def _one_shard(program: Program[SettingsT], rows: Rows | Sequence[Mapping[str, object]]) -> Shards:
    """Return all rows of a program as one shard."""
    of_kind = rows if isinstance(rows, Rows) else Rows.of(rows, program.rows)
    return Shards(of_kind, max(1, len(of_kind)))

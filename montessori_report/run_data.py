"""Read a run folder for its report; any part may be missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from montessori_core import layout
from montessori_core.config import Comparison, Preferences, parse_yaml
from montessori_core.data.tables import EXAMPLES, INFLUENCE, INSTRUCTIONS, PREFERENCES, read_table
from montessori_core.errors import ConfigError
from montessori_core.evaluation.kinds import KindClassifier, KindShare, read_classifier
from montessori_core.files import read_json
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.screening import ScreeningReport, screening_report
from montessori_core.influence.table import LengthLine, summarize_influence
from montessori_core.synthesis.filtering import funnel

Log = list[dict[str, Any]]
# Columns that reports show: with their prompts and tokens, the tables of a large run are many times larger.
EXAMPLE_COLUMNS = ("example_id", "instruction", "response", "response_finished")
INSTRUCTION_COLUMNS = ("instruction", "raw_output", "rejection")
PAIR_COLUMNS = (
    "prompt_id",
    *("chosen", "chosen_id", "chosen_influence_student", "chosen_influence_null_step"),
    *("rejected", "rejected_id", "rejected_influence_student", "rejected_influence_null_step"),
)
_TRAININGS = ("warmup", "teacher", "student")
_BASELINE = Preferences().baseline  # of a run whose configuration cannot be read


@dataclass(frozen=True)
class SynthesisData:
    """A synthesized set: all candidates of the teacher, and the kept examples."""

    label: str
    instructions: pa.Table | None
    examples: pa.Table | None

    @cached_property
    def funnel(self) -> dict[str, int] | None:
        """Counts of candidates, of rejections by reason in filter order, and of kept instructions."""
        return None if self.instructions is None else funnel(self.instructions)

    def kind_share(self, classifier: KindClassifier | None) -> KindShare | None:
        """Return the share of instructions of the target kind; None without examples or a usable classifier."""
        if classifier is None or not classifier.usable or self.examples is None:
            return None
        return classifier.share(self.examples["instruction"].to_pylist())


@dataclass(frozen=True)
class InfluenceData:
    """Influence of a set of examples, and the threshold of `influence_student` above which an example is helpful."""

    label: str
    table: pa.Table
    threshold: float

    @cached_property
    def values(self) -> npt.NDArray[np.float64]:
        """Influence of the measured examples against the student, nats."""
        return self._measured("influence_student")

    @cached_property
    def length_line(self) -> LengthLine:
        """What the number of response tokens explains of the influence of this set."""
        return LengthLine.fit(self.values, self._measured("response_tokens"))

    def values_at_mean_length(self, line: LengthLine) -> npt.NDArray[np.float64]:
        """Influence of the measured examples without what a line, of this or another set, explains by their length."""
        return line.take_out(self.values, self._measured("response_tokens"))

    def _measured(self, column: str) -> npt.NDArray[np.float64]:
        measured = self.table.filter(pc.equal(self.table["status"], "ok"))[column]
        return np.asarray(measured.to_numpy(), dtype=np.float64)

    @cached_property
    def screening(self) -> ScreeningReport | None:
        """Accuracy of the screened estimator; None for other estimators."""
        return screening_report(self.table)

    @cached_property
    def summary(self) -> dict[str, float | int]:
        """See `montessori_core.influence.table.summarize_influence`."""
        return summarize_influence(self.table, self.threshold)


@dataclass(frozen=True)
class IterationData:
    """Inputs and results of an iteration."""

    number: int
    probing: SynthesisData
    training: SynthesisData
    influence: InfluenceData | None
    training_influence: InfluenceData | None
    preferences: pa.Table | None
    logs: dict[str, Log]
    metrics: dict[str, Any] | None

    @property
    def held_out_loss(self) -> dict[str, dict[str, float]]:
        """Mean and standard error by model: student, untrained, unmodified, previous."""
        return dict((self.metrics or {}).get("held_out_loss", {}))

    @property
    def held_out_gain(self) -> dict[str, dict[str, float]]:
        """Mean and standard error of the paired gain by comparison: student_over_..."""
        return dict((self.metrics or {}).get("held_out_gain", {}))

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return a list from metrics.json: scores, head_to_head, contamination, teacher_checkpoints or stages."""
        return list((self.metrics or {}).get(name, []))


@dataclass(frozen=True)
class RunData:
    """The content of a run folder."""

    name: str
    config: str | None
    settings: dict[str, Any]
    provenance: dict[str, Any]
    iterations: list[IterationData]
    unmodified: SynthesisData | None
    unmodified_influence: InfluenceData | None
    folder: Path

    @cached_property
    def classifier(self) -> KindClassifier | None:
        """The classifier of the target kind, trained on first use; None without the run's copies of its sets."""
        return read_classifier(self.folder)

    def setting(self, section: str, name: str, default: Any) -> Any:
        """Return a value of the configuration, or `default` if it is not set."""
        return _setting(self.settings, section, name, default)

    @property
    def baseline(self) -> str:
        """The baseline of preference pairs, see `config.Preferences`."""
        return str(self.setting("preferences", "baseline", _BASELINE))

    @property
    def planned(self) -> int:
        """Number of configured iterations."""
        planned = self.settings.get("iterations")
        return planned if isinstance(planned, int) else len(self.iterations)

    @property
    def compares(self) -> bool:
        """Whether a student of the unmodified teacher is configured."""
        return bool(self.setting("comparison", "unmodified_teacher", True))

    @property
    def syntheses(self) -> list[SynthesisData]:
        """All synthesized sets, in the order of the run."""
        sets = [part for iteration in self.iterations for part in (iteration.probing, iteration.training)]
        return [part for part in (*sets, self.unmodified) if part is not None and part.instructions is not None]

    @property
    def examples_of_teachers(self) -> dict[int, SynthesisData]:
        """The examples of each teacher: the first probing set of teacher 0, the training sets of its updates."""
        sets = {iteration.number: iteration.training for iteration in self.iterations}
        if 1 in sets:
            sets[0] = self.iterations[0].probing
        return {number: part for number, part in sorted(sets.items()) if part.examples is not None}

    @property
    def teachers(self) -> dict[int, InfluenceData]:
        """The influence of each teacher's examples: 0 is the initial teacher, 1 the first update, and so on."""
        trained = {iteration.number: iteration.training_influence for iteration in self.iterations}
        probed = {iteration.number - 1: iteration.influence for iteration in self.iterations if iteration.influence}
        return {number: part for number, part in sorted((trained | probed).items()) if part is not None}

    @property
    def first_held_out_loss(self) -> dict[str, dict[str, float]]:
        """The first recorded held-out loss of each model, mean and standard error."""
        return {name: loss for iteration in reversed(self.iterations) for name, loss in iteration.held_out_loss.items()}

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Resource usage of each stage that the run consists of (see `cluster.usage`), in the order of folder names."""
        return _by_name([stage for iteration in self._kept for stage in iteration.records("stages")])

    @property
    def unused_stages(self) -> list[dict[str, Any]]:
        """Resource usage of each stage that the run does not consist of any more, since its configuration changed."""
        used = {stage["stage"] for stage in self.stages}
        records = [
            record
            for iteration in reversed(self.iterations)
            for kind in ("stages", "unused_stages")
            for record in iteration.records(kind)
        ]
        return _by_name([record for record in records if record["stage"] not in used])

    @property
    def _kept(self) -> list[IterationData]:
        """The iterations that are configured."""
        return [iteration for iteration in self.iterations if iteration.number <= self.planned]

    def heading(self, iteration: IterationData) -> str | None:
        """Return the heading of an iteration; None if the run has only one."""
        return f"Iteration {iteration.number}" if max(self.planned, len(self.iterations)) > 1 else None

    def in_iteration(self, label: str, iteration: IterationData) -> str:
        """Return a label with the iteration's heading, if the run has several iterations."""
        heading = self.heading(iteration)
        return f"{heading}: {label}" if heading else label[0].upper() + label[1:]

    @property
    def job_seconds(self) -> dict[str, float]:
        """Job seconds by stage folder."""
        merged: dict[str, float] = {}
        for iteration in self._kept:
            merged |= (iteration.metrics or {}).get("job_seconds", {})
        return merged


def read_run_data(folder: Path) -> RunData:
    """Read a run's folder.

    Raises:
        DataError: an existing table cannot be read.
    """
    config = folder / layout.CONFIG
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    settings = _settings(text)
    unmodified = folder / layout.UNMODIFIED
    baseline = _setting(settings, "preferences", "baseline", _BASELINE)
    iterations = [
        _read_iteration(path, unmodified, number, baseline) for number, path in layout.iterations(folder).items()
    ]
    # This influence is measured on the student of the first iteration, so its threshold applies.
    threshold = iterations[0].influence.threshold if iterations and iterations[0].influence else None
    unmodified_influence = _read(unmodified / layout.TRAINING_INFLUENCE, INFLUENCE)
    return RunData(
        name=str(settings.get("name", folder.resolve().name)),
        config=text,
        settings=settings,
        provenance=read_json(folder / layout.PROVENANCE) or {},
        iterations=iterations,
        unmodified=_read_synthesis(unmodified / "training", "Unmodified teacher") if unmodified.is_dir() else None,
        unmodified_influence=_influence("Training set (unmodified teacher)", unmodified_influence, threshold),
        folder=folder,
    )


def missing_parts(run: RunData) -> list[str]:
    """Return a sentence for each missing part of a run."""
    sentences = []
    if run.config is None:
        sentences.append("The configuration (config.yaml) is not in the folder.")
    if not run.provenance:
        sentences.append("The provenance (provenance.json) is not in the folder.")
    present = {iteration.number: iteration for iteration in run.iterations}
    for number in range(1, max([run.planned, *present]) + 1):
        sentences += (
            _missing_of(present[number], run) if number in present else [f"Iteration {number} has not started."]
        )
    if not run.compares:
        sentences.append(
            "The unmodified teacher was not compared: comparison.unmodified_teacher is off in the configuration."
        )
    elif not any("unmodified" in iteration.held_out_loss for iteration in run.iterations):
        sentences.append("The student of the unmodified teacher has not been evaluated yet.")
    return sentences


def _missing_of(iteration: IterationData, run: RunData) -> list[str]:
    measures_training = bool(run.setting("comparison", "influence_examples", Comparison().influence_examples))
    parts = {
        "the synthesis of the probing set": iteration.probing.examples,
        "the influence of the probing set": iteration.influence,
        "the preference pairs": iteration.preferences,
        "the synthesis of the training set": iteration.training.examples,
        "the influence of the training set": iteration.training_influence if measures_training else True,
        "the metrics (held-out losses, times)": iteration.metrics,
    }
    absent = [name for name, part in parts.items() if part is None]
    sentences = [f"Iteration {iteration.number} is not complete. Missing: {', '.join(absent)}."] if absent else []
    if not measures_training:
        sentences.append(
            f"Iteration {iteration.number}: the influence of the training set was not measured: "
            "comparison.influence_examples is 0 in the configuration."
        )
    return sentences


def _by_name(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last record of each stage, in the order of names."""
    by_name = {stage["stage"]: stage for stage in stages}
    # Earlier versions wrote interruptions as preemptions.
    return [{"interruptions": by_name[name].get("preemptions", 0), **by_name[name]} for name in sorted(by_name)]


def _settings(text: str | None) -> dict[str, Any]:
    try:
        content = parse_yaml(text or "", layout.CONFIG)
    except ConfigError:
        return {}
    return content if isinstance(content, dict) else {}


def _setting(settings: dict[str, Any], section: str, name: str, default: Any) -> Any:
    content = settings.get(section)
    return content.get(name, default) if isinstance(content, dict) else default


def _read_iteration(folder: Path, unmodified: Path, number: int, baseline: str) -> IterationData:
    metrics = read_json(folder / layout.METRICS)
    recorded = (metrics or {}).get("training_logs", {})
    logs = {name: recorded.get(name) or _read_log(folder / name) for name in _TRAININGS}
    logs["unmodified"] = recorded.get("unmodified") or (_read_log(unmodified / "student") if number == 1 else [])
    probed, trained = (_read(folder / name, INFLUENCE) for name in (layout.INFLUENCE, layout.TRAINING_INFLUENCE))
    threshold = threshold_of(probed, baseline) if probed is not None else None
    return IterationData(
        number=number,
        probing=_read_synthesis(folder, f"Iteration {number}: probing set"),
        training=_read_synthesis(folder / "training", f"Iteration {number}: training set"),
        influence=_influence("Probing set (teacher before)", probed, threshold),
        training_influence=_influence("Training set (updated teacher)", trained, threshold),
        preferences=_read(folder / layout.PREFERENCES, PREFERENCES, PAIR_COLUMNS),
        logs=logs,
        metrics=metrics,
    )


def _read_synthesis(folder: Path, label: str) -> SynthesisData:
    return SynthesisData(
        label,
        _read(folder / layout.INSTRUCTIONS, INSTRUCTIONS, INSTRUCTION_COLUMNS),
        _read(folder / layout.EXAMPLES, EXAMPLES, EXAMPLE_COLUMNS),
    )


def _influence(label: str, table: pa.Table | None, threshold: float | None) -> InfluenceData | None:
    return InfluenceData(label, table, threshold) if table is not None and threshold is not None else None


def _read_log(folder: Path) -> Log:
    return read_json(folder / "part-00000" / layout.LOG_FILE) or []


def _read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table | None:
    return read_table(path, schema, columns) if path.exists() else None

"""An experiment: all sections and the checks across them."""

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from montessori_core.config.cluster import Cluster
from montessori_core.config.data import DataSource
from montessori_core.config.evaluation import Benchmarks, Comparison
from montessori_core.config.filters import JudgeFilter
from montessori_core.config.influence import Influence, Preferences
from montessori_core.config.models import Endpoint, Student, Teacher
from montessori_core.config.resources import Resources
from montessori_core.config.section import RUN_NAME, Count, FolderName, Section, parse
from montessori_core.config.synthesis import Synthesis
from montessori_core.config.training import Nomad, Optimization, TeacherUpdate, Training, Warmup, Zero
from montessori_core.config.yaml import apply_overrides, read_yaml
from montessori_core.presets import find_configuration

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Experiment(Section):
    """An experiment: one or more iterations of Montessori-Instruct."""

    name: FolderName = Field("experiment", pattern=RUN_NAME, description="Default name of the run and its folder.")
    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of the whole experiment.")
    iterations: Count = Field(1, description="Number of teacher updates, one after the other.")
    teacher: Teacher = Field(description="The model that writes instructions and their responses.")
    student: Student = Field(description="The model that is trained on the synthetic data.")
    seed_pool: DataSource = Field(
        DataSource(path="builtin"), description="Human-written tasks from which prompts for the teacher are made."
    )
    reference: DataSource = Field(
        DataSource(path="builtin"),
        description="Examples of what the student should get better at; influence is the change of its loss on them.",
    )
    evaluation: DataSource = Field(
        DataSource(path="builtin"),
        description="Held-out examples, on which students are compared; must not overlap the reference set.",
    )
    synthesis: Synthesis = Field(Synthesis(), description="How the teacher is prompted and how its output is filtered.")
    warmup: Warmup = Field(Warmup(), description="Warm-up of the student.")
    influence: Influence = Field(Influence(), description="How local data influence is measured.")
    preferences: Preferences = Field(Preferences(), description="How influence becomes preference pairs.")
    teacher_update: TeacherUpdate = Field(TeacherUpdate(), description="Direct preference optimization of the teacher.")
    training: Training = Field(Training(), description="Training of the student.")
    nomad: Nomad = Field(Nomad(), description="Settings of the method nomad.")
    comparison: Comparison = Field(Comparison(), description="Additional results that show the effect of the method.")
    judge: Endpoint | None = Field(
        None, description="The model that judges examples, for methods that need a judge, and benchmark answers."
    )
    strong_teacher: Endpoint | None = Field(
        None, description="A stronger teacher, for the method self_instruct_strong."
    )
    answerer: Endpoint | None = Field(
        None, description="The model that answers the teacher's instructions; required by synthesis.answers: endpoint."
    )
    benchmarks: Benchmarks = Field(Benchmarks(), description="Benchmarks of the students.")
    zero: Zero = Field(Zero(), description="DeepSpeed ZeRO.")
    tracking: tuple[Tracker, ...] = Field(
        (),
        description="Experiment trackers that get the logs of trainings and the numbers of iterations. Their servers and "
        "keys come from the environment.",
    )
    cluster: Cluster = Field(Cluster(), description="Where jobs run and which resources they get.")

    @model_validator(mode="after")
    def _batches_fit_processes(self) -> "Experiment":
        for section in ("training", "warmup", "teacher_update"):
            self.check_batch(section)
        return self

    def check_batch(self, section: str) -> None:
        """Check that the batches of a recipe, given by its path, divide evenly over the processes of its jobs.

        Raises:
            ValueError: they do not.
        """
        stage = "teacher_update" if section == "teacher_update" else "training"
        resources: Resources = getattr(self.cluster.resources, stage)
        processes = resources.nodes * resources.processes_per_node
        recipe: Optimization = attrgetter(section)(self)
        if recipe.batch_size % (recipe.micro_batch_size * processes):
            raise ValueError(
                f"{section}.batch_size ({recipe.batch_size}) must be a multiple of {section}.micro_batch_size "
                f"({recipe.micro_batch_size}) x {processes} processes; change them, or cluster.resources.{stage}"
            )

    @model_validator(mode="after")
    def _quantized_weights_are_whole(self) -> "Experiment":
        if self.teacher_update.quantization is not None and self.zero.stage == 3:
            raise ValueError(
                "teacher_update.quantization with zero.stage: 3: DeepSpeed cannot partition weights in 4 bits; set "
                "zero.stage: 2, which keeps them whole on each GPU, or quantization: null"
            )
        return self

    @model_validator(mode="after")
    def _sequential_needs_a_threshold(self) -> "Experiment":
        baseline = self.preferences.baseline
        if self.influence.sequential is not None and baseline in ("median", "prompt"):
            raise ValueError(
                f"influence.sequential decides each sign separately, but preferences.baseline: {baseline} has no threshold "
                "until all examples are measured; set baseline: student or null_step, or sequential: null"
            )
        return self

    @model_validator(mode="after")
    def _benchmarks_have_a_judge(self) -> "Experiment":
        if self.benchmarks.judged and self.judge is None:
            raise ValueError(
                "benchmarks.alpaca_eval and benchmarks.mt_bench need a judge: set judge.model, and judge.base_url if it is "
                "not OpenAI's"
            )
        return self

    @model_validator(mode="after")
    def _filters_have_a_judge(self) -> "Experiment":
        if any(isinstance(entry, JudgeFilter) for entry in self.synthesis.filters) and self.judge is None:
            raise ValueError(
                "synthesis.filters: judge needs a model that scores: set judge.model, and judge.base_url if it is not "
                "OpenAI's"
            )
        return self

    @model_validator(mode="after")
    def _answerer_is_asked(self) -> "Experiment":
        answers = self.synthesis.answers
        if answers == "endpoint" and self.answerer is None:
            raise ValueError(
                "synthesis.answers: endpoint needs a model that answers: set answerer.model, and answerer.base_url if it is "
                "not OpenAI's; or set synthesis.answers: updated"
            )
        if answers != "endpoint" and self.answerer is not None:
            raise ValueError(
                f"answerer is never asked with synthesis.answers: {answers}; set synthesis.answers: endpoint, or remove "
                "answerer"
            )
        return self

    @property
    def asks_api(self) -> bool:
        """Whether jobs ask a model behind an API: those of `cluster.resources.judging`."""
        return any((self.judge, self.strong_teacher, self.answerer))

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine an iteration's data and models, as plain data.

        The name, the cluster, the number of iterations, the benchmarks, the trackers and ZeRO's offload do not.
        """
        excluded = dict.fromkeys(("cluster", "name", "iterations", "benchmarks", "tracking"), True)
        content = self.model_dump(mode="json", exclude={**excluded, "zero": {"offload"}})
        for name in ("judge", "strong_teacher", "answerer"):
            endpoint: Endpoint | None = getattr(self, name)
            content[name] = endpoint.identity() if endpoint else None
        return content


Used = Mapping[str, tuple[type[Section], tuple[str, ...]]]
"""Fields that a command uses, by section, with the section's type; '' is the whole. Other sections are used whole."""


def used_of_model(content: Mapping[str, Any], used: Used, model: str) -> dict[str, Any]:
    """Return the part of a configuration, as plain data, that a command uses, for this model as student and teacher."""
    kept = _without_unused(content, used)
    student = kept.get("student", {})
    if isinstance(student, dict):
        student = {**student, "model": model}
    return {**kept, "teacher": {"model": model}, "student": student}


def _without_unused(content: Mapping[str, Any], used: Used, section: str = "") -> dict[str, Any]:
    """Return a section of a configuration without the fields that a command does not use; unknown fields are kept."""
    kept: dict[str, Any] = {}
    kind, names = used.get(section, (None, ()))
    for name, value in content.items():
        if kind is None or name in names or name not in kind.model_fields:
            path = f"{section}.{name}".removeprefix(".")
            kept[name] = _without_unused(value, used, path) if isinstance(value, dict) else value
    return kept


def without_other_revision(content: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return a configuration, as plain data, without the revision of its student if that is not this model."""
    student = content.get("student")
    if not isinstance(student, dict) or student.get("model") == model:
        return dict(content)
    return {**content, "student": {name: value for name, value in student.items() if name != "revision"}}


def read_experiment(path: Path, overrides: tuple[str, ...] = ()) -> Experiment:
    """Read an experiment from YAML and apply `section.key=value` overrides (values are YAML too).

    `path` may be the name of a preset.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not valid; the message names every invalid field.
    """
    path = find_configuration(path)
    content = read_yaml(path)
    apply_overrides(content, overrides)
    return parse_experiment(content, str(path))


def parse_experiment(content: dict[str, Any], source: str) -> Experiment:
    """Validate plain data; `source` names it in errors."""
    return parse(Experiment, content, f"{source}: the configuration")

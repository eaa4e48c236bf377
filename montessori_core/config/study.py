"""A study: a comparison of methods over several seeds."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from montessori_core.config.experiment import Experiment, read_experiment
from montessori_core.config.models import Student
from montessori_core.config.section import RUN_NAME, FolderName, Section, parse
from montessori_core.config.yaml import apply_overrides, read_yaml
from montessori_core.errors import ConfigError
from montessori_core.presets import find_configuration

Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Study(Section):
    """A comparison of methods with the same models, data sets, sizes, recipe and seeds."""

    name: FolderName = Field("study", pattern=RUN_NAME, description="Name of the study and of its folder.")
    experiment: Experiment = Field(
        description="Settings that all methods share. `iterations` applies to the method montessori."
    )
    methods: tuple[str, ...] = Field(
        ("montessori", "self_instruct"),
        min_length=1,
        description="Names of methods (`montessori methods` lists them), or module:NAME of a custom method.",
    )
    baseline: str = Field("self_instruct", description="The method that the others are compared with.")
    transfer: tuple[Student, ...] = Field(
        (), description="Additional students to train on the same data, which was not made for them (Section 5.4)."
    )
    equal_response_tokens: bool = Field(
        False,
        description="Also compare the methods at equal response tokens: train each student on the first examples of its "
        "method, up to the number of response tokens of the method whose `training.examples` have the fewest.",
    )
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2), min_length=1, description="Random seeds; each runs the whole comparison."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "Study":
        for field in ("methods", "seeds"):
            entries = getattr(self, field)
            if len(set(entries)) < len(entries):
                raise ValueError(f"{field} has a duplicate entry; remove it")
        if self.baseline not in self.methods:
            methods = ", ".join(self.methods)
            raise ValueError(
                f"baseline {self.baseline!r} is not in methods ({methods}); add it there, or choose one of them"
            )
        return self

    @model_validator(mode="after")
    def _conversations_fit_processes(self) -> "Study":
        if "nomad" in self.methods:
            self.experiment.check_batch("nomad")
            if self.experiment.nomad.training is not None:
                self.experiment.check_batch("nomad.training")
        return self

    def student_labels(self) -> list[str]:
        """Return a label of the study's student, and of each transfer student; no two are equal.

        It is the model. Students of one model also have the settings in which they differ, equal ones their field's name.
        """
        students = {"experiment.student": self.experiment.student}
        students |= {f"transfer.{number}": student for number, student in enumerate(self.transfer)}
        described = []
        for student in students.values():
            same_model = [_settings(other) for other in students.values() if other.model == student.model]
            differ = {
                name: value
                for name, value in _settings(student).items()
                if any(name not in other or other[name] != value for other in same_model)
            }
            described.append((student.model, [f"{name}: {value}" for name, value in differ.items()]))
        labels = []
        for field, (model, details) in zip(students, described, strict=True):
            parts = [*details, field] if described.count((model, details)) > 1 else details
            labels.append(f"{model} ({', '.join(parts)})" if parts else model)
        return labels

    def seeded(self, seed: int, student: Student | None = None) -> Experiment:
        """Return the experiment with `seed`, and with `student` if given.

        The unmodified teacher is a method of a study, `self_instruct`, and not part of `montessori`.
        """
        ending = f"-{seed}"
        changes: dict[str, Any] = {
            "name": f"{self.name[: 80 - len(ending)]}{ending}",
            "seed": seed,
            "comparison": {**self.experiment.comparison.model_dump(), "unmodified_teacher": False},
        }
        if student is not None:
            changes["student"] = student.model_dump(mode="json")
        return Experiment.model_validate(self.experiment.model_dump(mode="json") | changes)


def _settings(student: Student) -> dict[str, str]:
    """Return the settings of a student by name, such as `lora.rank`; without its model."""

    def leaves(content: dict[str, Any], prefix: str) -> dict[str, str]:
        texts: dict[str, str] = {}
        for name, value in content.items():
            if isinstance(value, dict) and value:
                texts |= leaves(value, f"{prefix}{name}.")
            else:
                texts[prefix + name] = value if isinstance(value, str) else json.dumps(value)
        return texts

    return leaves(student.model_dump(mode="json", exclude={"model"}), "")


def read_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Read a study from YAML; `path` may be the name of a preset.

    Its `experiment` may be a path relative to the study's file, or the name of a preset.

    Raises:
        ConfigError: a file is missing, is not YAML, or is not valid; the message names every invalid field.
    """
    path = find_configuration(path, "studies")
    content = read_yaml(path)
    if isinstance(content.get("experiment"), str):
        try:
            experiment = find_configuration(Path(content["experiment"]), folder=path.parent)
            content["experiment"] = read_experiment(experiment).model_dump(mode="json")
        except ConfigError as error:
            raise ConfigError(f"{path}: experiment: {error}") from error
    apply_overrides(content, overrides)
    return parse(Study, content, f"{path}: the study")

"""What people bring to a run: models, data, a size and machines. A preset has everything else."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.cluster import read_cluster
from montessori_core.config.experiment import Experiment, parse_experiment
from montessori_core.config.section import RUN_NAME, FolderName, Section
from montessori_core.config.yaml import apply_overrides, read_yaml
from montessori_core.presets import find_configuration

_PILOT = ("iterations=1", "warmup.examples=32", "influence.probing_examples=256", "training.examples=256")
"""Sizes from which the time of the whole can be forecast."""


class Tailored(Section):
    """A teacher to tailor to a student and to a kind of task; all other settings are a preset's."""

    name: FolderName = Field("tailored", pattern=RUN_NAME, description="Name of the run and of its folder.")
    size: Literal["quickstart", "pilot-1b", "pilot-8b", "paper-1b", "paper-8b"] = Field(
        "quickstart",
        description="'quickstart': one iteration in minutes on a laptop, with the first 24 reference and 32 evaluation "
        "examples. 'paper-1b' and 'paper-8b': the paper's two iterations of 10,000 examples, for students of these sizes, "
        "on a cluster. 'pilot-1b' and 'pilot-8b': one iteration of these with 256 examples, to see texts and times first.",
    )
    # Not `str | None`: Prefect's form would have a switch between text and None at each of them.
    teacher: str = Field(
        "",
        description="Teacher: Hugging Face id or local folder. If empty, the preset's (SmolLM2-135M, or Llama-3-8B).",
    )
    student: str = Field(
        "", description="Student: Hugging Face id or local folder, preferably a base model. If empty, the preset's."
    )
    seeds: str = Field(
        "",
        description="Seed tasks that show the teacher what an instruction looks like: a file, a folder, a Hugging Face id or "
        "`builtin`. If empty, the preset's.",
    )
    reference: str = Field(
        "",
        description="Examples of what the student should get better at; influence is measured on them. If empty, the "
        "preset's.",
    )
    evaluation: str = Field(
        "", description="Other examples of the same kind, for the held-out loss; needed with `reference`."
    )
    cluster: str = Field(
        "",
        description="Where jobs run: the path of a cluster file, or the preset `workstation` (this machine and its GPUs). If "
        "empty, the quickstart's jobs run on this machine's processor, those of other sizes on Slurm.",
    )
    pilot: str = Field(
        "",
        pattern=f"^$|{RUN_NAME}",
        description="Name of a finished pilot, to forecast the time. If empty, there is no forecast.",
    )

    @model_validator(mode="after")
    def _evaluation_is_like_reference(self) -> "Tailored":
        if bool(self.reference) != bool(self.evaluation):
            given, missing = ("reference", "evaluation") if self.reference else ("evaluation", "reference")
            raise ValueError(f"{given} is set, but {missing} is not: the preset's is of another kind; set both")
        return self

    @property
    def preset(self) -> str:
        """Name of the preset that has the other settings."""
        return self.size.replace("pilot", "paper")

    def experiment(self) -> Experiment:
        """Return the configuration of the run.

        Raises:
            ConfigError: it is not valid, or the cluster file cannot be read.
        """
        content = read_yaml(find_configuration(Path(self.preset)))
        if self.size.startswith("pilot"):
            apply_overrides(content, _PILOT)
        models = {"teacher": self.teacher, "student": self.student}
        apply_overrides(content, tuple(f"{role}.model={json.dumps(model)}" for role, model in models.items() if model))
        sources = {"seed_pool": self.seeds, "reference": self.reference, "evaluation": self.evaluation}
        for name, path in sources.items():
            if path:
                limit = content.get(name, {}).get("limit")
                content[name] = {"path": path} | ({"limit": limit} if limit else {})
        if self.cluster:
            content["cluster"] = read_cluster(Path(self.cluster)).model_dump(mode="json")
        return parse_experiment(content | {"name": self.name}, f"the preset {self.preset} with these values")

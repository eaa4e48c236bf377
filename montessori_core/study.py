"""A study: several methods on equal terms, over several seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator
from scipy.stats import bootstrap

from montessori_core.config import (
    RUN_NAME,
    Experiment,
    FolderName,
    Section,
    Student,
    apply_overrides,
    parse,
    read_experiment,
    read_overridden,
)
from montessori_core.errors import ConfigError
from montessori_core.presets import find_configuration

_RESAMPLES = 9999
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Study(Section):
    """Methods that are compared: the same models, sets, sizes, recipe and seeds for each."""

    name: FolderName = Field("study", pattern=RUN_NAME, description="Name of the study and of its folder.")
    experiment: Experiment = Field(description="What all methods share. `iterations` is the rounds of montessori.")
    methods: tuple[str, ...] = Field(
        ("montessori", "self_instruct"),
        min_length=1,
        description="Methods by name (`montessori methods` lists them), or module:NAME of your own.",
    )
    baseline: str = Field("self_instruct", description="The method that the others are compared with.")
    transfer: tuple[Student, ...] = Field(
        (), description="Other students that are trained on the same data, none of it made for them (Section 5.4)."
    )
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="Everything is done once with each.")

    @model_validator(mode="after")
    def _names_differ(self) -> "Study":
        for field in ("methods", "seeds"):
            named = getattr(self, field)
            if len(set(named)) < len(named):
                raise ValueError(f"{field} has an entry twice; name each once")
        if self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline!r} is not among the methods; add it there, or name one that is")
        return self

    @model_validator(mode="after")
    def _conversations_fit_processes(self) -> "Study":
        if "nomad" in self.methods:
            self.experiment.check_batch("nomad")
            if self.experiment.nomad.training is not None:
                self.experiment.check_batch("nomad.training")
        return self

    def seeded(self, seed: int, student: Student | None = None) -> Experiment:
        """The experiment with one of the seeds, and another student if one is given.

        What a single run computes for comparison, the study does itself.
        """
        changes: dict[str, Any] = {
            "name": f"{self.name}-{seed}"[:80],
            "seed": seed,
            "comparison": {"unmodified_teacher": False, "influence_examples": 0},
        }
        if student is not None:
            changes["student"] = student.model_dump(mode="json")
        return Experiment.model_validate(self.experiment.model_dump(mode="json") | changes)


def read_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Read a study from YAML; `path` may be the name of a preset.

    Its `experiment` may be a path relative to the study's file, or the name of a preset.

    Raises:
        ConfigError: a file is missing, is not YAML, or does not fit; every field at fault is named.
    """
    path = find_configuration(path, "studies")
    content = read_overridden(path, ())
    if isinstance(content.get("experiment"), str):
        try:
            experiment = find_configuration(Path(content["experiment"]), folder=path.parent)
            content["experiment"] = read_experiment(experiment).model_dump(mode="json")
        except ConfigError as error:
            raise ConfigError(f"{path}: experiment: {error}") from error
    apply_overrides(content, overrides)
    return parse(Study, content, f"{path}: the study")


@dataclass(frozen=True)
class Outcome:
    """What a method reached.

    Attributes:
        method: its name.
        losses: [seeds, examples] held-out loss of each evaluation example, nats per token.
        seconds: [seeds] of all jobs that the method needs, shared ones included.
        flops: [seeds] floating-point operations of the same, those of models behind an API not among them.
    """

    method: str
    losses: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray


def compare_outcomes(outcomes: list[Outcome], baseline: str) -> list[dict[str, Any]]:
    """A row for each method: its held-out loss, and the gain over the baseline with what is known of its error.

    The interval (95 %) resamples evaluation examples, whose gains are averaged over the seeds first; the spread is the
    standard deviation of the seeds' mean gains. The first says whether the gain holds for other examples, the second
    whether it holds for other runs.
    """
    (reference,) = (outcome for outcome in outcomes if outcome.method == baseline)
    rows = []
    for outcome in outcomes:
        gains = reference.losses - outcome.losses
        low = high = 0.0
        if outcome is not reference:
            interval = bootstrap(
                (gains.mean(axis=0),),
                np.mean,
                n_resamples=_RESAMPLES,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
        rows.append(
            {
                "method": outcome.method,
                "held_out_loss": float(outcome.losses.mean()),
                "gain": float(gains.mean()),
                "gain_low": low,
                "gain_high": high,
                "gain_of_seeds": [float(gain) for gain in gains.mean(axis=1)],
                "spread_over_seeds": float(gains.mean(axis=1).std(ddof=1)) if len(gains) > 1 else None,
                "job_seconds": float(outcome.seconds.mean()),
                "flops": float(outcome.flops.mean()),
            }
        )
    return rows

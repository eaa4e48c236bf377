"""Validate influence: train a student on subsets of the examples, and compare the outcomes with what influence predicts.

Stages: warm-up; influence by each estimator, and cheap rivals; trainings on random subsets and on all examples but a group;
trainings on the top, middle and bottom tenth by each predictor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.backends import open_backend
from flows.influence import MeasurementStages, compute_parts
from flows.measurement import Inputs, Measurement, opened_inputs
from montessori_core import programs
from montessori_core.config import DataSource, Influence, Optimization, Warmup, Zero
from montessori_core.config.influence import LARGEST_LINEAR_WEIGHT
from montessori_core.data.bad_rows import BadRow
from montessori_core.data.bm25 import bm25
from montessori_core.data.rows import Positions, Rows, SubsetRow, TrainingRow
from montessori_core.data.sources import Task, check_reference_size, read_tasks, write_tasks
from montessori_core.data.tables import PREDICTIONS, RETRAINING, UTILITY, read_table, table_from_rows, write_table
from montessori_core.errors import ConfigError, DataError
from montessori_core.files import write_json
from montessori_core.influence.table import cut_warnings, summarize_influence
from montessori_core.influence.validation import (
    Floats,
    cut_into_batches,
    left_out_groups,
    predict,
    random_subsets,
    score_predictors,
    shuffled,
    tenths,
)
from montessori_core.models.fingerprints import moments_fingerprint
from montessori_report.validation_page import validation_page
from tasks.resume import record_command, remove_stale
from tasks.run import Model
from tasks.screening import estimate_influence

RESULT, PAGE = "validation.json", "validation.html"
TRAININGS, PREDICTED = "trainings.parquet", "predictions.parquet"
FEWEST = 20  # examples: a tenth has two
_SHARD = 8  # trainings


@dataclass(frozen=True)
class Validation:
    """A validation of influence.

    Attributes:
        measurement: student, data, and settings of the measurement; its settings are replaced by `settings`.
        warmup: examples that warm the student up; None: the student is as it is, or `measurement.warm_state` is given.
        settings: settings to compare, which differ in the weight of an example.
        exact: also measure exact influence, which reads the reference set for every example.
        recipe: recipe of the trainings; its peak rate is also that of the warm-up and of the influence step.
        subsets: number of random subsets.
        subset_size: examples of a random subset; None: a quarter of the examples.
        groups: number of groups that are left out in turn; 0: none.
        seed: random seed of subsets and groups.
    """

    measurement: Measurement
    warmup: DataSource | None
    settings: Sequence[Influence]
    exact: bool
    recipe: Optimization
    subsets: int
    subset_size: int | None
    groups: int
    seed: int

    def subset_size_of(self, examples: int) -> int:
        """Return the number of examples of a random subset."""
        return self.subset_size or examples // 4

    def summary(self) -> dict[str, Any]:
        """Return the settings as plain data, for the result."""
        measurement = self.measurement
        return {
            "student": measurement.student.model,
            **measurement.student.model_dump(include={"max_length", "chat_template", "chat_template_kwargs"}),
            "warm_state": str(measurement.warm_state) if measurement.warm_state else None,
            "warmup": self.warmup.path if self.warmup else None,
            "examples": measurement.examples.path,
            "reference": measurement.reference.path,
            "reference_reduction": measurement.settings.reference_reduction,
            "dtype": measurement.settings.dtype,
            "example_weights": list(map(weight_of, self.settings)),
            "seed": self.seed,
            **self.recipe.model_dump(include={"learning_rate", "batch_size", "epochs"}),
        }


def validate_influence(validation: Validation, out: Path, command: Sequence[str]) -> dict[str, Any]:
    """Measure, train and compare; write the result and its tables to the folder `out`, and return the result.

    Every stage keeps its finished work in `out`, so that the validation can be resumed.

    Args:
        validation: what is validated.
        out: the folder.
        command: words after `montessori` of the command that resumes it.

    Raises:
        UserError: an option, a file or the model is invalid; the message names it.
    """
    measurement = validation.measurement
    if validation.warmup and measurement.warm_state:
        raise ConfigError("--warmup and --warm-state: give one of them; a warm student needs no warm-up")
    bad_rows: list[BadRow] = []
    warmup = read_tasks(validation.warmup, "warmup", True, bad_rows) if validation.warmup else []
    if warmup:
        open_backend(measurement.cluster, measurement.cluster.resources.training, None, "training")

    def check(examples: int, reference: int) -> None:
        check_reference_size(reference, measurement.reference)
        _check_sizes(validation, examples, "examples")

    out = out.resolve()
    with opened_inputs(measurement, out, bad_rows, check) as inputs:
        results = [out / name for name in (RESULT, PAGE, TRAININGS, PREDICTED)]
        remove_stale(out, _decides(validation, warmup, inputs), results)
        record_command(out, command, measurement.student.model, out / RESULT, measurement.cluster)
        if warmup:
            inputs = replace(inputs, models=_warm_up(validation, warmup, inputs, out / "warmup"))
        values, warnings = _measure_predictors(validation, inputs, out)
        usable: list[int] = np.flatnonzero(np.isfinite(list(values.values())).all(axis=0)).tolist()
        _check_sizes(validation, len(usable), "examples with response tokens and finite influence")
        trainings = _Trainings(validation, inputs, out)
        result = _compare(validation, values, usable, trainings)
        result |= {
            "settings": validation.summary(),
            "reference_examples": len(inputs.reference),
            "examples_left_out": len(inputs.rows) - len(usable),
            "warnings": warnings,
        }
        write_table(pa.concat_tables(trainings.tables), out / TRAININGS, RETRAINING)
        ids = [task.example_id for task in inputs.examples]
        records: list[dict[str, object]] = [
            {"example_id": example_id, "predictor": name, "value": value if math.isfinite(value) else None}
            for name, column in values.items()
            for example_id, value in zip(ids, column.tolist(), strict=True)
        ]
        write_table(table_from_rows(records, PREDICTIONS), out / PREDICTED, PREDICTIONS)
        write_json(result, out / RESULT)
        validation_page(result).write(out / PAGE)
    return result


def _decides(validation: Validation, warmup: Sequence[Task], inputs: Inputs) -> dict[str, Any]:
    """Return the settings and hashes of inputs that decide the result of a validation."""
    measurement = validation.measurement
    return {
        "settings": [settings.model_dump(mode="json", exclude_none=True) for settings in validation.settings],
        "baseline": measurement.baseline,
        "max_length": measurement.student.max_length,
        "recipe": validation.recipe.model_dump(mode="json", exclude_none=True),
        **{name: getattr(validation, name) for name in ("exact", "subsets", "subset_size", "groups", "seed")},
        "warmup": [vars(task) for task in warmup],
        "inputs": inputs.hashes,
    }


def _check_sizes(validation: Validation, examples: int, what: str) -> None:
    """Check that there are enough examples for the trainings.

    Raises:
        DataError: there are not.
    """
    size, groups = validation.subset_size_of(examples), validation.groups
    if examples < FEWEST:
        raise DataError(
            f"--examples: {examples} {what}; a validation needs at least {FEWEST}, better a hundred or more"
        )
    if size >= examples:
        raise DataError(f"--subset-size {size}: random subsets of {size} need more than {examples} {what}")
    if groups > examples:
        raise DataError(f"--leave-out {groups}: there are only {examples} {what} to divide into groups")


def _warm_up(validation: Validation, warmup: list[Task], inputs: Inputs, folder: Path) -> Mapping[str, Model]:
    """Train the student on the warm-up examples; return the warm student and its moments."""
    recipe = Warmup.model_validate(validation.recipe.model_dump(exclude={"schedule", "epochs"})).shared()
    settings = programs.Sft(
        max_length=validation.measurement.student.max_length,
        lora=None,
        recipe=recipe,
        zero=Zero(),
        seed=validation.seed,
        save_moments=True,
    )
    rows = Rows.of([task.to_training_row() for task in warmup], TrainingRow)
    student, cluster = replace(inputs, files={}), validation.measurement.cluster
    (part,) = compute_parts(folder, programs.SFT, settings, rows, student, cluster)
    return {"student": Model.of(part), "moments": Model(str(part), moments_fingerprint(part))}


def _measure_predictors(validation: Validation, inputs: Inputs, out: Path) -> tuple[dict[str, Floats], list[str]]:
    """Return [examples] values by predictor, NaN for an example that cannot be measured; and warnings."""
    values: dict[str, Floats] = {}
    for settings in validation.settings:
        weight = weight_of(settings)
        at_weight = f", {weight}" if len(validation.settings) > 1 else ""
        measurement = replace(validation.measurement, settings=settings)
        stages = MeasurementStages(out / f"influence-{weight.replace(' ', '-')}", measurement, inputs)
        first_order = stages.measure_all("first_order").read_all()
        if validation.exact:
            exact = stages.measure_all("exact").read_all()
            values[f"exact{at_weight}"] = _column(exact, "influence_null_step")
            if len(inputs.rows) > settings.screening.audit_examples:
                screened = settings.model_copy(update={"estimator": "screened"})
                table = estimate_influence(
                    MeasuredStages(first_order, exact), screened, measurement.baseline
                ).read_all()
                values[f"screened{at_weight}"] = _column(table, "influence_null_step")
        values[f"first order{at_weight}"] = _column(first_order, "influence_null_step")
        if settings.example_weight <= LARGEST_LINEAR_WEIGHT:
            values[f"linear{at_weight}"] = _column(stages.measure_all("linear").read_all(), "influence_null_step")
    values["loss"] = _column(first_order, "example_loss")
    values["response tokens"] = _column(first_order, "response_tokens")
    values["gradient norm"] = _column(first_order, "gradient_norm")
    settings = validation.measurement.settings
    cosine = programs.ReferenceSignal(
        max_length=validation.measurement.student.max_length,
        batch_tokens=settings.reference_batch_tokens,
        reference_reduction=settings.reference_reduction,
    )
    cluster = validation.measurement.cluster
    parts = compute_parts(out / "cosine", programs.GRADIENT_COSINE, cosine, inputs.rows, inputs, cluster, 2 * _SHARD)
    values["gradient cosine"] = _column(read_table(parts, UTILITY), "utility")
    documents, queries = ([f"{t.request} {t.response}" for t in tasks] for tasks in (inputs.examples, inputs.reference))
    values["BM25"] = bm25(documents, queries)
    return values, cut_warnings(summarize_influence(first_order, threshold=0.0))


class MeasuredStages:
    """Stages of examples that both estimators have measured, for `estimate_influence`."""

    def __init__(self, first_order: pa.Table, exact: pa.Table) -> None:
        self._first_order, self._exact = first_order, exact

    def measure_all(self, estimator: str) -> pa.RecordBatchReader:
        return self._first_order.to_reader()

    def measure_exactly(self, name: str, positions: Positions) -> pa.RecordBatchReader:
        return self._exact.take(positions).to_reader()


class _Trainings:
    """Trainings of the warm student.

    Attributes:
        tables: results of the stages so far.
    """

    def __init__(self, validation: Validation, inputs: Inputs, out: Path) -> None:
        self._validation, self._out = validation, out
        examples = out / "examples.jsonl"
        write_tasks(inputs.examples, examples)
        self._inputs = replace(inputs, files={**inputs.files, "examples": examples})
        self.tables: list[pa.Table] = []

    def losses(self, stage: str, batches: Mapping[str, list[list[int]]]) -> dict[str, float]:
        """Return the reference loss after a training on the batches of each id."""
        measurement = self._validation.measurement
        settings = programs.Retraining(
            max_length=measurement.student.max_length,
            batch_tokens=measurement.settings.reference_batch_tokens,
            reference_reduction=measurement.settings.reference_reduction,
            recipe=self._validation.recipe.model_copy(update=self._inputs.adamw),
            mixed=measurement.settings.dtype != "float32",
        )
        rows: list[SubsetRow] = [{"training_id": name, "batches": steps} for name, steps in batches.items()]
        table_rows, folder = Rows.of(rows, SubsetRow), self._out / stage
        parts = compute_parts(
            folder, programs.RETRAINING, settings, table_rows, self._inputs, measurement.cluster, _SHARD
        )
        table = read_table(parts, RETRAINING)
        self.tables.append(table)
        return dict(zip(batches, table["reference_loss"].to_pylist(), strict=True))


def _compare(
    validation: Validation, values: Mapping[str, Floats], usable: Sequence[int], trainings: _Trainings
) -> dict[str, Any]:
    """Train on random subsets, all examples but a group, and deciles; return the scores of all predictors."""
    batch, seed = validation.recipe.batch_size, validation.seed
    size = validation.subset_size_of(len(usable))
    subsets = random_subsets(usable, validation.subsets, size, seed)
    groups = left_out_groups(usable, validation.groups, seed) if validation.groups else []
    everything = shuffled(usable, seed)
    batches = {f"random-{number:05d}": cut_into_batches(members, batch) for number, members in enumerate(subsets)}
    left_out = {f"without-{n:05d}": cut_into_batches(everything, batch, group) for n, group in enumerate(groups)}
    all_batches = {"all": cut_into_batches(everything, batch)} if groups else {}
    losses = trainings.losses("retraining", {"none": [], **batches, **all_batches, **left_out})
    falls = np.array([losses["none"] - losses[name] for name in batches])
    result: dict[str, Any] = {
        "examples": len(usable),
        "student_loss": losses["none"],
        "random_subsets": {"size": size, **_agreement(values, subsets, falls)},
    }
    if groups:
        harms = np.array([losses[name] - losses["all"] for name in left_out])
        result["left_out"] = {"size": len(groups[0]), **_agreement(values, groups, harms)}
    result["tenths"] = _train_on_deciles(validation, values, usable, trainings, losses["none"])
    return result


def _train_on_deciles(
    validation: Validation, values: Mapping[str, Floats], usable: Sequence[int], trainings: _Trainings, loss: float
) -> dict[str, Any]:
    """Return the drop in reference loss after a training on the deciles by each predictor; `loss` is before it."""
    ranked = {name: tenths(usable, column) for name, column in values.items()}
    batches = {
        f"{part} {name}": cut_into_batches(shuffled(members, validation.seed), validation.recipe.batch_size)
        for name, parts in ranked.items()
        for part, members in parts.items()
    }
    losses = trainings.losses("retraining-tenths", batches)
    falls = [
        {"predictor": name, **{part: loss - losses[f"{part} {name}"] for part in parts}}
        for name, parts in ranked.items()
    ]
    return {"size": len(next(iter(ranked.values()))["top"]), "falls": falls}


def _agreement(values: Mapping[str, Floats], subsets: Sequence[Sequence[int]], outcomes: Floats) -> dict[str, Any]:
    """Return scores, predictions and outcomes as plain data; None where a number is not finite."""
    predictions = {name: predict(column, subsets) for name, column in values.items()}
    scores = [asdict(score) for score in score_predictors(predictions, outcomes)]
    return {
        "scores": [{k: v if k == "predictor" or math.isfinite(v) else None for k, v in s.items()} for s in scores],
        "predicted": {name: column.tolist() for name, column in predictions.items()},
        "measured": outcomes.tolist(),
    }


def weight_of(settings: Influence) -> str:
    """Return the weight of an example as text."""
    return f"weight {settings.example_weight:g}" + (" per token" if settings.weight_per == "token" else "")


def _column(table: pa.Table, name: str) -> Floats:
    values: Floats = table[name].to_numpy().astype(np.float64)
    return values

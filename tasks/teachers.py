"""Preference pairs and the teacher update (Section 3.3)."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import layout, programs
from montessori_core.data.rows import PairRow, Rows
from montessori_core.data.tables import EXAMPLES, INFLUENCE, PREFERENCES, UTILITY, UTILITY_PREFERENCES, read_table
from montessori_core.errors import UserError
from montessori_core.influence.preferences import (
    PAIRED,
    pair_by_influence,
    pair_by_utility,
    pair_extremes,
    threshold_of,
    write_preferences,
)
from montessori_core.influence.table import summarize_influence
from tasks.run import Model
from tasks.stage import Step


@task(task_run_name="{step.label}: preference pairs", cache_policy=NO_CACHE)
def collect_preferences(step: Step, examples: Path, influence: Path) -> Path:
    """Build preference pairs from influence; write `preferences.parquet` into the step's folder.

    Raises:
        UserError: there are no pairs: no prompt, or across prompts no set, has both a helpful and a harmful example.
    """
    settings = step.experiment.preferences
    table = read_table(influence, INFLUENCE, PAIRED)
    pairs = pair_by_influence(table, settings)
    if pairs.num_rows == 0:
        summary = summarize_influence(read_table(influence, INFLUENCE), threshold_of(table, settings.baseline))
        across = settings.pairs == "across_prompts"
        better = "median" if across else "prompt"
        raise UserError(
            f"{step.label}: no preference pairs: {'the probing set does not have' if across else 'no prompt has'} both an "
            f"example above and one below the threshold (baseline {settings.baseline}, {summary['share_positive']:.0%} of "
            f"{summary['measured']} examples positive). "
            + ("" if settings.baseline == better else f"Set preferences.baseline={better}, or ")
            + "lower preferences.margin, or raise influence.probing_examples"
        )
    path = step.folder / layout.PREFERENCES
    write_preferences(pairs, examples, path, PREFERENCES)
    _publish(step.label, pairs, settings.baseline)
    return path


@task(task_run_name="{step.label}: preference pairs", cache_policy=NO_CACHE)
def collect_utility_preferences(step: Step, examples: Path, utility: Path, extremes: bool = False) -> Path:
    """Build preference pairs from a utility; write `preferences.parquet` into the step's folder.

    Args:
        step: the step whose folder gets the table.
        examples: table of schema `EXAMPLES`.
        utility: table of schema `UTILITY`.
        extremes: one pair per prompt, best and worst; otherwise pairs across the median of all prompts, see
            `preferences.pairs`.

    Raises:
        UserError: there are no pairs: no prompt has both a better and a worse example.
    """
    table = read_table(utility, UTILITY)
    pairs = pair_extremes(table) if extremes else pair_by_utility(table, step.experiment.preferences)
    if pairs.num_rows == 0:
        raise UserError(
            f"{step.label}: no preference pairs: there is no better and worse example to compare ({table.num_rows} examples, "
            f"{table['utility'].null_count} without a score). Raise influence.probing_examples or "
            "synthesis.samples_per_prompt"
        )
    path = step.folder / layout.PREFERENCES
    write_preferences(pairs, examples, path, UTILITY_PREFERENCES)
    baseline = "prompt" if step.experiment.preferences.baseline == "prompt" else "median"
    _publish(step.label, pairs, "best and worst" if extremes else baseline)
    return path


def update_teacher(
    step: Step,
    teacher: Model,
    preferences: Path,
    schema: pa.Schema = PREFERENCES,
    answered: Path | None = None,
    keep: int = 0,
    lora: bool = True,
) -> Model:
    """Train the teacher, or a student that writes responses, on preference pairs with DPO (Eq. 4).

    Args:
        step: the step of the update.
        teacher: the model to train.
        preferences: table of pairs.
        schema: schema of `preferences`.
        answered: example table, if the pairs consist of responses: these are chats regardless of the teacher's prompt
            style, and some were cut at the token limit. None if the pairs consist of instructions.
        keep: number of checkpoints to keep, see `kept_teachers`.
        lora: whether to train an adapter, if `teacher_update.lora` is set.
    """
    pairs = read_table(preferences, schema)
    experiment = step.experiment
    style = experiment.teacher.prompt_style if answered is None else "chat"
    responses = read_table(answered, EXAMPLES, ["example_id", "response_finished"]) if answered is not None else None
    for output in ("chosen", "rejected"):
        finished = pa.repeat(True, pairs.num_rows)
        if responses is not None:
            finished = responses["response_finished"].take(pc.index_in(pairs[f"{output}_id"], responses["example_id"]))
        pairs = pairs.append_column(f"{output}_finished", finished)
    recipe = experiment.teacher_update
    if not lora:
        recipe = recipe.model_copy(update={"lora": None, "quantization": None})  # only an adapter learns on 4 bits
    settings = programs.Dpo(prompt_style=style, recipe=recipe, zero=experiment.zero, seed=experiment.seed, keep=keep)
    return step.train(
        programs.DPO, settings, Rows.of_table(pairs, PairRow), {"teacher": teacher}, upstream=[preferences]
    )


def kept_teachers(updated: Model) -> dict[int, Model]:
    """Return the kept checkpoints of a teacher update, by optimizer step."""
    folders = sorted((Path(updated.path) / layout.KEPT).glob("step-*"))
    return {int(folder.name.removeprefix("step-")): Model.of(folder) for folder in folders}


def reward_margins(updated: Model, checkpoints: Iterable[int]) -> dict[int, float]:
    """Return DPO's reward margin at checkpoints and the last step of an update, by optimizer step (Section 5.2).

    A step has the margin of its batch, two pairs in Table 4. It is averaged over the steps since the checkpoint before.
    """
    log = json.loads((Path(updated.path) / layout.LOG_FILE).read_text())
    margins = {int(entry["step"]): float(entry["rewards/margins"]) for entry in log if "rewards/margins" in entry}
    ends = sorted({*checkpoints, max(margins)})
    return {
        end: fmean(margin for step, margin in margins.items() if start < step <= end)
        for start, end in pairwise([0, *ends])
    }


def _publish(label: str, pairs: pa.Table, baseline: str) -> None:
    create_table_artifact(
        [{"pairs": pairs.num_rows, "prompts": pc.count_distinct(pairs["prompt_id"]).as_py(), "baseline": baseline}],
        description=f"Preference pairs - {label}",
    )

"""The stages of NOMAD: train a teacher on conversations, generate with it, measure similarity, mix with real examples."""

import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import layout, programs
from montessori_core.config import Optimization, RougeFilter
from montessori_core.data.rows import GenerationRow, Rows, TaskRow
from montessori_core.data.sources import check_single_turns
from montessori_core.data.tables import EXAMPLES, INSTRUCTIONS, SIMILARITY, read_table, table_from_rows, write_table
from montessori_core.errors import UserError
from montessori_core.program import Row
from montessori_core.seeding import seed_of
from montessori_core.synthesis.filtering import SURPLUS, OpenFilters
from montessori_core.synthesis.filters.filter import Candidate
from montessori_core.synthesis.nomad import USER, judge_conversation, read_conversation
from tasks.generation import generate
from tasks.run import Model, Run
from tasks.stage import Step
from tasks.synthesis import SynthesisResult, count_candidates, join_synthesis

_DRAW = "nomad"
_FEWEST_STEPS = 10


def check_steps(run: Run) -> None:
    """Check that the teacher, and a student with a recipe of its own, would take enough training steps.

    Raises:
        UserError: a set has too few batches, or conversations of several rounds.
    """
    nomad = run.experiment.nomad
    check_single_turns(run.sources().reference, "nomad")
    recipes: dict[str, tuple[Optimization, int, str]] = {
        "nomad": (nomad, min(len(run.sources().reference), nomad.teacher_examples), "a larger reference set")
    }
    if nomad.training is not None:
        recipes["nomad.training"] = nomad.training, run.experiment.training.examples, "more training.examples"
    for section, (recipe, examples, remedy) in recipes.items():
        steps = recipe.epochs * math.ceil(examples / recipe.batch_size)
        if steps < _FEWEST_STEPS:
            raise UserError(
                f"{section}: {examples} examples in batches of {recipe.batch_size} train for {steps} steps, fewer than "
                f"{_FEWEST_STEPS}; give {remedy}, lower {section}.batch_size or raise {section}.epochs"
            )


def train_nomad_teacher(step: Step) -> Model:
    """Fine-tune the initial teacher on conversations of the reference set, or of a random part of it."""
    experiment = step.experiment
    nomad = experiment.nomad
    real = list(step.run.sources().reference)
    random.Random(seed_of(experiment.seed, _DRAW, "teacher")).shuffle(real)
    rows = [task.to_training_row() for task in real[: nomad.teacher_examples]]
    settings = programs.Sft(
        max_length=experiment.student.max_length,
        lora=None,
        recipe=nomad.shared(),
        zero=experiment.zero,
        seed=experiment.seed,
        save_moments=False,
        conversations=True,
        mask_prompts=nomad.mask_prompts,
    )
    return step.train(programs.SFT, settings, rows, {"student": step.run.initial_teacher()})


def write_conversations(step: Step, teacher: Model, count: int) -> SynthesisResult:
    """Generate conversations from their beginning alone until `count` of them pass the filters.

    Raises:
        UserError: too few were accepted after `synthesis.max_rounds` rounds.
    """
    settings, seed = step.experiment.synthesis, step.experiment.seed
    # NOMAD has filters of its own; of the list, only similarity applies to conversations.
    similarity = tuple(entry for entry in settings.filters if isinstance(entry, RougeFilter))
    real = [task.instruction for task in step.run.sources().reference]
    filters = OpenFilters(settings.model_copy(update={"filters": similarity}), real)
    candidates: list[Row] = []
    examples: list[Row] = []
    parts: list[Path] = []
    rounds: list[tuple[int, int]] = []
    for number in range(1, settings.max_rounds + 1):
        missing = count - len(examples)
        if missing == 0:
            break
        wanted = count_candidates(missing, rounds, settings.oversampling)
        names = [f"{_DRAW}-{n}" for n in range(len(candidates), len(candidates) + wanted)]
        rows: list[GenerationRow] = [
            {"example_ids": [name], "turns": [USER], "seeds": [seed_of(seed, name)]} for name in names
        ]
        turn = step if number == 1 else step.renamed(f"{step.label}, round {number}")
        writing, size = turn.at(f"conversations-{number}"), settings.instructions_per_shard
        generated, written = generate(writing, teacher, rows, size, step.experiment.nomad.sampling, "whole", parts[-1:])
        parts += written
        for row in generated:
            conversation = read_conversation(row["raw_output"], row["finish_reason"])
            rejection = judge_conversation(conversation)
            if conversation is not None and rejection is None:
                rejection = filters.judge(Candidate(conversation.instruction))
            if rejection is None and len(examples) == count:
                rejection = SURPLUS
            common = {name: row[name] for name in ("example_id", "prompt", "raw_output")} | {
                "prompt_id": row["example_id"]
            }
            instruction = conversation.instruction if conversation else None
            candidates.append(common | {"demonstrations": [], "instruction": instruction, "rejection": rejection})
            if conversation is not None and rejection is None:
                examples.append(common | vars(conversation) | {"response_finished": True})
        rounds.append((len(generated), len(examples) - (count - missing)))
    tables = table_from_rows(candidates, INSTRUCTIONS), table_from_rows(examples, EXAMPLES)
    return join_synthesis(f"{step.label}: table", step.folder, *tables, count, parts)


def measure_norm_sim(step: Step, examples: Path) -> Path:
    """Measure the similarity of synthetic to real examples; write `norm-sim.parquet` in the step's folder."""
    rows = Rows.of_file(examples, EXAMPLES, TaskRow)
    parts = step.execute(
        programs.NORM_SIM,
        programs.Similarity(max_length=step.experiment.student.max_length),
        rows,
        step.experiment.synthesis.instructions_per_shard,
        models={"student": step.run.initial_student()},
        files={"real": step.run.source_file("reference")},
        upstream=[examples],
    )
    return _join_norm_sim(step, parts)


@task(task_run_name="{step.label}: table", cache_policy=NO_CACHE, persist_result=False)
def _join_norm_sim(step: Step, parts: list[Path]) -> Path:
    table, path = read_table(parts, SIMILARITY), step.folder / "norm-sim.parquet"
    write_table(table, path, SIMILARITY)
    quantiles = np.quantile(table["norm_sim"].to_numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
    names = ("5 %", "25 %", "median", "75 %", "95 %")
    create_table_artifact(
        [{"examples": len(table)} | {name: float(value) for name, value in zip(names, quantiles, strict=True)}],
        description=f"NormSim - {step.label}: table",
    )
    return path


@task(task_run_name="{step.label}: real and synthetic", cache_policy=NO_CACHE, persist_result=False)
def mix_with_real(step: Step, written: Path, real: int) -> Path:
    """Write `real` random examples of the reference set and all of `written` to the example table of the step.

    They are shuffled, so that the first rows, on which a student within `training.response_tokens` trains, have the same
    share of real ones.
    """
    seed, path = step.experiment.seed, step.folder / layout.EXAMPLES
    draw = random.Random(seed_of(seed, _DRAW, "mixture"))
    chosen = draw.sample(step.run.sources().reference, real)
    without_prompt = {"prompt_id": "real", "prompt": "", "raw_output": ""}
    rows = [{**task.to_training_row(), **without_prompt, "example_id": f"real-{task.example_id}"} for task in chosen]
    table = pa.concat_tables([table_from_rows(rows, EXAMPLES), read_table(written, EXAMPLES)])
    order = list(range(table.num_rows))
    random.Random(seed_of(seed, _DRAW, "order")).shuffle(order)
    write_table(table.take(order).combine_chunks(), path, EXAMPLES)
    return path

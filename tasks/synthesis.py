"""Synthesis: prompts, instructions, filters and responses, in rounds, until enough examples are kept."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import layout
from montessori_core.config import Synthesis
from montessori_core.data.rows import GenerationRow
from montessori_core.data.sources import Task
from montessori_core.data.tables import EXAMPLES, INSTRUCTIONS, read_table, table_from_rows, write_table
from montessori_core.errors import UserError
from montessori_core.program import Row
from montessori_core.seeding import seed_of
from montessori_core.synthesis.filtering import CUT_THINKING, SURPLUS, OpenFilters, funnel
from montessori_core.synthesis.strategies.opened import OpenStrategy
from montessori_core.synthesis.strategies.strategy import Material
from tasks.candidates import KEPT, Authors, respond, response_of, write_responses, write_round
from tasks.run import ApiModel, Model
from tasks.stage import Step, warn

_LOW_ACCEPTANCE = 0.1  # share of accepted candidates below which a round is warned of
_LATER_ROUNDS = 1.2  # factor on the candidates that the last round's acceptance requires


@dataclass(frozen=True)
class SynthesisResult:
    """The tables of a synthesis: all candidates with their verdicts, and the accepted examples."""

    instructions: Path
    examples: Path


def synthesize(
    step: Step,
    teacher: Model | ApiModel,
    count: int,
    draw: str,
    earlier: Sequence[Path] = (),
    synthetic_pool: Path | None = None,
    seed_pool: list[Task] | None = None,
    answerer: Model | ApiModel | None = None,
) -> SynthesisResult:
    """Generate `count` examples: a teacher writes the instructions, and `synthesis.answers` says who answers them.

    Args:
        step: its folder gets tables and stages.
        teacher: a local model, or one behind an API.
        count: number of examples.
        draw: name of the random draw of prompts and samples; equal draws show equal prompts.
        earlier: example tables whose instructions must not be repeated.
        synthetic_pool: examples of the last iteration, as demonstrations; None in the first.
        seed_pool: human-written demonstrations; None takes the run's seed pool.
        answerer: model that answers in place of the one of `synthesis.answers`.

    Raises:
        UserError: too few examples were accepted after `max_rounds` rounds.
    """
    settings, seed = step.experiment.synthesis, step.experiment.seed
    seeds, pool = _seeds(step, seed_pool), _pool(synthetic_pool)
    earlier_instructions = read_table(earlier, EXAMPLES, ["instruction"])["instruction"].to_pylist() if earlier else []
    authors = open_authors(step, teacher, answerer, seeds, pool, earlier_instructions, draw)
    candidates: list[Row] = []
    examples: list[Row] = []
    prompts_used = 0
    parts: list[Path] = []
    rounds: list[tuple[int, int]] = []
    for number in range(1, settings.max_rounds + 1):
        missing = count - len(examples)
        if missing == 0:
            break
        wanted = math.ceil(count_candidates(missing, rounds, settings.oversampling) / settings.samples_per_prompt)
        prompts = authors.strategy.prompts(wanted, seed_of(seed, draw), prompts_used)
        prompts_used += wanted
        turn = step if number == 1 else step.renamed(f"{step.label}, round {number}")
        upstream = [*([synthetic_pool] if synthetic_pool else []), *parts[-1:]]
        written = write_round(turn, number, prompts, missing, authors, upstream)
        examples += written.examples
        candidates += written.candidates
        parts += written.parts
        rounds.append((len(written.candidates), len(written.examples)))
        if warning := warn_of_low_acceptance(written.candidates):
            warn(turn.label, warning)
    # Tables, not lists of rows: Prefect inspects every element of a list.
    tables = table_from_rows(candidates, INSTRUCTIONS), table_from_rows(examples, EXAMPLES)
    return join_synthesis(step.label, step.folder, *tables, count, parts)


def open_authors(
    step: Step,
    teacher: Model | ApiModel,
    answerer: Model | ApiModel | None,
    seeds: Sequence[Task],
    synthetic: Sequence[Task],
    earlier_instructions: Sequence[str],
    draw: str,
) -> Authors:
    """Open the strategy and the filters of a set of examples.

    Args:
        step: of the set.
        teacher, answerer, draw: see `synthesize`.
        seeds: human-written demonstrations.
        synthetic: tasks of the last iteration.
        earlier_instructions: instructions that must not be repeated.

    Raises:
        UserError: the strategy cannot ask a teacher behind an API.
    """
    settings, run = step.experiment.synthesis, step.run
    style = "chat" if isinstance(teacher, ApiModel) else step.experiment.teacher.prompt_style
    pool = run.sources().seed_pool
    strategy = OpenStrategy(Material(style, settings, seeds, synthetic, run.passages()), pool)
    if isinstance(teacher, ApiModel) and not strategy.strategy.chat_api:
        raise UserError(
            f"{step.label}: synthesis.strategy: {strategy.strategy.name} needs a teacher that jobs load; a chat API cannot "
            "begin a user's turn. Choose another strategy or another method"
        )
    filters = OpenFilters(settings, earlier_instructions, [task.instruction for task in pool])
    return Authors(teacher, answerer or choose_answerer(step, teacher), strategy, filters, draw)


def choose_answerer(step: Step, teacher: Model | ApiModel) -> Model | ApiModel:
    """Return who answers a teacher's instructions, by `synthesis.answers`; a teacher behind an API answers itself."""
    answers = step.experiment.synthesis.answers
    if isinstance(teacher, ApiModel) or answers == "updated":
        return teacher
    return step.run.initial_teacher() if answers == "unmodified" else ApiModel("answerer")


def _seeds(step: Step, seed_pool: list[Task] | None) -> list[Task]:
    """Return the human-written demonstrations."""
    seeds = step.run.sources().seed_pool if seed_pool is None else seed_pool
    check_demonstrations(step.label, seeds, step.experiment.synthesis)
    return seeds


def check_demonstrations(label: str, tasks: Sequence[Task], settings: Synthesis) -> None:
    """Check that there are enough tasks for the demonstrations of a prompt; `label` begins the error.

    Raises:
        UserError: a prompt needs more.
    """
    if len(tasks) < settings.seeds_needed:
        raise UserError(
            f"{label}: {len(tasks)} tasks to show, but a prompt of the first iteration takes {settings.seeds_needed}; give "
            "more, or lower synthesis.seed_demonstrations or synthesis.synthetic_demonstrations"
        )


def count_candidates(missing: int, rounds: Sequence[tuple[int, int]], oversampling: float) -> int:
    """Return the number of candidates of the next round of generation.

    Acceptance falls as the accepted set grows, since more candidates repeat it. So the last round's acceptance counts, and a
    fifth is added; otherwise every round would fall short.

    Args:
        missing: examples still missing.
        rounds: candidates and accepted examples of each round so far.
        oversampling: candidates per example while none was accepted.
    """
    candidates = kept = 0
    for written, accepted in reversed(rounds):
        candidates, kept = candidates + written, kept + accepted
        if kept:
            return math.ceil(_LATER_ROUNDS * missing * candidates / kept)
    return math.ceil(missing * oversampling)


def warn_of_low_acceptance(candidates: Sequence[Row]) -> str | None:
    """Return a warning if few of a round's candidates were accepted: the next round will have to write very many.

    Args:
        candidates: with their verdicts; those beyond the number that was asked for count as accepted.
    """
    reasons = Counter(row["rejection"] for row in candidates if row["rejection"] not in (None, SURPLUS))
    accepted = len(candidates) - reasons.total()
    if accepted >= _LOW_ACCEPTANCE * len(candidates):
        return None
    reason, count = reasons.most_common(1)[0]
    return (
        f"the filters accepted {accepted} of {len(candidates)} instructions, so that the next round writes many more; most "
        f"often ({count} times): {reason}. If the teacher before its update did better, the update was too strong: lower "
        "teacher_update.learning_rate or raise teacher_update.beta"
    )


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def join_synthesis(
    label: str, folder: Path, candidates: pa.Table, examples: pa.Table, count: int, parts: list[Path]
) -> SynthesisResult:
    """Write the tables, and publish the funnel of the filters."""
    result = SynthesisResult(folder / layout.INSTRUCTIONS, folder / layout.EXAMPLES)
    write_table(candidates, result.instructions, INSTRUCTIONS)
    counts = [{"step": step, "instructions": number} for step, number in funnel(candidates).items()]
    create_table_artifact(counts, description=f"Synthesis funnel - {label}")
    if examples.num_rows < count:
        raise UserError(_too_few(examples.num_rows, count, candidates, label))
    write_table(examples, result.examples, EXAMPLES)
    return result


def _pool(table: Path | None) -> list[Task]:
    if table is None:
        return []
    return [Task(**row) for row in read_table(table, EXAMPLES, ["example_id", "instruction"]).to_pylist()]


def regenerate_responses(step: Step, teacher: Model, examples: Path, first: int, last: int, draw: str) -> Path:
    """Generate several responses to each instruction; return a table in which an instruction is the prompt of its responses.

    Args:
        step: its folder gets the stage and the table `examples.parquet`.
        teacher: model that answers.
        examples: an example table.
        first, last: its rows `first` to `last` are answered.
        draw: name of the random draw of the samples.
    """
    asked = read_table(examples, EXAMPLES, ["example_id", "instruction"])[first:last].to_pylist()
    samples = range(step.experiment.synthesis.samples_per_prompt)
    rows: list[GenerationRow] = [
        {
            "example_ids": [f"{row['example_id']}-r{sample}" for sample in samples],
            "turns": [row["instruction"]],
            "seeds": [seed_of(step.experiment.seed, draw, row["example_id"], "response", sample) for sample in samples],
        }
        for row in asked
    ]
    generated, parts = respond(step.at("responses"), teacher, rows, [examples])
    owners = [row for row in asked for _ in samples]
    answered = [
        {name: response[name] for name in KEPT}
        | {"prompt_id": row["example_id"], "instruction": row["instruction"]}
        | response_of(response)
        for row, response in zip(owners, generated, strict=True)
        if response["raw_output"].strip()
    ]
    return write_examples(step, table_from_rows(answered, EXAMPLES), parts)


def answer_seeds(step: Step) -> Path:
    """Answer the seed pool like instructions of the initial teacher; write `examples.parquet` in the step's folder."""
    answerer = choose_answerer(step, step.run.initial_teacher())
    candidates: list[Row] = [
        vars(task) | {"prompt_id": task.example_id, "prompt": "", "raw_output": ""}
        for task in step.run.sources().seed_pool
    ]
    answered, parts = write_responses(step.at("responses", "responses"), answerer, candidates, "seeds", [])
    return write_examples(step, table_from_rows(answered, EXAMPLES), parts)


def join_examples(step: Step, tables: list[Path]) -> Path:
    """Concatenate example tables; write `examples.parquet` in the step's folder."""
    return write_examples(step, read_table(tables, EXAMPLES), tables, "all so far")


@task(task_run_name="{step.label}: {what}", cache_policy=NO_CACHE, persist_result=False)
def write_examples(step: Step, examples: pa.Table, parts: list[Path], what: str = "table") -> Path:
    """Write an example table made from `parts` to `examples.parquet` in the step's folder; return its path."""
    path = step.folder / layout.EXAMPLES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(examples, path, EXAMPLES)
    return path


def _too_few(kept: int, count: int, instructions: pa.Table, label: str) -> str:
    counts = funnel(instructions)
    lines = [f"  {number:6d} {reason}" for reason, number in counts.items()]
    if counts.get(CUT_THINKING):
        lines.append(
            "Thinking uses up max_tokens: raise it in synthesis.instruction and synthesis.response, or switch thinking off, "
            "e.g. teacher.chat_template_kwargs: {enable_thinking: false}"
        )
    return (
        f"{label}: only {kept} of {count} examples were kept:\n"
        + "\n".join(lines)
        + "\nFor a small or base teacher set teacher.prompt_style=completion; otherwise raise synthesis.max_rounds, add "
        "seeds to the seed pool or relax synthesis.filters"
    )

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

from montessori_core import layout, programs
from montessori_core.config import Sampling, Synthesis
from montessori_core.data.rows import GenerationRow
from montessori_core.data.sources import Task
from montessori_core.data.tables import (
    DRAWN_TOKENS,
    EXAMPLES,
    GENERATION,
    INSTRUCTIONS,
    read_table,
    table_from_rows,
    write_table,
)
from montessori_core.errors import UserError
from montessori_core.models.thinking import is_cut_thinking
from montessori_core.program import Row
from montessori_core.programs import Form
from montessori_core.seeding import seed_of
from montessori_core.synthesis.extraction import close_output
from montessori_core.synthesis.filtering import (
    CUT_THINKING,
    EMPTY_RESPONSE,
    SURPLUS,
    OpenFilters,
    filter_candidates,
    funnel,
)
from montessori_core.synthesis.prompts import Prompt, build_prompts
from tasks.run import ApiModel, Model
from tasks.stage import Step, warn

_KEPT = ("example_id", "prompt", "raw_output", *DRAWN_TOKENS)
"""Columns of a generated row that its candidate or example keeps."""
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
    answerer = answerer or choose_answerer(step, teacher)
    style = "chat" if isinstance(teacher, ApiModel) else step.experiment.teacher.prompt_style
    seeds, pool = _seeds(step, seed_pool), _pool(synthetic_pool)
    known = [text for table in earlier for text in read_table(table, EXAMPLES)["instruction"].to_pylist()]
    filters = OpenFilters(settings, known)
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
        prompts = build_prompts(wanted, style, settings, seeds, pool, seed_of(seed, draw), prompts_used)
        prompts_used += wanted
        turn = step if number == 1 else step.renamed(f"{step.label}, round {number}")
        upstream = [*([synthetic_pool] if synthetic_pool else []), *parts[-1:]]
        writing = turn.at(f"instructions-{number}", "instructions")
        fresh, written = _write_instructions(writing, teacher, style, prompts, draw, filters, upstream)
        kept = [row for row in fresh if row["rejection"] is None]
        for row in kept[missing:]:
            row["rejection"] = SURPLUS
        answering = turn.at(f"responses-{number}", "responses")
        answered, responses = _write_responses(answering, answerer, kept[:missing], draw, written)
        examples += answered
        candidates += fresh
        parts += written + responses
        rounds.append((len(fresh), len(answered)))
        if warning := warn_of_low_acceptance(fresh):
            warn(turn.label, warning)
    # Tables, not lists of rows: Prefect inspects every element of a list.
    tables = table_from_rows(candidates, INSTRUCTIONS), table_from_rows(examples, EXAMPLES)
    return join_synthesis(step.label, step.folder, *tables, count, parts)


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
    if len(tasks) < settings.seed_demonstrations + settings.synthetic_demonstrations:
        raise UserError(
            f"{label}: {len(tasks)} tasks to show, but a prompt takes {settings.seed_demonstrations} of them and "
            f"{settings.synthetic_demonstrations} synthetic ones; lower synthesis.seed_demonstrations or give more data"
        )


def count_candidates(missing: int, rounds: Sequence[tuple[int, int]], oversampling: float) -> int:
    """Return the number of candidates of the next round of generation.

    Acceptance falls as the accepted set grows, since more candidates repeat it. So the last round's acceptance counts, and a
    fifth is added; otherwise every round would fall short.

    Args:
        missing: examples still missing.
        rounds: candidates and accepted examples of each round so far.
        oversampling: candidates an example while none was accepted.
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


def _write_instructions(
    step: Step,
    teacher: Model | ApiModel,
    style: str,
    prompts: list[Prompt],
    draw: str,
    filters: OpenFilters,
    upstream: list[Path],
) -> tuple[list[Row], list[Path]]:
    """Generate and filter instructions; return the candidates with their verdicts, and the generated parts."""
    settings = step.experiment.synthesis
    samples = range(settings.samples_per_prompt)
    rows: list[GenerationRow] = [
        {
            "example_ids": [f"{draw}-{prompt.id}-s{sample}" for sample in samples],
            "turns": [prompt.text],
            "seeds": [seed_of(step.experiment.seed, draw, prompt.id, sample) for sample in samples],
        }
        for prompt in prompts
    ]
    form: Form = "tagged" if style == "completion" else "request"
    size = settings.prompts_per_shard
    generated, parts = generate(step, teacher, rows, size, settings.instruction, form, upstream)
    owners = [prompt for prompt in prompts for _ in samples]
    outputs = [
        close_output(row["raw_output"], row["finish_reason"]) if style == "completion" else row["raw_output"]
        for row in generated
    ]
    verdicts = filter_candidates(outputs, owners, style, settings.keep_newlines, filters)
    candidates: list[Row] = [
        {
            **{name: row[name] for name in _KEPT},
            "prompt_id": f"{draw}-{prompt.id}",
            "demonstrations": [task.example_id for task in prompt.demonstrations],
            "instruction": verdict.instruction,
            "rejection": CUT_THINKING if is_cut_thinking(row) else verdict.rejection,
        }
        for row, prompt, verdict in zip(generated, owners, verdicts, strict=True)
    ]
    return candidates, parts


def _write_responses(
    step: Step, answerer: Model | ApiModel, candidates: list[Row], draw: str, upstream: list[Path]
) -> tuple[list[Row], list[Path]]:
    """Answer instructions; return the examples and the generated parts. A candidate with an empty response is rejected."""
    if not candidates:
        return [], []
    rows: list[GenerationRow] = [
        {
            "example_ids": [candidate["example_id"]],
            "turns": [candidate["instruction"]],
            "seeds": [seed_of(step.experiment.seed, draw, candidate["example_id"], "response")],
        }
        for candidate in candidates
    ]
    generated, parts = _respond(step, answerer, rows, upstream)
    examples = []
    for candidate, row in zip(candidates, generated, strict=True):
        if row["raw_output"].strip():
            examples.append(candidate | _response_of(row))
        else:
            candidate["rejection"] = CUT_THINKING if is_cut_thinking(row) else EMPTY_RESPONSE
    return examples, parts


def _response_of(generated: Row) -> Row:
    """Return the response columns of an example from a generated row."""
    return {"response": generated["raw_output"].strip(), "response_finished": generated["finish_reason"] == "stop"}


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
    generated, parts = _respond(step.at("responses"), teacher, rows, [examples])
    owners = [row for row in asked for _ in samples]
    answered = [
        {name: response[name] for name in _KEPT}
        | {"prompt_id": row["example_id"], "instruction": row["instruction"]}
        | _response_of(response)
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
    answered, parts = _write_responses(step.at("responses", "responses"), answerer, candidates, "seeds", [])
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


def _respond(
    step: Step, answerer: Model | ApiModel, rows: list[GenerationRow], upstream: list[Path]
) -> tuple[list[Row], list[Path]]:
    """Generate responses; return the generated rows and their parts."""
    settings = step.experiment.synthesis
    return generate(step, answerer, rows, settings.instructions_per_shard, settings.response, "request", upstream)


def generate(
    step: Step,
    teacher: Model | ApiModel,
    rows: list[GenerationRow],
    rows_per_shard: int,
    sampling: Sampling,
    form: Form,
    upstream: list[Path],
) -> tuple[list[Row], list[Path]]:
    """Generate with a local or API teacher; return the generated rows and their parts."""
    if isinstance(teacher, ApiModel):
        parts = step.ask(teacher.section, programs.API_GENERATION, {"sampling": sampling}, rows, upstream)
    else:
        synthesis = step.experiment.synthesis
        settings = programs.Generation(
            engine=synthesis.engine, engine_options=synthesis.engine_options, form=form, sampling=sampling
        )
        parts = step.execute(
            programs.GENERATION, settings, rows, rows_per_shard, models={"teacher": teacher}, upstream=upstream
        )
    generated = read_table(parts, GENERATION).to_pylist()
    return (_without_cut_thinking(generated) if isinstance(teacher, ApiModel) else generated), parts


def _without_cut_thinking(generated: list[Row]) -> list[Row]:
    """Return answers of an endpoint, whose truncated texts may be thinking that the template opened and nothing ended.

    They are if all finished answers have thinking.
    """
    finished = [row for row in generated if row["finish_reason"] == "stop"]
    if not finished or any(row["thinking"] is None for row in finished):
        return generated
    return [
        row | {"thinking": row["raw_output"], "raw_output": ""}
        if row["finish_reason"] == "length" and row["thinking"] is None
        else row
        for row in generated
    ]


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
        + "\nFor a small or base teacher set teacher.prompt_style=completion; otherwise raise synthesis.max_rounds, widen "
        "the seed pool or relax synthesis.filters"
    )

"""Synthesis (Section 4.1 of the design): prompts, instructions, filters, responses, until enough examples are kept."""

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from cluster.stage import cut_into_shards
from montessori_core.errors import UserError
from montessori_core.program import Row
from montessori_core.rouge import Accepted
from montessori_core.schema import EXAMPLES, GENERATION, INSTRUCTIONS, read_table, table_from_rows, write_table
from montessori_core.sources import Task
from montessori_core.synthesis.filters import EMPTY_RESPONSE, SURPLUS, funnel, judge_candidates
from montessori_core.synthesis.prompts import Prompt, build_prompts, seed_of
from tasks.run import Model, Run

_PROGRAM = "montessori_core.synthesis.jobs:open_generation"
_PROMPTS_IN_A_PIECE, _INSTRUCTIONS_IN_A_PIECE = 64, 256  # with 4 samples a prompt, 256 continuations fill a GPU


@dataclass(frozen=True)
class Synthesized:
    """The tables of one synthesis: every candidate with its verdict, and the examples that were kept."""

    instructions: Path
    examples: Path


def synthesize(
    run: Run,
    folder: Path,
    label: str,
    teacher: Model,
    count: int,
    draw: str,
    earlier: list[Path],
    synthetic_pool: Path | None,
) -> Synthesized:
    """Let `teacher` write `count` examples.

    Args:
        run: the run.
        folder: where tables and stages go.
        label: for people.
        teacher: who writes.
        count: examples wanted.
        draw: names the random draw of prompts and samples; equal draws show equal prompts.
        earlier: example tables whose instructions must not be repeated.
        synthetic_pool: examples of the last iteration, as demonstrations; None in the first.

    Raises:
        UserError: after `max_rounds` rounds too few examples were kept.
    """
    settings, seed = run.experiment.synthesis, run.experiment.seed
    sources = run.sources()
    pool = _pool(synthetic_pool)
    known = [text for table in earlier for text in read_table(table, EXAMPLES)["instruction"].to_pylist()]
    accepted = Accepted(known, settings.filters.max_rouge_l)
    candidates: list[Row] = []
    examples: list[Row] = []
    prompts_used = 0
    parts: list[Path] = []
    for number in range(1, settings.max_rounds + 1):
        missing = count - len(examples)
        if missing == 0:
            break
        rate = len(examples) / len(candidates) if examples else 1.0 / settings.oversampling
        wanted = math.ceil(missing / rate / settings.samples_per_prompt)
        prompts = build_prompts(
            wanted,
            run.experiment.teacher.prompt_style,
            settings,
            sources.seed_pool,
            pool,
            seed_of(seed, draw),
            prompts_used,
        )
        prompts_used += wanted
        name = label if number == 1 else f"{label}, round {number}"
        upstream = [*([synthetic_pool] if synthetic_pool else []), *parts[-1:]]
        stage = folder / f"instructions-{number}"
        fresh, written = _write_instructions(run, stage, name, teacher, prompts, draw, accepted, upstream)
        kept = [row for row in fresh if row["rejection"] is None]
        for row in kept[missing:]:
            row["rejection"] = SURPLUS
        stage = folder / f"responses-{number}"
        answered, responses = _write_responses(run, stage, name, teacher, kept[:missing], draw, written)
        examples += answered
        candidates += fresh
        parts += written + responses
    # Tables, not rows: Prefect looks into lists, and there may be many.
    tables = table_from_rows(candidates, INSTRUCTIONS), table_from_rows(examples, EXAMPLES)
    return _join(label, folder, *tables, count, parts)


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def _join(
    label: str, folder: Path, candidates: pa.Table, examples: pa.Table, count: int, parts: list[Path]
) -> Synthesized:
    """Write the tables that the parts make, and the funnel."""
    made = Synthesized(folder / "instructions.parquet", folder / "examples.parquet")
    write_table(candidates, made.instructions, INSTRUCTIONS)
    _publish(label, funnel(candidates))
    if examples.num_rows < count:
        raise UserError(_too_few(examples.num_rows, count, candidates, label))
    write_table(examples, made.examples, EXAMPLES)
    return made


def _pool(table: Path | None) -> list[Task]:
    if table is None:
        return []
    rows = read_table(table, EXAMPLES).select(["example_id", "instruction"]).to_pylist()
    return [Task(row["example_id"], row["instruction"]) for row in rows]


def _write_instructions(
    run: Run,
    folder: Path,
    label: str,
    teacher: Model,
    prompts: list[Prompt],
    draw: str,
    accepted: Accepted,
    upstream: list[Path],
) -> tuple[list[Row], list[Path]]:
    """Candidates with their verdicts, and the parts they come from."""
    settings, style = run.experiment.synthesis, run.experiment.teacher.prompt_style
    samples = range(settings.samples_per_prompt)
    rows: list[Row] = [
        {
            "ids": [f"{draw}-{prompt.id}-s{sample}" for sample in samples],
            "text": prompt.text,
            "seeds": [seed_of(run.experiment.seed, draw, prompt.id, sample) for sample in samples],
        }
        for prompt in prompts
    ]
    parts = run.execute(
        folder,
        f"{label}: instructions",
        "generation",
        _PROGRAM,
        _settings(run, settings.instruction.model_dump(mode="json"), raw=style == "completion"),
        cut_into_shards(rows, settings.prompts_per_shard),
        models={"teacher": teacher},
        upstream=upstream,
        piece_rows=_PROMPTS_IN_A_PIECE,
    )
    generated = [row for part in parts for row in read_table(part, GENERATION).to_pylist()]
    owners = [prompt for prompt in prompts for _ in samples]
    verdicts = judge_candidates([row["text"] for row in generated], owners, style, settings.filters, accepted)
    candidates: list[Row] = [
        {
            "candidate_id": row["row_id"],
            "prompt_id": f"{draw}-{prompt.id}",
            "prompt": row["prompt"],
            "demonstrations": [task.id for task in prompt.demonstrations],
            "raw_output": row["text"],
            "instruction": verdict.instruction,
            "rejection": verdict.rejection,
        }
        for row, prompt, verdict in zip(generated, owners, verdicts, strict=True)
    ]
    return candidates, parts


def _write_responses(
    run: Run, folder: Path, label: str, teacher: Model, candidates: list[Row], draw: str, upstream: list[Path]
) -> tuple[list[Row], list[Path]]:
    """Answer the instructions; a candidate with an empty answer is marked as rejected. Examples, and their parts."""
    if not candidates:
        return [], []
    settings = run.experiment.synthesis
    rows: list[Row] = [
        {
            "ids": [candidate["candidate_id"]],
            "text": candidate["instruction"],
            "seeds": [seed_of(run.experiment.seed, draw, candidate["candidate_id"], "response")],
        }
        for candidate in candidates
    ]
    parts = run.execute(
        folder,
        f"{label}: responses",
        "generation",
        _PROGRAM,
        _settings(run, settings.response.model_dump(mode="json"), raw=False),
        cut_into_shards(rows, settings.instructions_per_shard),
        models={"teacher": teacher},
        upstream=upstream,
        piece_rows=_INSTRUCTIONS_IN_A_PIECE,
    )
    generated = [row for part in parts for row in read_table(part, GENERATION).to_pylist()]
    examples = []
    for candidate, row in zip(candidates, generated, strict=True):
        if not row["text"].strip():
            candidate["rejection"] = EMPTY_RESPONSE
            continue
        examples.append(
            {
                "example_id": candidate["candidate_id"],
                **{key: candidate[key] for key in ("prompt_id", "prompt", "raw_output", "instruction")},
                "response": row["text"].strip(),
                "response_finished": row["finish_reason"] == "stop",
            }
        )
    return examples, parts


def _settings(run: Run, sampling: dict[str, object], raw: bool) -> dict[str, object]:
    return {
        "engine": run.experiment.synthesis.engine,
        "sampling": sampling,
        "raw": raw,
    }


def _too_few(kept: int, count: int, instructions: pa.Table, label: str) -> str:
    lines = [f"  {number:6d} {reason}" for reason, number in funnel(instructions).items()]
    return (
        f"{label}: only {kept} of {count} examples were kept:\n"
        + "\n".join(lines)
        + "\nFor a small or base teacher set teacher.prompt_style=completion; otherwise raise synthesis.max_rounds, widen "
        "the seed pool or relax synthesis.filters"
    )


def _publish(label: str, counts: dict[str, int]) -> None:
    create_table_artifact(
        [{"step": step, "instructions": number} for step, number in counts.items()],
        description=f"Synthesis funnel - {label}",
    )

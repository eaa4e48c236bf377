"""One round of synthesis: instructions, their verdicts, and responses to those that the filters accept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from montessori_core.data.rows import GenerationRow
from montessori_core.data.tables import DRAWN_TOKENS
from montessori_core.models.thinking import is_cut_thinking
from montessori_core.program import Row
from montessori_core.seeding import seed_of
from montessori_core.synthesis.filtering import (
    CUT_THINKING,
    EMPTY_RESPONSE,
    SURPLUS,
    OpenFilters,
    filter_candidates,
)
from montessori_core.synthesis.prompts import Prompt
from montessori_core.synthesis.strategies.opened import OpenStrategy
from tasks.filters import embed_instructions, filter_examples
from tasks.generation import generate
from tasks.run import ApiModel, Model
from tasks.stage import Step

KEPT = ("example_id", "prompt", "raw_output", *DRAWN_TOKENS)
"""Columns of a generated row that its candidate or example keeps."""


@dataclass(frozen=True)
class Authors:
    """Who writes and who judges a set of examples.

    Attributes:
        teacher: writes the instructions.
        answerer: writes the responses.
        strategy: makes the prompts and reads the outputs.
        filters: decide what is kept.
        draw: name of the random draw of prompts and samples.
    """

    teacher: Model | ApiModel
    answerer: Model | ApiModel
    strategy: OpenStrategy
    filters: OpenFilters
    draw: str


@dataclass(frozen=True)
class Round:
    """What a round wrote.

    Attributes:
        candidates: rows of the table of instructions, with the tokens written (`tokens`).
        examples: the accepted ones with their responses (`response_tokens`: tokens written).
        parts: generated parts behind them.
    """

    candidates: list[Row]
    examples: list[Row]
    parts: list[Path]


def write_round(
    step: Step, number: int, prompts: Sequence[Prompt], missing: int, authors: Authors, upstream: list[Path]
) -> Round:
    """Write and filter instructions, and answer up to `missing` of those that were accepted.

    Args:
        step: its folder gets the round's stages.
        number: of the round, from 1.
        prompts: of the teacher.
        missing: number of examples that are wanted.
        authors: who writes and judges.
        upstream: results that the prompts come from.
    """
    writing = step.at(f"instructions-{number}", "instructions")
    candidates, written = write_instructions(writing, prompts, authors, upstream)
    kept = [row for row in candidates if row["rejection"] is None]
    for row in kept[missing:]:
        row["rejection"] = SURPLUS
    answering = step.at(f"responses-{number}", "responses")
    answered, responses = write_responses(answering, authors.answerer, kept[:missing], authors.draw, written)
    rejections = filter_examples(answering, authors.filters, answered, responses)
    by_id = {row["example_id"]: row for row in kept}
    for row, rejection in zip(answered, rejections, strict=True):
        by_id[row["example_id"]]["rejection"] = rejection
    examples = [row for row, rejection in zip(answered, rejections, strict=True) if rejection is None]
    return Round(candidates, examples, written + responses)


def write_instructions(
    step: Step, prompts: Sequence[Prompt], authors: Authors, upstream: list[Path]
) -> tuple[list[Row], list[Path]]:
    """Generate and filter instructions; return the candidates with their verdicts, and the generated parts."""
    settings, strategy, draw = step.experiment.synthesis, authors.strategy, authors.draw
    samples = range(settings.samples_per_prompt)
    rows: list[GenerationRow] = [
        {
            "example_ids": [f"{draw}-{prompt.id}-s{sample}" for sample in samples],
            "turns": [prompt.text],
            "seeds": [seed_of(step.experiment.seed, draw, prompt.id, sample) for sample in samples],
        }
        for prompt in prompts
    ]
    size = settings.prompts_per_shard
    generated, parts = generate(step, authors.teacher, rows, size, settings.instruction, strategy.form, upstream)
    owners = [prompt for prompt in prompts for _ in samples]
    instructions = [strategy.extract(row["raw_output"], row["finish_reason"]) for row in generated]
    embed_instructions(step, authors.filters, [text for text in instructions if text], parts)
    verdicts = filter_candidates(instructions, owners, authors.filters, strategy.strategy.missing)
    candidates: list[Row] = [
        {
            **{name: row[name] for name in (*KEPT, "tokens")},
            "prompt_id": f"{draw}-{prompt.id}",
            "demonstrations": [task.example_id for task in prompt.demonstrations],
            "passage": prompt.passage,
            "instruction": verdict.instruction,
            "rejection": CUT_THINKING if is_cut_thinking(row) else verdict.rejection,
        }
        for row, prompt, verdict in zip(generated, owners, verdicts, strict=True)
    ]
    return candidates, parts


def write_responses(
    step: Step, answerer: Model | ApiModel, candidates: Sequence[Row], draw: str, upstream: list[Path]
) -> tuple[list[Row], list[Path]]:
    """Answer instructions; return the examples and the generated parts. A candidate with an empty response is rejected."""
    if not candidates:
        return [], []
    rows: list[GenerationRow] = [
        {
            "example_ids": [candidate["example_id"]],
            "turns": [question_of(candidate)],
            "seeds": [seed_of(step.experiment.seed, draw, candidate["example_id"], "response")],
        }
        for candidate in candidates
    ]
    generated, parts = respond(step, answerer, rows, upstream)
    examples = []
    for candidate, row in zip(candidates, generated, strict=True):
        if row["raw_output"].strip():
            examples.append(candidate | response_of(row))
        else:
            candidate["rejection"] = CUT_THINKING if is_cut_thinking(row) else EMPTY_RESPONSE
    return examples, parts


def question_of(candidate: Row) -> str:
    """Return what the one who answers a candidate is asked: its instruction, after the passage if there is one."""
    if not candidate.get("passage"):
        return str(candidate["instruction"])
    return (
        f"{candidate['passage']}\n\nAnswer with the help of the text above, but without mentioning it:\n"
        f"{candidate['instruction']}"
    )


def respond(
    step: Step, answerer: Model | ApiModel, rows: list[GenerationRow], upstream: list[Path]
) -> tuple[list[Row], list[Path]]:
    """Generate responses; return the generated rows and their parts."""
    settings = step.experiment.synthesis
    return generate(step, answerer, rows, settings.instructions_per_shard, settings.response, "request", upstream)


def response_of(generated: Row) -> Row:
    """Return the response columns of an example from a generated row."""
    return {
        "response": generated["raw_output"].strip(),
        "response_finished": generated["finish_reason"] == "stop",
        "response_tokens": generated["tokens"],
    }

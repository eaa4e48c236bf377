"""Filters: extract instructions from raw outputs, and reject some, each with a reason.

The order is that of the authors' code: extract, collapse whitespace, length, forbidden topics, first character, similarity.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from montessori_core.config import Filters
from montessori_core.data.rouge import RougeIndex, f_measure
from montessori_core.synthesis.prompts import CLOSE, OPEN, Prompt

_TAGGED = re.compile(f"{re.escape(OPEN)}((?:(?!{re.escape(OPEN)}).)*?){re.escape(CLOSE)}", re.DOTALL)
_NOT_TEXT = re.compile(
    r"\b(image|images|graph|graphs|picture|pictures|photo|photos|file|files|map|maps|draw|drawing|plot|video|audio|music|"
    r"flowchart|diagram)\b",
    re.IGNORECASE,
)

# Reasons, in the order of the filters.
NO_TAGS = "no instruction tags"
TOO_SHORT = "too short"
TOO_LONG = "too long"
NOT_TEXT = "about images, files or drawing"
BAD_START = "starts with neither letter nor digit"
LIKE_DEMONSTRATION = "too similar to a demonstration"
LIKE_ACCEPTED = "too similar to an accepted instruction"
EMPTY_RESPONSE = "empty response"
SURPLUS = "more than asked for"
INCOMPLETE = "no complete conversation"
REPETITION = "repeats itself"
CODE = "about code"
REASONS = (
    NO_TAGS,
    TOO_SHORT,
    TOO_LONG,
    NOT_TEXT,
    BAD_START,
    INCOMPLETE,
    REPETITION,
    CODE,
    LIKE_DEMONSTRATION,
    LIKE_ACCEPTED,
    EMPTY_RESPONSE,
    SURPLUS,
)


@dataclass(frozen=True)
class Verdict:
    """The result for one candidate: its instruction and the reason of its rejection; either may be None."""

    instruction: str | None
    rejection: str | None


def extract_instruction(raw_output: str, style: str, keep_newlines: bool) -> str | None:
    """Return the last tagged instruction in a teacher's output, whitespace collapsed; None if there is none.

    In completion style the prompt ends with the opening tag, so the output starts inside the tags.
    """
    instructions = _TAGGED.findall(OPEN + raw_output if style == "completion" else raw_output)
    return collapse_blanks(instructions[-1], keep_newlines) if instructions else None


def collapse_blanks(text: str, keep_newlines: bool) -> str:
    """Trim, and collapse whitespace; `keep_newlines` keeps line breaks and indentation."""
    if not keep_newlines:
        return " ".join(text.split())
    lines = [re.match(r"[ \t]*", line).group() + " ".join(line.split()) for line in text.splitlines()]  # type: ignore[union-attr]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()


def reject_reason(instruction: str | None, filters: Filters) -> str | None:
    """Return why an instruction is rejected, regardless of other instructions; None if it passes."""
    if instruction is None:
        return NO_TAGS
    if len(instruction) < filters.min_characters:
        return TOO_SHORT
    if len(instruction) > filters.max_characters:
        return TOO_LONG
    if _NOT_TEXT.search(instruction):
        return NOT_TEXT
    if not (instruction[0].isascii() and instruction[0].isalnum()):
        return BAD_START
    return None


def filter_candidates(
    raw_outputs: Sequence[str], prompts: Sequence[Prompt], style: str, filters: Filters, accepted: RougeIndex
) -> list[Verdict]:
    """Filter candidates in order, and add those that pass to `accepted`.

    Args:
        raw_outputs: [candidates] outputs of the teacher.
        prompts: [candidates] their prompts.
        style: the teacher's prompt style.
        filters: limits of the filters.
        accepted: index of all instructions accepted before, with the similarity limit of `filters`.
    """
    instructions = [extract_instruction(raw, style, filters.keep_newlines) for raw in raw_outputs]
    rejections = [reject_reason(instruction, filters) for instruction in instructions]
    for index, (instruction, prompt) in enumerate(zip(instructions, prompts, strict=True)):
        if rejections[index] is None and instruction is not None:
            similarity = max(f_measure(instruction, task.instruction) for task in prompt.demonstrations)
            if similarity > filters.max_rouge_l:
                rejections[index] = LIKE_DEMONSTRATION
    passing = [index for index, rejection in enumerate(rejections) if rejection is None]
    for index, fresh in zip(passing, accepted.add_all([instructions[i] or "" for i in passing]), strict=True):
        if not fresh:
            rejections[index] = LIKE_ACCEPTED
    return [Verdict(*pair) for pair in zip(instructions, rejections, strict=True)]


def funnel(instructions: pa.Table) -> dict[str, int]:
    """Count the candidates of an instruction table, those rejected for each reason in filter order, and those kept."""
    reasons = Counter(reason for reason in instructions["rejection"].to_pylist() if reason is not None)
    rejected = {reason: reasons[reason] for reason in REASONS if reasons[reason]}
    return {"candidates": instructions.num_rows, **rejected, "kept": instructions.num_rows - reasons.total()}

"""Filters and their reasons, in the paper's order."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import Filters
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.sources import Task
from montessori_core.synthesis import filters
from montessori_core.synthesis.filters import collapse_blanks, extract_instruction, filter_candidates
from montessori_core.synthesis.prompts import CLOSE, OPEN, Prompt

PROMPT = Prompt("p0", (Task("s1", "Name the capital of Norway and one of its museums."),), "...")


def judge(*outputs: str, style: str = "chat") -> list[str | None]:
    verdicts = filter_candidates(outputs, [PROMPT] * len(outputs), style, Filters(), RougeIndex())
    return [verdict.rejection for verdict in verdicts]


@pytest.mark.parametrize(
    ("output", "rejection"),
    [
        ("<instruction>Explain why the sky is blue.</instruction>", None),
        ("Explain why the sky is blue.", filters.NO_TAGS),
        ("<instruction>Explain why the sky is blue.", filters.NO_TAGS),
        ("<instruction> Hi? </instruction>", filters.TOO_SHORT),
        ("<instruction>" + "word " * 81 + "</instruction>", filters.TOO_LONG),
        ("<instruction>Draw a map of the river.</instruction>", filters.NOT_TEXT),
        ("<instruction>Describe the imagery of the poem.</instruction>", None),
        ("<instruction>- List three rivers.</instruction>", filters.BAD_START),
        ("<instruction>Émile asks for a recipe.</instruction>", filters.BAD_START),
        ("<instruction>Name the capital of Norway and one of its museums!</instruction>", filters.LIKE_DEMONSTRATION),
    ],
)
def test_each_reason_is_found(output: str, rejection: str | None) -> None:
    assert judge(output) == [rejection]


def test_candidates_are_compared_with_accepted_ones() -> None:
    a = "<instruction>Explain why the sky is blue in two sentences.</instruction>"
    b = "<instruction>Explain why the sky is blue in three sentences.</instruction>"
    assert judge(a, b, a) == [None, filters.LIKE_ACCEPTED, filters.LIKE_ACCEPTED]
    assert judge(b, a) == [None, filters.LIKE_ACCEPTED]


def test_last_tagged_text_is_extracted() -> None:
    assert extract_instruction("<instruction>a</instruction> or <instruction>b</instruction>", "chat", True) == "b"
    assert extract_instruction("<instruction>half <instruction>whole</instruction>", "chat", True) == "whole"
    assert extract_instruction(" Sort the list. </instruction> more", "completion", True) == "Sort the list."


def test_keep_newlines_keeps_line_breaks() -> None:
    raw = "<instruction>Fix  this:\n\n\n\ndef f(x):\n    return  x \n</instruction>"
    assert extract_instruction(raw, "chat", True) == "Fix this:\n\ndef f(x):\n    return x"
    assert extract_instruction(raw, "chat", False) == "Fix this: def f(x): return x"


BLANKS = [" ", "\n", "\r", "\x0b", "\x85", "\u2028", "\ufeff", "\x00", "\ud800"]
PIECES = st.text(max_size=10) | st.sampled_from([OPEN, CLOSE, "Name three rivers.", "12 ", "word " * 90, *BLANKS])


@pytest.mark.guarantee("text shaped like instructions, tags or shell")
@given(st.lists(PIECES, max_size=12).map("".join), st.sampled_from(["chat", "completion"]), st.booleans())
def test_any_text_gets_a_verdict(text: str, style: str, keep_newlines: bool) -> None:
    (verdict,) = filter_candidates([text], [PROMPT], style, Filters(keep_newlines=keep_newlines), RougeIndex())
    if verdict.instruction is not None:
        assert OPEN not in verdict.instruction
        assert CLOSE not in verdict.instruction
        assert verdict.instruction == collapse_blanks(verdict.instruction, keep_newlines)
        assert set(verdict.instruction.split()) <= set(re.split(rf"\s+|{OPEN}|{CLOSE}", text))
    else:
        assert verdict.rejection == filters.NO_TAGS
    assert verdict.rejection is None or verdict.rejection in filters.REASONS
    if verdict.rejection is None:
        assert verdict.instruction is not None
        assert 6 <= len(verdict.instruction) <= 400

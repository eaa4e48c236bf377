"""Filters: each reason, in the paper's order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import Filters
from montessori_core.rouge import Accepted
from montessori_core.sources import Task
from montessori_core.synthesis import filters
from montessori_core.synthesis.filters import extract_instruction, judge_candidates
from montessori_core.synthesis.prompts import Prompt

PROMPT = Prompt("p0", (Task("s1", "Name the capital of Norway and one of its museums."),), "...")


def judge(*outputs: str, style: str = "chat") -> list[str | None]:
    verdicts = judge_candidates(outputs, [PROMPT] * len(outputs), style, Filters(), Accepted())
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


def test_later_candidates_are_compared_with_those_accepted_before() -> None:
    a = "<instruction>Explain why the sky is blue in two sentences.</instruction>"
    b = "<instruction>Explain why the sky is blue in three sentences.</instruction>"
    assert judge(a, b, a) == [None, filters.LIKE_ACCEPTED, filters.LIKE_ACCEPTED]
    assert judge(b, a) == [None, filters.LIKE_ACCEPTED]


def test_the_last_tagged_text_counts_and_completion_starts_inside_the_tags() -> None:
    assert extract_instruction("<instruction>a</instruction> or <instruction>b</instruction>", "chat", True) == "b"
    assert extract_instruction("<instruction>half <instruction>whole</instruction>", "chat", True) == "whole"
    assert extract_instruction(" Sort the list. </instruction> more", "completion", True) == "Sort the list."


def test_line_breaks_are_kept_or_collapsed_as_configured() -> None:
    raw = "<instruction>Fix  this:\n\n\n\ndef f(x):\n    return  x \n</instruction>"
    assert extract_instruction(raw, "chat", True) == "Fix this:\n\ndef f(x):\n    return x"
    assert extract_instruction(raw, "chat", False) == "Fix this: def f(x): return x"


@given(st.text(max_size=200), st.sampled_from(["chat", "completion"]))
def test_any_text_gets_a_verdict(text: str, style: str) -> None:
    (verdict,) = judge_candidates([text], [PROMPT], style, Filters(), Accepted())
    assert verdict.rejection is None or verdict.rejection in filters.REASONS
    if verdict.rejection is None:
        assert verdict.instruction is not None
        assert 6 <= len(verdict.instruction) <= 400

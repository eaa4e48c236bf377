"""Filters and their reasons, in the paper's order; languages; filters of a user."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.utilities.schema_tools import validate

from montessori_core.config import Synthesis, parse_experiment
from montessori_core.data.sources import Task
from montessori_core.data.tables import INSTRUCTIONS, table_from_rows
from montessori_core.errors import ConfigError, UserError
from montessori_core.synthesis import filtering
from montessori_core.synthesis.extraction import close_output, collapse_blanks, extract_instruction
from montessori_core.synthesis.filtering import OpenFilters, check_filters, filter_candidates, funnel
from montessori_core.synthesis.filters import REGISTRY
from montessori_core.synthesis.filters.filter import Candidate
from montessori_core.synthesis.prompts import CLOSE, OPEN, Prompt
from support import ROOT

PROMPT = Prompt("p0", (Task("s1", "Name the capital of Norway and one of its museums."),), "...")
TOO_SHORT, TOO_LONG = "length: too short", "length: too long"
NO_LETTER = "first_character: starts with neither letter nor digit"
LIKE_ACCEPTED = "rouge_l: too similar to an accepted instruction"


def judge(*outputs: str, style: str = "chat", **settings: Any) -> list[str | None]:
    """Return the rejections of raw outputs."""
    filters = OpenFilters(Synthesis.model_validate(settings))
    instructions = [extract_instruction(output, style, keep_newlines=True) for output in outputs]
    verdicts = filter_candidates(instructions, [PROMPT] * len(outputs), filters)
    return [verdict.rejection for verdict in verdicts]


def judge_text(instruction: str, filter: dict[str, Any], **settings: Any) -> str | None:
    """Return the rejection of an instruction by one filter."""
    return OpenFilters(Synthesis.model_validate(settings | {"filters": [filter]})).judge(Candidate(instruction))


@pytest.mark.parametrize(
    ("output", "rejection"),
    [
        ("<instruction>Explain why the sky is blue.</instruction>", None),
        ("Explain why the sky is blue.", filtering.NO_TAGS),
        ("<instruction>Explain why the sky is blue.", filtering.NO_TAGS),
        ("<instruction> </instruction>", filtering.EMPTY),
        ("<instruction> Hi? </instruction>", TOO_SHORT),
        ("<instruction>" + "word " * 81 + "</instruction>", TOO_LONG),
        ("<instruction>Draw a map of the river.</instruction>", "text_only: needs images or sound"),
        ("<instruction>Describe the imagery of the poem.</instruction>", None),
        ("<instruction>- List three rivers.</instruction>", NO_LETTER),
        ("<instruction>Émile asks for a recipe.</instruction>", NO_LETTER),
        (
            "<instruction>Name the capital of Norway and one of its museums!</instruction>",
            "rouge_l: too similar to a demonstration",
        ),
    ],
)
def test_each_reason_is_found(output: str, rejection: str | None) -> None:
    assert judge(output) == [rejection]


def test_candidates_are_compared_with_accepted_ones() -> None:
    a = "<instruction>Explain why the sky is blue in two sentences.</instruction>"
    b = "<instruction>Explain why the sky is blue in three sentences.</instruction>"
    assert judge(a, b, a) == [None, LIKE_ACCEPTED, LIKE_ACCEPTED]
    assert judge(b, a) == [None, LIKE_ACCEPTED]
    assert judge(a, b, a, filters=[]) == [None] * 3


def test_rejected_instructions_are_not_compared_with() -> None:
    long, same = (f"<instruction>Explain why the sky is blue{end}</instruction>" for end in (" in two sentences.", "."))
    filters = ["rouge_l", {"name": "length", "max_characters": 40}]  # the second rejects what the first has seen
    assert judge(long, same, same, filters=filters) == [TOO_LONG, None, LIKE_ACCEPTED]


SPOKEN = {
    "French": "Écrivez une lettre à la mairie et demandez un nouveau banc dans le parc.",
    "Spanish": "¿Cuál es la capital de Perú y qué río pasa por ella?",
    "German": "„Übung macht den Meister“: Erkläre das Sprichwort in zwei Sätzen.",
    "Russian": "Напиши короткое письмо другу о поездке на море.",
    "Chinese": "请用两句话解释为什么天空是蓝色的。",
    "Japanese": "「花より団子」の意味を説明してください。",
    "Arabic": "اكتب رسالة قصيرة إلى صديقك عن رحلة إلى البحر.",
    "Hindi": "आसमान नीला क्यों है, दो वाक्यों में समझाइए।",
    "Thai": "เขียนจดหมายสั้น ๆ ถึงเพื่อนเรื่องทะเล",
    "Korean": "하늘이 왜 파란지 두 문장으로 설명해 주세요.",
}


@pytest.mark.parametrize("language", SPOKEN)
def test_instruction_passes_in_its_language(language: str) -> None:
    output = f"<instruction>{SPOKEN[language]}</instruction>"
    assert judge(output, output, language=language) == [None, LIKE_ACCEPTED]
    assert judge(output) == [NO_LETTER]
    assert judge("<instruction>- Hallo, ...!</instruction>", language=language) == [NO_LETTER]


@pytest.mark.parametrize(
    ("text", "script"),
    [("Écrivez une lettre.", "latin"), ("请解释。", "han"), ("สวัสดี", "thai"), ("Напиши", "cyrillic")],
)
def test_script_rejects_other_scripts(text: str, script: str) -> None:
    assert judge_text(text, {"name": "script", "scripts": [script]}) is None
    assert judge_text(text, {"name": "script", "scripts": ["greek"]}) == "script: in another script"
    assert judge_text("12 + 3 = ?", {"name": "script", "scripts": [script]}) is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Write a function that adds two numbers.", "en"),
        ("Schreibe eine Funktion, die zwei Zahlen addiert.", "de"),
        ("Escribe una función que sume dos números.", "es"),
        ("写一个把两个数相加的函数。", "zh"),
    ],
)
def test_language_rejects_other_languages(text: str, language: str) -> None:
    assert judge_text(text, {"name": "language", "languages": [language, "fi"]}) is None
    assert judge_text(text, {"name": "language", "languages": ["fi"]}) == "language: in another language"
    assert judge_text("f(x) = x + 1", {"name": "language", "languages": ["fi"]}) is None
    with pytest.raises(ConfigError, match="language: languages: no language 'xx'; known are .*, en, "):
        judge_text(text, {"name": "language", "languages": ["xx"]})


@pytest.mark.parametrize(
    ("text", "limits", "rejection"),
    [
        ("写一首诗", {}, TOO_SHORT),
        ("写一首诗", {"min_characters": 1, "min_words": 4, "max_words": 4}, None),
        ("写一首诗", {"min_characters": 1, "min_words": 5}, TOO_SHORT),
        ("Write a poem", {"min_words": 3, "max_words": 3}, None),
        ("Write a long poem", {"max_words": 3}, TOO_LONG),
        ("word " * 200, {"max_characters": None}, None),
    ],
)
def test_length_counts_words_of_any_script(text: str, limits: dict[str, int], rejection: str | None) -> None:
    assert judge_text(text, {"name": "length"} | limits) == rejection


@pytest.mark.parametrize(
    ("text", "words", "rejected"),
    [
        ("Please GO  to the shop.", ["go to"], True),
        ("Let it go. To whom?", ["go to"], True),
        ("Forgo tobacco.", ["go to"], False),
        ("请画一张图片。", ["图片"], True),
        ("Dessinez une IMAGE.", ["image"], True),
        ("Imagine it.", ["image"], False),
    ],
)
def test_words_match_whole_words(text: str, words: list[str], rejected: bool) -> None:
    assert (judge_text(text, {"name": "words", "words": words}) is not None) == rejected


def test_last_tagged_text_is_extracted() -> None:
    assert extract_instruction("<instruction>a</instruction> or <instruction>b</instruction>", "chat", True) == "b"
    assert extract_instruction("<instruction>half <instruction>whole</instruction>", "chat", True) == "whole"
    assert extract_instruction(" Sort the list. </instruction> more", "completion", True) == "Sort the list."


@pytest.mark.parametrize(
    ("output", "finish_reason", "instruction"),
    [
        ("Sort the list.", "stop", "Sort the list."),
        ("Sort the list.", "length", None),
        ("Sort the list.</instruction> more", "stop", "Sort the list."),
        ("Why is it 2?</explanation>", "stop", None),
        ("What does </div> mean in HTML?", "stop", "What does </div> mean in HTML?"),
        ("First.\n<instruction>Second.", "stop", "Second."),
    ],
)
def test_output_that_the_teacher_ended_is_complete(output: str, finish_reason: str, instruction: str | None) -> None:
    assert extract_instruction(close_output(output, finish_reason), "completion", True) == instruction


def test_keep_newlines_keeps_line_breaks() -> None:
    raw = "<instruction>Fix  this:\n\n\n\ndef f(x):\n    return  x \n</instruction>"
    assert extract_instruction(raw, "chat", True) == "Fix this:\n\ndef f(x):\n    return x"
    assert extract_instruction(raw, "chat", False) == "Fix this: def f(x): return x"


BLANKS = [" ", "\n", "\r", "\x0b", "\x85", "\u2028", "\ufeff", "\x00", "\ud800"]
PIECES = st.text(max_size=10) | st.sampled_from([OPEN, CLOSE, "Name three rivers.", "12 ", "word " * 90, *BLANKS])


@pytest.mark.guarantee("text shaped like instructions, tags or shell")
@given(
    st.lists(PIECES, max_size=12).map("".join),
    st.sampled_from(["chat", "completion"]),
    st.booleans(),
    st.lists(st.sampled_from([name for name, filter in REGISTRY.items() if not filter.has_jobs]), unique=True),
    st.sampled_from(["English", "French"]),
)
def test_any_text_gets_a_verdict(text: str, style: str, keep_newlines: bool, names: list[str], language: str) -> None:
    filters = OpenFilters(Synthesis.model_validate({"filters": names, "language": language}))
    (verdict,) = filter_candidates([extract_instruction(text, style, keep_newlines)], [PROMPT], filters)
    if verdict.instruction is not None:
        assert OPEN not in verdict.instruction
        assert CLOSE not in verdict.instruction
        assert verdict.instruction == collapse_blanks(verdict.instruction, keep_newlines)
        assert set(verdict.instruction.split()) <= set(re.split(rf"\s+|{OPEN}|{CLOSE}", text))
    else:
        assert verdict.rejection == filtering.NO_TAGS
    if verdict.rejection is None:
        assert verdict.instruction
        assert "length" not in names or 6 <= len(verdict.instruction) <= 400
    elif verdict.instruction:
        assert verdict.rejection.partition(":")[0] in names


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the module with the filter of docs/synthesis.md."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "synthesis.md").read_text(), re.DOTALL)
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_own_filter_works_as_documented(own: str) -> None:
    asks = "<instruction>What is a {}? {}</instruction>"
    entry = {"name": f"{own}:ONE_QUESTION", "settings": {"marks": ["?"]}}
    outputs = [asks.format("glacier", ""), asks.format("harbour", "Who built it?"), "no tags"]
    rejections = judge(*outputs, filters=[entry, "length"])
    assert rejections == [None, "one_question: several questions", filtering.NO_TAGS]
    rows = [
        dict.fromkeys(("example_id", "prompt_id", "prompt", "raw_output"), "x")
        | {"demonstrations": [], "rejection": one}
        for one in [*rejections, filtering.SURPLUS, LIKE_ACCEPTED]
    ]
    counts = funnel(table_from_rows(rows, INSTRUCTIONS))
    assert list(counts) == [
        "candidates",
        filtering.NO_TAGS,
        LIKE_ACCEPTED,
        "one_question: several questions",
        filtering.SURPLUS,
        "kept",
    ]
    assert counts["candidates"] == sum(counts.values()) - counts["candidates"] == 5


@pytest.mark.parametrize(
    ("code", "settings", "message"),
    [
        (None, {}, "synthesis.filters: {own}:MINE: ModuleNotFoundError: .* put its folder on PYTHONPATH"),
        ("def (", {}, "synthesis.filters: {own}:MINE: SyntaxError"),
        ("raise RuntimeError('no GPU')", {}, "synthesis.filters: {own}:MINE: RuntimeError: no GPU"),
        ("OTHER = 1", {}, "{own}:MINE: AttributeError: module '{own}' has no attribute 'MINE'"),
        ("MINE = 1", {}, "{own}:MINE is not a montessori_core.synthesis.filters.filter.Filter"),
        ("MINE = Filter('rouge_l', '', open_mine)", {}, "{own}:MINE: its name 'rouge_l' is taken"),
        ("MINE = Filter('mine: all', '', open_mine)", {}, "{own}:MINE: its name 'mine: all' is taken or not valid"),
        ("MINE = Filter('mine', '', open_mine)", {"word": "x"}, "{own}:MINE: the mapping settings is not valid:\n  word: "),
        ("MINE = Filter('mine', '', lambda settings: None)", {}, "{own}:MINE cannot be opened: TypeError"),
        ("MINE = Filter('mine', '', open_mine)", {}, "{own}:MINE failed with ZeroDivisionError.* 'Count rivers.'"),
        ("MINE = Filter('mine', '', lambda *_: lambda _: True)", {}, "gave True on the instruction 'Count rivers.'"),
        ("MINE = Filter('mine', '', lambda *_: lambda one: one.instruction * 9)", {}, "one line and at most 80"),
    ],
)  # fmt: skip
def test_invalid_own_filter_is_named(
    code: str | None, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bad_{tmp_path.name}"
    head = "from montessori_core.synthesis.filters.filter import Filter\n"
    head += "open_mine = lambda settings, context: lambda candidate: 1 / 0\n"
    if code is not None:
        (tmp_path / f"{name}.py").write_text(head + code)
    monkeypatch.syspath_prepend(tmp_path)
    synthesis = Synthesis.model_validate({"filters": [{"name": f"{name}:MINE", "settings": settings}]})
    with pytest.raises(UserError, match=message.format(own=name)):
        check_filters(synthesis, [Task("s", "Count rivers.")])


def test_own_filters_need_different_names(own: str, tmp_path: Path) -> None:
    (tmp_path / f"{own}_2.py").write_text((tmp_path / f"{own}.py").read_text(), encoding="utf-8")
    names = [f"{own}{end}:ONE_QUESTION" for end in ("", "_2", "")]
    OpenFilters(Synthesis.model_validate({"filters": names[::2]}))  # twice the same, with other settings perhaps
    with pytest.raises(ConfigError, match=f"{names[1]} and {names[0]} have the same name 'one_question'; rename one"):
        OpenFilters(Synthesis.model_validate({"filters": names}))


def test_filters_that_reject_seeds_are_warned_of() -> None:
    seeds = [Task(str(number), text) for number, text in enumerate(SPOKEN.values())]
    (warning,) = check_filters(Synthesis(), seeds)
    assert f"reject 10 of 10 seeds, 10 for '{NO_LETTER}'" in warning
    assert check_filters(Synthesis(language="any of ten"), seeds) == []


@pytest.mark.parametrize(
    ("synthesis", "message"),
    [
        ({"filters": ["lenght"]}, "filters.0: no filter 'lenght'; available: length, .*, or your own as module:NAME"),
        ({"filters": [{"maximum": 1}]}, "filters.0: name is missing; available: length"),
        ({"filters": [3]}, "filters.0: a filter is a name, or a mapping with a name and settings"),
        ({"filters": {"max_rouge_l": 0.5}}, r"filters: filters is a list, such as \[length"),
        ({"filters": [{"name": "rouge_l", "maximum": 2}]}, "filters.0.rouge_l.maximum: .* less than or equal to 1; got 2"),
        ({"filters": ["length", {"name": "length", "max_character": 2}]}, "1.length.max_character: .*'max_characters'"),
        ({"filters": [{"name": "length", "min_characters": 401}]}, r"min_characters \(401\) is above max_characters"),
        ({"filters": [{"name": "length", "min_words": 3, "max_words": 2}]}, r"min_words \(3\) is above max_words \(2\)"),
        ({"filters": ["a b:C"]}, "filters.0.module:NAME.name: String should match"),
        ({"filters": [{"name": "words", "words": ["--"]}]}, "filters.0.words: words: '--' has neither letters"),
        ({"filters": [{"name": "script", "scripts": []}]}, "filters.0.script: scripts is empty"),
        ({"filters": [{"name": "language", "languages": []}]}, "filters.0.language: languages is empty"),
        ({"filters": [{"name": "script", "scripts": ["klingon"]}]}, "filters.0.script.scripts.0: Input should be 'arabic'"),
    ],
)  # fmt: skip
def test_invalid_filter_setting_is_named(synthesis: dict[str, Any], message: str) -> None:
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": synthesis}
    with pytest.raises(ConfigError, match=rf"synthesis\..*{message}"):
        parse_experiment(content, "test")


def test_registry_and_settings_agree() -> None:
    required = {"semantic": {"model": "m"}, "code_runs": {"run_untrusted_code": True}}
    synthesis = Synthesis.model_validate({"filters": [{"name": name, **required.get(name, {})} for name in REGISTRY]})
    assert [type(entry) for entry in synthesis.filters] == [filter.settings for filter in REGISTRY.values()]
    assert Synthesis.model_validate(synthesis.model_dump(mode="json")) == synthesis


@pytest.mark.parametrize(
    "entry", ["length", {"name": "length", "min_words": 2}, {"name": "own:MINE", "settings": {"a": 1}}]
)
def test_form_takes_names_and_mappings(entry: Any) -> None:
    schema = Synthesis.model_json_schema()
    assert validate({"filters": [entry]}, schema) == []
    assert validate({"filters": [{"name": "length", "minimum": 2}]}, schema) != []

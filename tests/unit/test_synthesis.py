"""From a teacher's raw output to examples and to DPO targets."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from montessori_core.config import Synthesis, parse_experiment
from montessori_core.data.sources import Sources, Task
from montessori_core.data.tables import EXAMPLES, UTILITY_PREFERENCES, read_table, table_from_rows, write_table
from montessori_core.errors import UserError
from montessori_core.influence.preferences import write_preferences
from montessori_core.synthesis.filtering import SURPLUS, OpenFilters
from montessori_core.synthesis.filters.filter import Candidate
from montessori_core.synthesis.strategies.opened import OpenStrategy
from montessori_core.synthesis.strategies.strategy import Material
from support.generation import build_prompts
from tasks import candidates as candidates_module
from tasks import synthesis
from tasks.candidates import Authors, write_instructions, write_responses
from tasks.filters import filter_examples
from tasks.run import ApiModel, Model, Run
from tasks.stage import Step

EXPLAINED = (
    "1. Explanation: a question about {thing} trains knowledge of nature.\n2. It needs no input.\n"
    "3. <instruction>YOUR INSTRUCTION</instruction>\n\n<instruction>Why do {thing} differ in colour?</instruction>"
)


def test_output_with_explanation_becomes_dpo_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [EXPLAINED.format(thing=thing) for thing in ("most birds", "many rivers", "some stones")]
    written = iter([outputs, ["By their pigments."] * 3])

    def generate(*arguments: Any) -> tuple[list[dict[str, Any]], list[Path]]:
        ids = [name for row in arguments[2] for name in row["example_ids"]]
        return [
            {"example_id": name, "prompt": "p", "raw_output": text, "finish_reason": "stop", "output_ids": [len(text)]}
            | {"vocabulary": "v", "thinking": None, "tokens": 3}
            for name, text in zip(ids, next(written), strict=True)
        ], []

    monkeypatch.setattr(candidates_module, "generate", generate)
    settings = {"request": "paper", "samples_per_prompt": 3, "filters": [{"name": "rouge_l", "maximum": 0.9}]}
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": settings}
    step = Step(Run(tmp_path, parse_experiment(content, "test")), tmp_path, "test")
    teacher = Model("t", "0")
    seeds = [Task(str(number), f"Task {number}") for number in range(8)]
    prompts = build_prompts(1, "chat", step.experiment.synthesis, seeds, [], seed=0)
    authors = Authors(
        teacher,
        teacher,
        OpenStrategy(Material("chat", step.experiment.synthesis, seeds)),
        OpenFilters(step.experiment.synthesis),
        "draw",
    )
    candidates, _ = write_instructions(step, prompts, authors, [])
    assert candidates[1]["instruction"] == "Why do many rivers differ in colour?"
    assert [candidate["rejection"] for candidate in candidates] == [None] * 3
    examples, _ = write_responses(step, teacher, candidates, "draw", [])
    write_table(table_from_rows(examples, EXAMPLES), tmp_path / "examples.parquet", EXAMPLES)
    names = [example["example_id"] for example in examples]
    pairs = pa.table(
        {
            "prompt_id": ["draw-p000000"],
            "chosen_id": names[:1],
            "chosen_utility": [1.0],
            "rejected_id": names[2:],
            "rejected_utility": [0.0],
        }
    )
    path = tmp_path / "preferences.parquet"
    write_preferences(pairs, tmp_path / "examples.parquet", path, UTILITY_PREFERENCES)
    (pair,) = read_table(path, UTILITY_PREFERENCES).to_pylist()
    assert (pair["chosen"], pair["rejected"]) == (outputs[0], outputs[2])
    assert (pair["chosen_output_ids"], pair["rejected_output_ids"]) == ([len(outputs[0])], [len(outputs[2])])
    assert pair["chosen_vocabulary"] == pair["rejected_vocabulary"] == "v"


@pytest.mark.parametrize(
    ("answers", "of_initial", "of_updated"),
    [
        ("updated", Model("initial", "0"), Model("updated", "0")),
        ("unmodified", Model("initial", "0"), Model("initial", "0")),
        ("endpoint", ApiModel("answerer"), ApiModel("answerer")),
    ],
)
def test_answerer_follows_configuration(
    answers: str,
    of_initial: Model | ApiModel,
    of_updated: Model | ApiModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    initial, strong = Model("initial", "0"), ApiModel("strong_teacher")
    monkeypatch.setattr(Run, "initial_teacher", lambda _: initial)
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": {"answers": answers}}
    content |= {"answerer": {"model": "a"}} if answers == "endpoint" else {}
    step = Step(Run(tmp_path, parse_experiment(content, "test")), tmp_path, "test")
    assert synthesis.choose_answerer(step, initial) == of_initial
    assert synthesis.choose_answerer(step, Model("updated", "0")) == of_updated
    assert synthesis.choose_answerer(step, strong) == strong


def test_magpie_refuses_a_chat_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "sources", lambda _: Sources([], [], []))
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": {"strategy": "magpie"}}
    step = Step(Run(tmp_path, parse_experiment(content, "test")), tmp_path, "training set")
    with pytest.raises(UserError, match="training set: .* magpie needs a teacher that jobs load; .* Choose another"):
        synthesis.open_authors(step, ApiModel("strong_teacher"), None, [], [], [], "draw")


OWN_FILTER = """
from montessori_core.synthesis.filters.filter import Filter
def reject(candidate):
    return "no number in the response" if not any(map(str.isdigit, candidate.response)) else None
NUMBER = Filter("number", "Responses with a number.", lambda settings, context: reject, reads="examples")
"""


def test_own_filter_reads_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"reads_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN_FILTER)
    monkeypatch.syspath_prepend(tmp_path)
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": {"filters": [f"{name}:NUMBER"]}}
    step = Step(Run(tmp_path, parse_experiment(content, "test")), tmp_path, "test")
    filters = OpenFilters(step.experiment.synthesis)
    assert filters.judge(Candidate("Count.")) is None  # not before there are responses
    rows = [{"example_id": text, "instruction": "Count.", "response": text} for text in ("1, 2, 3.", "No.")]
    assert filter_examples(step, filters, rows, []) == [None, "number: no number in the response"]


@pytest.mark.parametrize("rate", [0.9, 0.3, 0.05])
def test_rounds_suffice_if_acceptance_falls(rate: float) -> None:
    settings = Synthesis()
    rounds: list[tuple[int, int]] = []
    kept, scale = 0, 10_000  # acceptance halves after this many
    while kept < 11_000 and len(rounds) < settings.max_rounds:
        written = synthesis.count_candidates(11_000 - kept, rounds, settings.oversampling)
        # The integral of d kept = rate / (1 + kept / scale) d written.
        after = int(scale * (math.sqrt((1 + kept / scale) ** 2 + 2 * rate * written / scale) - 1))
        rounds.append((written, after - kept))
        kept = after
    assert kept >= 11_000


def test_rounds_without_acceptance_ask_for_more() -> None:
    assert synthesis.count_candidates(10, [], 1.3) == synthesis.count_candidates(10, [(40, 0)], 1.3) == 13
    assert synthesis.count_candidates(1, [(100, 50)], 1.3) == 3
    assert synthesis.count_candidates(1, [(100, 50), (3, 0)], 1.3) == 3
    assert synthesis.count_candidates(1, [(100, 2), (60, 0)], 1.3) == 96


def test_low_acceptance_is_warned_of_with_its_reason() -> None:
    copied = [{"rejection": "rouge_l: too similar to a demonstration"}] * 60
    kept = [{"rejection": None}] * 3 + [{"rejection": SURPLUS}] * 2
    warning = synthesis.warn_of_low_acceptance(copied + kept + [{"rejection": "length: too short"}] * 5)
    assert warning is not None
    assert "5 of 70 instructions" in warning
    assert "(60 times): rouge_l: too similar to a demonstration" in warning
    assert synthesis.warn_of_low_acceptance(copied[:18] + kept[:2]) is None
    assert synthesis.warn_of_low_acceptance([]) is None

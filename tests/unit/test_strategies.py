"""Strategies of prompts: texts, placeholders, extraction, errors before any job; and that today's keys are unchanged."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from montessori_core import programs
from montessori_core.config import Sampling, Synthesis, parse_experiment
from montessori_core.data.rows import Rows
from montessori_core.data.sources import Seed, Task, load_tasks, read_tasks, write_tasks
from montessori_core.data.tables import GENERATION, read_table
from montessori_core.errors import ConfigError, DataError, UserError
from montessori_core.export.published import published_changes
from montessori_core.models.load import load_tokenizer
from montessori_core.models.rendering import end_of_turn, render_user_beginning
from montessori_core.program import load
from montessori_core.synthesis.prompts import CLOSE, OPEN
from montessori_core.synthesis.strategies import REGISTRY
from montessori_core.synthesis.strategies.opened import OpenStrategy, check_strategy, read_documents
from montessori_core.synthesis.strategies.strategy import Draw, Material
from montessori_core.training.dpo import encode_pair
from support import ROOT
from support.row_programs import as_compute
from tasks.candidates import question_of
from tasks.run import Model, check_environment, stage_of

SEEDS = [Seed("a", "Count rivers.", topic="water"), Seed("b", "Name a {task}.", persona="a nurse"), Task("c", "Sing.")]
PASSAGES = [Task("guide.md#1", "Hold the green button for five seconds. The lamp blinks {open} twice.")]


def opened(style: str = "chat", **settings: Any) -> OpenStrategy:
    synthesis = Synthesis.model_validate({"seed_demonstrations": 2, "synthetic_demonstrations": 0} | settings)
    return OpenStrategy(Material(style, synthesis, SEEDS, (), PASSAGES))


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_evolve_shows_one_seed_and_a_change(style: str) -> None:
    strategy = {"name": "evolve", "changes": ["is harder", "is rarer"]}
    prompts = opened(style, strategy=strategy, seed_demonstrations=0).prompts(20, seed=0)
    assert {prompt.demonstrations[0].example_id for prompt in prompts} == {"a", "b", "c"}
    for prompt in prompts:
        (seed,) = prompt.demonstrations
        assert seed.instruction in prompt.text
        assert (
            any(f"a new task that {change}." in prompt.text for change in ("is harder", "is rarer")) or style != "chat"
        )
        assert (
            prompt.text.endswith(f"{OPEN}") if style == "completion" else f"between {OPEN} and {CLOSE}" in prompt.text
        )
        assert not prompt.passage


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_grounded_shows_a_passage_to_teacher_and_answerer(style: str) -> None:
    (prompt,) = opened(style, strategy={"name": "grounded", "documents": "guide.md"}).prompts(1, seed=0)
    assert PASSAGES[0].instruction in prompt.text  # its {open} stays
    assert [task.example_id for task in prompt.demonstrations] == ["guide.md#1"]
    asked = question_of({"instruction": "How long?", "passage": prompt.passage})
    assert asked.startswith(PASSAGES[0].instruction)
    assert asked.endswith("How long?")
    assert question_of({"instruction": "How long?", "passage": ""}) == "How long?"


def test_prompts_depend_only_on_their_number() -> None:
    for name in ("evolve", "self_instruct"):
        strategy = opened(strategy=name)
        assert strategy.prompts(2, seed=3, first=4) == strategy.prompts(6, seed=3)[4:]
        assert strategy.prompts(6, seed=4) != strategy.prompts(6, seed=3)


def test_template_names_topic_and_persona() -> None:
    text = "{persona} asks about {topic}:\n{demonstrations}\nin {open}"
    prompts = opened(request=text).prompts(3, seed=0)
    assert {prompt.text.partition("\n")[0] for prompt in prompts} == {"a nurse asks about water:"}
    plain = opened(request="{demonstrations}\n{open}").prompts(3, seed=0)
    assert [prompt.demonstrations for prompt in plain] == [prompt.demonstrations for prompt in prompts]


def test_missing_topics_are_named() -> None:
    synthesis = Synthesis(request="About {topic}: {demonstrations}", seed_demonstrations=1, synthetic_demonstrations=0)
    with pytest.raises(UserError, match=r"names \{topic\}, but no seed of seed_pool.path has a column topic; add it"):
        check_strategy(synthesis, "chat", [Task("a", "Sing.")], ())
    check_strategy(synthesis, "completion", [Task("a", "Sing.")], ())
    check_strategy(synthesis, "chat", [Seed("a", "Sing.", topic="music")], ())


def test_topic_and_persona_are_columns_of_seeds(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "Sing.", "topic": "music"}\n{"instruction": "Run.", "persona": null}\n')
    source = parse_experiment(
        {"teacher": {"model": "t"}, "student": {"model": "s"}, "seed_pool": {"path": str(path)}}, "test"
    ).seed_pool
    seeds = read_tasks(source, "seed_pool", with_response=False)
    assert seeds == [Seed("seed_pool-00001", "Sing.", topic="music"), Task("seed_pool-00002", "Run.")]
    write_tasks(seeds, tmp_path / "copy.jsonl")
    assert load_tasks(tmp_path / "copy.jsonl") == seeds
    path.write_text('{"instruction": "Sing.", "topic": ["music"]}\n')
    with pytest.raises(DataError, match="line 1.*field 'topic': expected text, found list"):
        read_tasks(source, "seed_pool", with_response=False)


@pytest.mark.parametrize(
    ("style", "output", "finish_reason", "instruction"),
    [
        ("chat", "Name three rivers.", "stop", "Name three rivers."),
        ("chat", "Name three", "length", None),
        ("completion", " Name three rivers.\nAssistant:", "stop", "Name three rivers."),
        ("completion", " Name one.\nUser: Hm?\nAssistant:", "stop", "Name one."),
        ("completion", " Name three rivers", "length", None),
        ("completion", "\nAssistant:", "stop", ""),
    ],
)
def test_magpie_reads_the_user_turn(style: str, output: str, finish_reason: str, instruction: str | None) -> None:
    assert opened(style, strategy="magpie").extract(output, finish_reason) == instruction


def test_magpie_prompt_ends_where_the_user_writes(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    assert render_user_beginning(tokenizer).endswith("<|im_start|>user\n")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    with pytest.raises(UserError, match="ends a user's turn with .* set teacher.prompt_style: completion"):
        render_user_beginning(tokenizer)


STRATEGIES: list[tuple[str, Any]] = [
    ("self_instruct", "self_instruct"),
    ("evolve", "evolve"),
    ("grounded", {"name": "grounded", "documents": "guide.md"}),
    ("magpie", "magpie"),
]


@pytest.mark.parametrize("style", ["chat", "completion"])
@pytest.mark.parametrize(("name", "entry"), STRATEGIES, ids=[name for name, _ in STRATEGIES])
def test_candidates_of_a_prompt_become_pairs(
    name: str, entry: Any, style: str, talking_llama: Path, tmp_path: Path
) -> None:
    """The job writes several candidates to each prompt; DPO gets the tokens of prompt and candidates as they were."""
    strategy = opened(style, strategy=entry)
    rows = [
        {"example_ids": [f"{prompt.id}-s{n}" for n in range(2)], "turns": [prompt.text], "seeds": [1, 2]}
        for prompt in strategy.prompts(2, seed=0)
    ]
    settings = programs.Generation(
        engine="transformers", form=strategy.form, sampling=Sampling(max_tokens=12, presence_penalty=0.0)
    )
    program = as_compute(load(programs.GENERATION.entry)(settings, {"teacher": talking_llama}))
    program(rows, tmp_path / "part.parquet", lambda done: None)
    first, second, *others = read_table(tmp_path / "part.parquet", GENERATION).to_pylist()
    assert len(others) == 2
    assert first["prompt"] == second["prompt"]
    assert first["output_ids"] != second["output_ids"]
    tokenizer = load_tokenizer(str(talking_llama))
    pair = {"prompt": first["prompt"]}
    for role, row in (("chosen", first), ("rejected", second)):
        pair |= {
            role: row["raw_output"],
            f"{role}_output_ids": row["output_ids"],
            f"{role}_vocabulary": row["vocabulary"],
        }
    encoded = encode_pair(tokenizer, pair, style)
    assert encoded["chosen_ids"] == first["output_ids"]
    assert tokenizer.decode(encoded["prompt_ids"]) == first["prompt"].replace("\u2060", "")
    if name == "magpie" and style == "chat":
        assert end_of_turn(tokenizer) not in encoded["prompt_ids"][-3:]


def test_self_instruct_keeps_its_keys(tmp_path: Path) -> None:
    """Settings, rows and copies of sets have the bytes that they had before there were other strategies."""
    settings = programs.Generation(
        engine="transformers", form="tagged", sampling=Sampling(max_tokens=64, presence_penalty=0.0)
    )
    stage = stage_of(programs.GENERATION, settings, tmp_path, {"teacher": Model("t", "0" * 64)}, {})
    seeds = [Task(str(number), f"Task {number}") for number in range(8)]
    (prompt,) = OpenStrategy(Material("completion", Synthesis(), seeds)).prompts(1, seed=0)
    rows = [{"example_ids": ["i1-probing-p000000-s0"], "turns": [prompt.text], "seeds": [7]}]
    (table,) = Rows.of(rows, programs.GENERATION.rows).tables()
    assert stage.key(table)[:16] == "86024ceb426a7f5e"
    write_tasks(seeds[:1], tmp_path / "seeds.jsonl")
    assert (tmp_path / "seeds.jsonl").read_text() == '{"example_id": "0", "instruction": "Task 0", "response": ""}\n'


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the module with the strategy of docs/strategies.md."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "strategies.md").read_text(), re.DOTALL)
    name = f"strategy_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_own_strategy_works_as_documented(own: str) -> None:
    entry = {"name": f"{own}:QUIZ", "settings": {"subjects": ["glaciers", "harbours"]}}
    for style in ("chat", "completion"):
        strategy = opened(style, strategy=entry)
        texts = {prompt.text for prompt in strategy.prompts(20, seed=0)}
        assert len(texts) == 2
        assert all("glaciers" in text or "harbours" in text for text in texts)
        output = f"What is it?{CLOSE}" if style == "completion" else f"{OPEN}What is it?{CLOSE}"
        assert strategy.extract(output, "stop") == "What is it?"


@pytest.mark.parametrize(
    ("code", "settings", "message"),
    [
        (None, {}, "synthesis.strategy: {own}:MINE: ModuleNotFoundError: .* put its folder on PYTHONPATH"),
        ("MINE = 1", {}, "{own}:MINE is not a montessori_core.synthesis.strategies.strategy.Strategy"),
        ("MINE = Strategy('mine', '', lambda *_: 1 / 0)", {}, "{own}:MINE cannot be opened: ZeroDivisionError"),
        (
            "MINE = Strategy('mine', '', lambda *_: lambda draw: 1 / 0)",
            {},
            "failed with ZeroDivisionError.* on prompt 0",
        ),
        ("MINE = Strategy('mine', '', lambda *_: lambda draw: 'text')", {}, "gave 'text' for a prompt; .* a Draft"),
        ("MINE = Strategy('mine', '', lambda *_: None)", {"word": 1}, "the mapping settings is not valid:\n  word: "),
    ],
)
def test_invalid_own_strategy_is_named(
    code: str | None, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bad_strategy_{tmp_path.name}"
    if code is not None:
        head = "from montessori_core.synthesis.strategies.strategy import Strategy\n"
        (tmp_path / f"{name}.py").write_text(head + code)
    monkeypatch.syspath_prepend(tmp_path)
    synthesis = Synthesis.model_validate({"strategy": {"name": f"{name}:MINE", "settings": settings}})
    with pytest.raises(UserError, match=message.format(own=name)):
        check_strategy(synthesis, "chat", SEEDS, ())


@pytest.mark.parametrize(
    ("synthesis", "message"),
    [
        (
            {"strategy": "evolv"},
            "strategy: no strategy 'evolv'; available: self_instruct, evolve, grounded, magpie, or",
        ),
        ({"strategy": 3}, "strategy: a strategy is a name, or a mapping with a name and settings"),
        ({"strategy": "grounded"}, "strategy.grounded.documents: missing"),
        ({"strategy": {"name": "evolve", "change": []}}, "strategy.evolve.change: unknown key.*'changes'"),
        (
            {"strategy": {"name": "grounded", "documents": "d", "passage_words": 1}},
            "strategy.grounded.passage_words: .* to 20; got 1",
        ),
        (
            {"strategy": "evolve", "request": "{demonstrations}"},
            "request: there is no placeholder {demonstrations}; known",
        ),
        (
            {"strategy": "evolve", "request": "Do."},
            "request: give the name of a text \\('own'\\), or a text with {task}",
        ),
        ({"strategy": "evolve", "request": "paper"}, "request: give the name of a text \\('own'\\)"),
        ({"strategy": "magpie", "request": "Ask."}, "request: the strategy magpie takes no text from here; set 'own'"),
    ],
)
def test_invalid_strategy_setting_is_named(synthesis: dict[str, Any], message: str) -> None:
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": synthesis}
    with pytest.raises(ConfigError, match=rf"synthesis\.{message}"):
        parse_experiment(content, "test")


def test_registry_and_settings_agree() -> None:
    for name, entry in STRATEGIES:
        synthesis = Synthesis.model_validate({"strategy": entry})
        assert type(synthesis.strategy) is REGISTRY[name].settings
        assert Synthesis.model_validate(synthesis.model_dump(mode="json")) == synthesis
    assert [*REGISTRY] == [name for name, _ in STRATEGIES]


def test_only_grounded_reads_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("The pump starts when the green button is held for five seconds.")
    entry = {"name": "grounded", "documents": str(tmp_path)}
    (passage,) = read_documents(Synthesis.model_validate({"strategy": entry}))
    assert passage.example_id == "a.md#1"
    assert read_documents(Synthesis()) == []


def test_published_settings_keep_the_strategy_name(tmp_path: Path) -> None:
    """The configuration in a data card can be read again."""
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": {"strategy": STRATEGIES[2][1]}}
    experiment = parse_experiment(content, "test")
    assert parse_experiment(published_changes(tmp_path, experiment), "card") == experiment


def test_code_runs_needs_namespaces_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("montessori_core.synthesis.sandbox.has_namespaces", lambda: False)
    for isolated in (True, False):
        entry = {"name": "code_runs", "run_untrusted_code": True, "need_isolation": isolated}
        content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": {"filters": [entry]}}
        experiment = parse_experiment(content, "test")
        if isolated:
            with pytest.raises(UserError, match="code_runs: this node cannot keep the code from the network"):
                check_environment(experiment)
        else:
            check_environment(experiment)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("code_runs", "code_runs runs code that a model wrote, .* set run_untrusted_code: true"),
        ("judge", "synthesis.filters: judge needs a model that scores: set judge.model"),
    ],
)
def test_filter_names_the_setting_it_needs(name: str, message: str) -> None:
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "synthesis": {"filters": [name]}}
    with pytest.raises(ConfigError, match=message):
        parse_experiment(content, "test")


def test_fill_leaves_other_braces() -> None:
    material = Material("chat", Synthesis(), [])
    filled = material.ask('{"a": {x}} {open} {topic}', Draw(random.Random(0), topic="{open}"), {"x": "{topic}"})
    assert filled == '{"a": {topic}} <instruction> {open}'

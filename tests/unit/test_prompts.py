"""The teacher's prompts: demonstrations, texts and languages."""

import hashlib
from pathlib import Path

import pytest

from montessori_core.config import Sampling, Synthesis
from montessori_core.data.sources import Task
from montessori_core.models.load import load_tokenizer
from montessori_core.synthesis.engine import Engine, Request
from montessori_core.synthesis.extraction import extract_instruction
from montessori_core.synthesis.filtering import OpenFilters, filter_candidates
from montessori_core.synthesis.generation import open_engine
from montessori_core.synthesis.prompts import CLOSE
from support.generation import build_prompts, continuations

SEEDS = [Task(f"seed-{i}", f"Task number {i} with {{braces}} and % signs") for i in range(20)]
SYNTHETIC = [Task(f"synthetic-{i}", f"Synthetic task {i}") for i in range(5)]


def test_prompt_shows_six_seeds_two_synthetic_tasks() -> None:
    prompts = build_prompts(50, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=0)
    for prompt in prompts:
        ids = [task.example_id for task in prompt.demonstrations]
        assert len(set(ids)) == 8
        assert sum(name.startswith("synthetic") for name in ids) == 2
        assert all(f"<instruction>{task.instruction}</instruction>" in prompt.text for task in prompt.demonstrations)
    assert len({tuple(task.example_id for task in prompt.demonstrations) for prompt in prompts}) == 50
    assert (
        len({[t.example_id.startswith("synthetic") for t in prompt.demonstrations].index(True) for prompt in prompts})
        > 3
    )


def test_seeds_replace_missing_synthetic_tasks() -> None:
    (prompt,) = build_prompts(1, "completion", Synthesis(), SEEDS, [], seed=0)
    assert len(prompt.demonstrations) == 8
    assert prompt.text.endswith("<instruction>")


def test_paper_request_precedes_demonstrations() -> None:
    (prompt,) = build_prompts(1, "chat", Synthesis(request="paper"), SEEDS, [], seed=0)
    request, *shown = prompt.text.partition("generate only one instruction.\n")
    assert "1. Briefly explain why you generate this instruction.\n" in request
    assert "sentences long" not in request
    assert "".join(shown[1:]) == "".join(
        f"<instruction>{task.instruction}</instruction>\n" for task in prompt.demonstrations
    )
    (own,) = build_prompts(1, "chat", Synthesis(), SEEDS, [], seed=0)
    assert own.demonstrations == prompt.demonstrations


@pytest.mark.parametrize("style", ["chat", "completion"])
def test_prompt_names_another_language(style: str) -> None:
    english, french = (
        build_prompts(1, style, Synthesis(language=language), SEEDS, [], seed=0)[0].text
        for language in ("English", "French")
    )
    assert "French" in french
    assert "English" not in french
    assert "French" not in english
    assert french.endswith(english[-20:])


def test_prompt_texts_are_settings() -> None:
    settings = Synthesis(
        request='In {language}, like:\n{demonstrations}\nbetween {open} and {close}. {"a": 1}',
        completion_prompt="Une liste.{demonstrations}",
        separator="\n---\n",
        seed_demonstrations=2,
        synthetic_demonstrations=0,
        language="French",
    )
    seeds = [Task("a", "Dis {language} et {open}."), Task("b", "Compte.")]
    (chat,), (completion,) = (build_prompts(1, style, settings, seeds, [], seed=0) for style in ("chat", "completion"))
    first, second = (f"<instruction>{task.instruction}</instruction>" for task in chat.demonstrations)
    assert chat.text == (
        f'In French, like:\n{first}\n---\n{second}\nbetween <instruction> and </instruction>. {{"a": 1}}'
    )
    assert completion.text == f"Une liste.{first}\n---\n{second}\n---\n<instruction>"


def test_default_prompts_are_pinned() -> None:
    texts = [build_prompts(1, style, Synthesis(), SEEDS, [], seed=0)[0].text for style in ("chat", "completion")]
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == [
        "cfbc76e02f3dbfb6",
        "3e47a4afd7ce355e",
    ]


def test_prompt_depends_only_on_its_number() -> None:
    many = build_prompts(10, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=3)
    assert build_prompts(4, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=3, first=6) == many[6:]
    assert build_prompts(4, "chat", Synthesis(), SEEDS, SYNTHETIC, seed=4, first=6) != many[6:]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return open_engine("transformers", str(smollm2), load_tokenizer(str(smollm2)))


SEEDS_OF = {
    "Spanish": ("¿Cuál es la capital de Perú?", "¿Por qué es salado el mar?", "¿Qué es un volcán?"),
    "Chinese": ("请用两句话解释为什么天空是蓝色的。", "写一首关于雨的短诗。", "为什么海水是咸的？"),
}


@pytest.mark.parametrize("language", SEEDS_OF)
def test_instructions_pass_in_their_language(language: str, engine: Engine) -> None:
    settings = Synthesis(language=language, seed_demonstrations=3, synthetic_demonstrations=0)
    seeds = [Task(text, text) for text in SEEDS_OF[language]]
    prompts = build_prompts(2, "completion", settings, seeds, [], seed=0)
    sampling = Sampling(max_tokens=48, temperature=0.8, presence_penalty=0.0)
    requests = [Request(prompt.text, seed) for prompt in prompts for seed in (1, 2, 3)]
    outputs = [generated.text for generated in continuations(engine.generate(requests, sampling, CLOSE))]
    owners = [prompt for prompt in prompts for _ in range(3)]

    def reasons(language: str) -> list[str | None]:
        filters = OpenFilters(settings.model_copy(update={"language": language}))
        instructions = [extract_instruction(output, "completion", True) for output in outputs]
        return [verdict.rejection for verdict in filter_candidates(instructions, owners, filters)]

    no_letter = "first_character: starts with neither letter nor digit"
    assert no_letter not in reasons(language)
    assert no_letter in reasons("English")
    assert reasons(language).count(None) >= 2

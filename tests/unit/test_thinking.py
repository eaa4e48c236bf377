"""Reasoning models: their thinking is no part of the answer, and chat templates and their variables can be set."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from montessori_core.config import parse_experiment
from montessori_core.data.rows import GenerationRow
from montessori_core.errors import UserError
from montessori_core.judging.answer_cache import AnswerCache
from montessori_core.judging.client import CachedClient, Question
from montessori_core.models.chat import IGNORED, encode_example, render_prompt
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.thinking import split_answer, split_thinking
from montessori_core.synthesis.generation import Generated
from montessori_core.synthesis.jobs import _records
from support.judges import JudgeServer, completion, endpoint, send, served
from tasks.run import Run, open_run

QWEN = (  # as Qwen 3: thinks unless told otherwise
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' and loop.last %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


@pytest.mark.parametrize(
    ("text", "prompt", "thinking", "answer"),
    [
        (
            "<think>\nA <instruction>draft</instruction>\n</think>\n\nFour.",
            "",
            "A <instruction>draft</instruction>",
            "Four.",
        ),
        ("\n<think></think>Four.", "", "", "Four."),
        ("<think>It is cut", "", "It is cut", ""),
        ("I see.\n</think>\nFour.", "assistant\n<think>\n", "I see.", "Four."),
        ("I see", "assistant\n<think>\n", "I see", ""),
        ("Four.", "assistant\n<think>\n\n</think>\n\n", None, "Four."),
        (" Write <think> in HTML: </think>", "", None, " Write <think> in HTML: </think>"),
        ("", "", None, ""),
    ],
)
def test_thinking_is_cut_off(text: str, prompt: str, thinking: str | None, answer: str) -> None:
    assert split_thinking(text, prompt) == (thinking, answer)


def test_generated_records_have_thinking_in_its_column() -> None:
    row: GenerationRow = {"example_ids": ["a"], "turns": ["?"], "seeds": [0]}
    sample = Generated("<think>Two and two.</think>Four.", 9, "stop", [1, 2, 3])
    [record] = _records(row, "prompt", [sample], [split_thinking(sample.text, "prompt")], "v")
    assert (record["thinking"], record["raw_output"]) == ("Two and two.", "Four.")
    assert record["output_ids"] == [1, 2, 3]  # likelihoods are those of generation


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[JudgeServer]:
    yield from served(JudgeServer(), monkeypatch, tmp_path)


def test_endpoints_thinking_is_no_answer(server: JudgeServer, tmp_path: Path) -> None:
    separate = json.loads(completion("Score: 3"))
    separate["choices"][0]["message"]["reasoning_content"] = "Hm."
    bodies = [
        completion("<think>Score: 5?</think>\n\nScore: 3"),
        completion("Hm.</think>Score: 3"),
        json.dumps(separate).encode(),
        completion("Score: 3"),
    ]
    variables = {"enable_thinking": False}
    settings = endpoint(server, concurrency=1, chat_template_kwargs=variables)
    client = CachedClient(settings, "test", AnswerCache(tmp_path / "answers.sqlite"))
    for body, thinking in zip(bodies, ("Score: 5?", "Hm.", "Hm.", None), strict=True):
        server.faults.append(lambda handler, question, body=body: send(handler, 200, body))  # type: ignore[misc]
        question = Question("How good is it?", draw=len(server.asked))
        for _ in range(2):  # from the server, and from the cache
            [answer] = client.ask([question])
            assert (answer.text, answer.thinking) == ("Score: 3", thinking)
    assert [request["chat_template_kwargs"] for request in server.requests] == [variables] * 4
    assert settings.identity() != endpoint(server).identity()
    assert split_answer("Use </think> after <think>.") == (None, "Use </think> after <think>.")


def opened(model: Path, folder: Path, **sections: dict[str, Any]) -> Run:
    content: dict[str, Any] = {"teacher": {"model": str(model)}, "student": {"model": str(model)}}
    content |= {name: content[name] | section for name, section in sections.items()}
    return open_run(parse_experiment(content, "test"), folder)[0]


@pytest.fixture
def thinker(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with the template of a reasoning model."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "thinker"))
    (folder / "chat_template.jinja").write_text(QWEN)
    return folder


def test_template_variables_reach_all_programs(thinker: Path, tmp_path: Path) -> None:
    run = opened(thinker, tmp_path / "run", teacher={"chat_template_kwargs": {"enable_thinking": False}})
    teacher, student = (load_tokenizer(model.path) for model in (run.initial_teacher(), run.initial_student()))
    assert render_prompt(student, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(teacher, "Hi").endswith("assistant\n<think>\n\n</think>\n\n")
    example = encode_example(teacher, "Hi", "Ho", 64)
    assert teacher.decode([label for label in example.labels if label != IGNORED]) == "Ho<|im_end|>"
    shutil.copytree(thinker, tmp_path / "trained")
    teacher.save_pretrained(tmp_path / "trained")
    assert render_prompt(load_tokenizer(str(tmp_path / "trained")), "Hi") == render_prompt(teacher, "Hi")
    assert run.initial_teacher().sha256 != run.initial_student().sha256
    weights = [
        load_model(model.path, torch.float32).state_dict() for model in (run.initial_teacher(), run.initial_student())
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_template_of_a_run_is_kept(thinker: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(QWEN.replace("<|im_start|>", "#"))
    run = opened(thinker, tmp_path / "run", student={"chat_template": str(template)})
    before = run.initial_student()
    assert render_prompt(load_tokenizer(before.path), "Hi") == "#user\nHi<|im_end|>\n#assistant\n"
    template.write_text("changed")
    again = opened(thinker, tmp_path / "run", student={"chat_template": str(template)})
    assert again.initial_student() == before


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"chat_template": "absent.jinja"}, "teacher.chat_template: absent.jinja cannot be read"),
        (
            {"chat_template_kwargs": {"enable_thinkng": False}},
            "chat_template_kwargs: .* variable 'enable_thinkng'",
        ),
        ({"chat_template_kwargs": {"m = 1": 1}}, "no variable 'm = 1'"),
    ],
)
def test_unusable_template_settings_are_refused(
    section: dict[str, Any], message: str, thinker: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        opened(thinker, tmp_path / "run", teacher=section)
    assert not (tmp_path / "run").exists()

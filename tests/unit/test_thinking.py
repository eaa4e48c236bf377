"""Reasoning models: their thinking is no part of the answer, and chat templates and their variables can be set."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from montessori_core.config import parse_experiment
from montessori_core.data.rows import GenerationRow
from montessori_core.errors import DataError, UserError
from montessori_core.evaluation.alpaca_eval import read_outputs
from montessori_core.judging.answer_cache import AnswerCache
from montessori_core.judging.client import CachedClient, Question
from montessori_core.judging.mt_bench import read_dialogues
from montessori_core.models.chat import IGNORED, encode_example
from montessori_core.models.control_tokens import split_generated
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.rendering import render_prompt
from montessori_core.models.thinking import is_cut_thinking, split_answer, split_thinking
from montessori_core.synthesis.engine import Generated
from montessori_core.synthesis.filtering import CUT_THINKING, funnel
from montessori_core.synthesis.jobs import _records
from montessori_core.synthesis.nomad import Conversation, read_conversation
from support.judges import JudgeServer, completion, endpoint, send, served
from tasks.generation import _without_cut_thinking
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
        ("[THINK]I see.[/THINK]Four.", "", "I see.", "Four."),
        ("<seed:think>I see.</seed:think>Four.", "", "I see.", "Four."),
        ("◁think▷I see", "", "I see", ""),
        ("<|channel|>final<|message|>Four.", "", "", "Four."),
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


CONTROL = ["[THINK]", "[/THINK]", "<|channel|>", "<|message|>"]


@pytest.fixture
def controlled(tiny_llama: Path) -> Any:
    """A tokenizer whose marks of thinking are control tokens, as those of Magistral and gpt-oss."""
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    return tokenizer


@pytest.mark.parametrize(
    ("written", "prompt", "stop", "thinking", "answer"),
    [
        ("[THINK]Two and two.[/THINK]Four.<|im_end|>", "", None, "Two and two.", "Four."),
        ("Two and two.[/THINK]Four.<|im_end|>", "assistant\n[THINK]", None, "Two and two.", "Four."),
        ("[THINK]Two and", "", None, "Two and", ""),
        ("[THINK]Hm.[/THINK]Four. STOP. And", "", "STOP.", "Hm.", "Four. STOP."),
        (
            "<|channel|>analysis<|message|>Hm.<|im_end|><|im_start|>assistant<|channel|>final<|message|>Four.",
            "",
            None,
            "analysisHm.assistant",
            "Four.",
        ),
        ("<|channel|>analysis<|message|>Hm.", "", None, "analysisHm.", ""),
        ("Four.<|im_end|>", "", None, None, "Four."),
    ],
)
def test_control_tokens_of_thinking_are_cut_off(
    written: str, prompt: str, stop: str | None, thinking: str | None, answer: str, controlled: Any
) -> None:
    ids = controlled(written, add_special_tokens=False)["input_ids"]
    text = controlled.decode(ids, skip_special_tokens=True)
    text = text[: text.index(stop) + len(stop)] if stop else text
    assert split_generated(controlled, text, ids, prompt) == (thinking, answer)


def test_conversations_have_no_thinking() -> None:
    text = " Add two and two.\nAssistant: <think>Two and two.</think>\nFour.\nUser: More?"
    assert read_conversation(text, "length") == Conversation("Add two and two.", "Four.")
    assert read_conversation(" Add two and two.\nAssistant: <think>Two and", "stop") is None


def test_answers_in_files_have_no_thinking(tmp_path: Path) -> None:
    outputs = [{"instruction": "Add.", "output": "<think>Hm.</think>\nFour."}]
    (tmp_path / "outputs.json").write_text(json.dumps(outputs))
    assert [output.output for output in read_outputs(tmp_path / "outputs.json")] == ["Four."]
    question = {"question_id": 1, "category": "math", "turns": ["Add.", "Again."]}
    answers = {"question_id": 1, "choices": [{"turns": ["<think>Hm.</think>Four.", "Six."]}]}
    for name, content in {"questions": question, "references": answers}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(content) + "\n")
    [dialogue] = read_dialogues(tmp_path / "questions.jsonl", tmp_path / "references.jsonl")
    assert dialogue.references == ("Four.", "Six.")
    for text, problem in (("<think>Hm", "it has thinking, but no answer"), (" ", "should match")):
        answers["choices"] = [{"turns": [text, "Six."]}]
        (tmp_path / "references.jsonl").write_text(json.dumps(answers) + "\n")
        with pytest.raises(DataError, match=rf"references.jsonl, line 1: field choices.0.turns.0: .*{problem}"):
            read_dialogues(tmp_path / "questions.jsonl", tmp_path / "references.jsonl")


def test_separate_and_inline_thinking_are_read(server: JudgeServer, tmp_path: Path) -> None:
    """vLLM without a reasoning parser sends an empty `reasoning_content` beside the thinking in the text."""
    body = json.loads(completion("<think>Hm.</think>Score: 3"))
    body["choices"][0]["message"]["reasoning_content"] = ""
    server.faults.append(lambda handler, question: send(handler, 200, json.dumps(body).encode()))
    client = CachedClient(endpoint(server), "test", AnswerCache(tmp_path / "answers.sqlite"))
    [answer] = client.ask([Question("How good is it?")])
    assert (answer.text, answer.thinking) == ("Score: 3", "Hm.")


def generated(text: str, thinking: str | None, reason: str) -> dict[str, Any]:
    return {"raw_output": text, "thinking": thinking, "finish_reason": reason}


def test_cut_thinking_of_endpoint_is_no_answer() -> None:
    """A server whose template opens the thinking sends neither of its marks if it is cut."""
    finished, cut = generated("Four.", "Two and two.", "stop"), generated("Two and", None, "length")
    assert _without_cut_thinking([finished, cut]) == [finished, generated("", "Two and", "length")]
    plain = generated("Six.", None, "stop")
    for rows in ([plain, cut], [cut], [finished, plain, cut]):
        assert _without_cut_thinking(rows) == rows


def test_cut_thinking_is_counted() -> None:
    assert is_cut_thinking(generated(" ", "Hm", "length"))
    assert not is_cut_thinking(generated("Four.", "Hm.", "stop"))
    assert not is_cut_thinking(generated("", None, "stop"))
    rejections = [CUT_THINKING, "empty response", None]
    counts = funnel(pa.table({"rejection": rejections}))
    assert list(counts) == ["candidates", CUT_THINKING, "empty response", "kept"]


def test_thinking_in_own_sets_is_reported(thinker: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {n} and {n * n}.", "output": "<think>Hm.</think>It is so."} for n in range(9)]
    (tmp_path / "reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "teacher": {"model": str(thinker)},
        "student": {"model": str(thinker)},
        "reference": {"path": str(tmp_path / "reference.jsonl")},
    }
    _, warnings = open_run(parse_experiment(content, "test"), tmp_path / "run")
    assert any("reference.path: 9 responses begin with thinking, e.g. that of reference-00001" in w for w in warnings)


def test_template_keeps_thinking_or_refuses(thinker: Path) -> None:
    tokenizer = load_tokenizer(str(thinker))

    def learned(response: str) -> str:
        labels = encode_example(tokenizer, "Hi", response, 64).labels
        return str(tokenizer.decode([label for label in labels if label != IGNORED]))

    answer = "Write </think> after <think>."  # text about thinking is no thinking
    tokenizer.chat_template = QWEN.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
    assert learned(answer).endswith(f"{answer}<|im_end|>")
    with pytest.raises(UserError, match=r"template of \S+ leaves out the thinking of the response \('Hm.'\)"):
        learned("<think>Hm.</think>Ho")
    tokenizer.chat_template = QWEN.replace("'<think>\\n\\n</think>\\n\\n'", "''")
    assert learned("<think>Hm.</think>Ho").startswith("<think>Hm.</think>Ho")

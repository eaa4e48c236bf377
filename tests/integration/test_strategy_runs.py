"""Whole runs with each strategy, and filters with jobs: embeddings, a judge, code that runs."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from montessori_core import programs
from montessori_core.config import read_experiment
from montessori_core.data.tables import EMBEDDINGS, INSTRUCTIONS, PREFERENCES, read_table
from montessori_core.errors import UserError
from montessori_core.models.load import load_tokenizer
from montessori_core.synthesis.embedding import open_embedding
from montessori_core.synthesis.sandbox import has_namespaces
from support.judges import JudgeServer, completion, send, served
from support.row_programs import as_compute
from support.runs import call, configuration
from tasks.preview import preview_run, write_preview

GUIDE = (
    "# Pump\n\nThe pump starts when the green button is held for five seconds.\n\nTwo blinks mean that it runs well."
)
ENTRIES: dict[str, Any] = {
    "evolve": {"name": "evolve", "changes": ["is harder"]},
    "grounded": {"name": "grounded", "documents": "guide.md", "passage_words": 20},
    "magpie": "magpie",
}


def changed(path: Path, **sections: dict[str, Any]) -> Path:
    """Change fields of a configuration's sections."""
    content = yaml.safe_load(path.read_text())
    for name, fields in sections.items():
        content[name] = content.get(name, {}) | fields
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["evolve", "grounded", "magpie"])
def test_run_with_strategy_updates_its_teacher(
    strategy: str, talking_llama: Path, asking_llama: Path, tmp_path: Path, shared_server: dict[str, str]
) -> None:
    (tmp_path / "guide.md").write_text(GUIDE)
    config = changed(
        configuration(tmp_path, asking_llama if strategy == "magpie" else talking_llama),
        synthesis={"strategy": ENTRIES[strategy], "filters": [], "max_rounds": 6},
        influence={"probing_examples": 12},
        comparison={"influence_examples": 0, "unmodified_teacher": False},
    )
    code, output = call("run", str(config), cwd=tmp_path, **shared_server)
    assert code == 0, output
    iteration = tmp_path / "runs" / "tiny" / "iteration-1"
    pairs = read_table(iteration / "preferences.parquet", PREFERENCES).to_pylist()
    assert pairs
    assert all(pair["chosen_output_ids"] and pair["rejected_output_ids"] for pair in pairs)
    shown = {
        tuple(row["demonstrations"]) for row in read_table(iteration / "instructions.parquet", INSTRUCTIONS).to_pylist()
    }
    prompts = {pair["prompt"] for pair in pairs}
    if strategy == "magpie":
        assert len(prompts) == 1
        assert shown == {()}
    elif strategy == "grounded":
        assert shown == {("guide.md#1",)}
        assert all("The pump starts" in prompt for prompt in prompts)
        asked = pq.read_table(iteration / "responses-1" / "rows.parquet")["turns"].to_pylist()
        assert all("The pump starts" in turn and "without mentioning it" in turn for (turn,) in asked)
    else:
        assert all(len(ids) == 1 for ids in shown)
        assert all("a task that is harder." in prompt for prompt in prompts)
    code, output = call("run", str(config), cwd=tmp_path, **shared_server)
    assert code == 0, output
    assert "is finished" in output


class CodeServer(JudgeServer):
    """Answers with code that runs, with code that fails, or without code; gives a low score where the code fails."""

    def answer(self, handler: BaseHTTPRequestHandler, question: str) -> None:
        if question.startswith("You grade"):
            score = 2 if "number 1" in question else 5
            return send(handler, 200, completion(f"Points.\nScore: {score}"))
        number = sum(map(ord, question)) % 4
        body = ("print(1)", "1 / 0", "number = 1", "x = 2")[number]
        text = f"No code, number {number}." if number == 2 else f"```python\n{body}\n```\nnumber {number}"
        return send(handler, 200, completion(text))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CodeServer]:
    yield from served(CodeServer(), monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason="the system has no namespaces")
def test_filters_with_jobs_are_counted(talking_llama: Path, server: CodeServer, tmp_path: Path) -> None:
    endpoint = {"model": "judge", "base_url": server.url, "retries": 1}
    filters: list[Any] = [
        "length",
        {"name": "semantic", "model": str(talking_llama), "maximum": 0.97},
        {"name": "judge", "minimum": 4},
        {"name": "code_runs", "run_untrusted_code": True, "need_code": True},
    ]
    config = changed(
        configuration(tmp_path, talking_llama),
        judge=endpoint,
        answerer=endpoint,
        synthesis={"filters": filters, "answers": "endpoint"},
    )
    with preview_run(read_experiment(config), tmp_path / "runs") as (run, _):
        written = write_preview(run, 24)
        folders = {folder.parent.name for folder in run.folder.rglob("stage.json")}
    assert {"instructions-1-embeddings-1", "responses-1-judge-0", "responses-1-code_runs-1"} <= folders
    reasons = Counter(row["rejection"] for row in written.candidates)
    assert reasons["semantic: means nearly the same as an accepted instruction"] > 0
    assert reasons["judge: scored too low"] > 0
    assert reasons["code_runs: no Python code"] > 0
    assert len(written.examples) == reasons[None] > 0
    assert all("number 1" not in row["response"] and "```python" in row["response"] for row in written.examples)
    graded = [question for question in server.asked if question.startswith("You grade")]
    assert (
        len(graded) == len(written.examples) + reasons["judge: scored too low"] + reasons["code_runs: no Python code"]
    )
    assert reasons["code_runs: its code fails"] == 0  # the judge came first


def test_embedding_is_the_mean_of_the_last_states(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    texts = ["Name three rivers.", "Name three rivers and two lakes, and say where each of them is.", ""]
    rows = [{"example_id": str(n), "instruction": text, "response": ""} for n, text in enumerate(texts)]
    program = as_compute(open_embedding(programs.Embedding(max_length=64), {"model": tiny_llama}))
    program(rows, tmp_path / "part.parquet", lambda done: None)
    vectors = np.array(read_table(tmp_path / "part.parquet", EMBEDDINGS)["vector"].to_pylist())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    ids = load_tokenizer(str(tiny_llama))(texts[0], return_tensors="pt")["input_ids"]
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model(input_ids=ids).last_hidden_state[0].mean(0)
    assert np.allclose(vectors[0], (states / states.norm()).numpy(), atol=1e-5)  # padding does not count


def test_damaged_embedding_model_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"semantic: {folder} cannot be loaded .*; download the model again"):
        open_embedding(programs.Embedding(max_length=64), {"model": folder})


def test_embedding_stops_at_limit_of_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 4}))
    rows = [{"example_id": "0", "instruction": "Name three rivers and two lakes.", "response": ""}]
    vectors = []
    for model, max_length in ((folder, 64), (tiny_llama, 4), (tiny_llama, 64)):
        out = tmp_path / f"{len(vectors)}.parquet"
        as_compute(open_embedding(programs.Embedding(max_length=max_length), {"model": model}))(
            rows, out, lambda done: None
        )
        vectors.append(read_table(out, EMBEDDINGS)["vector"].to_pylist())
    assert vectors[0] == vectors[1] != vectors[2]

"""Who answers the teacher's instructions: `synthesis.answers`, with the tiny Llama and a local API server."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.stage import describe
from montessori_core.data.tables import EXAMPLES, GENERATION, read_table
from montessori_core.files import read_json
from support.judges import JudgeServer, refuse, send
from support.runs import call, configuration
from support.studies import environment_of


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()


def with_answers(folder: Path, model: Path, answers: str, **sections: object) -> dict[str, Any]:
    """Return a configuration of the tiny Llama, without comparisons."""
    content: dict[str, Any] = yaml.safe_load(configuration(folder, model).read_text())
    content["synthesis"] |= {"answers": answers, "oversampling": 3.0}
    return content | {"comparison": {"unmodified_teacher": False, "influence_examples": 0}} | sections


def endpoint(server: JudgeServer) -> dict[str, object]:
    return {"model": "strong", "base_url": server.url, "retries": 0, "concurrency": 1}


def run(folder: Path, content: dict[str, Any], *arguments: str) -> tuple[int, str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return call(*arguments, cwd=folder, **environment_of(folder))


@pytest.mark.slow
def test_unmodified_teacher_answers_in_all_iterations(talking_llama: Path, tmp_path: Path) -> None:
    content = with_answers(tmp_path, talking_llama, "unmodified", iterations=2)
    code, output = run(tmp_path, content, "run", "run.yaml")
    assert code == 0, output
    folder = tmp_path / "runs" / "tiny"
    initial = read_json(folder / "provenance.json")["teacher_sha256"]
    stages = {
        path.parent for pattern in ("instructions-*", "responses-*") for path in folder.rglob(f"{pattern}/stage.json")
    }
    assert len(stages) >= 8
    updated = set()
    for stage in stages:
        [teacher] = describe(stage).input_hashes.values()
        first = stage.parent == folder / "iteration-1"  # its probing set precedes the first update
        assert (teacher == initial) == (stage.name.startswith("responses-") or first), stage
        updated.add(teacher)
    assert len(updated) == 3


@pytest.mark.slow
def test_endpoint_answers_every_set_of_a_run(talking_llama: Path, tmp_path: Path, server: JudgeServer) -> None:
    content = with_answers(tmp_path, talking_llama, "endpoint", answerer=endpoint(server))
    code, output = run(tmp_path, content, "run", "run.yaml")
    assert code == 0, output
    assert "26 answers from strong is not included" in output
    folder, answered = tmp_path / "runs" / "tiny" / "iteration-1", 0
    for table in (folder, folder / "training"):
        rows = read_table(table / "examples.parquet", EXAMPLES).to_pylist()
        assert [row["response"] for row in rows] == [f"An answer to: {row['instruction']}" for row in rows]
        answered += len(rows)
    assert len(server.asked) == answered == 26


@pytest.mark.guarantee("endpoint stops answering")
@pytest.mark.slow
@pytest.mark.parametrize("section", ["answerer", "strong_teacher"])
def test_silent_endpoint_loses_no_answer(
    section: str, talking_llama: Path, tmp_path: Path, server: JudgeServer
) -> None:
    """Four of the requests are answered, then none until the second run, which asks only for what is missing."""
    answers, method = ("endpoint", "self_instruct") if section == "answerer" else ("updated", "self_instruct_strong")
    experiment = with_answers(tmp_path, talking_llama, answers, **{section: endpoint(server)})
    content = {"name": "study", "experiment": experiment, "methods": [method], "baseline": method, "seeds": [0]}
    answered: list[str] = []

    def answer(handler: BaseHTTPRequestHandler, question: str) -> None:
        answered.append(question)
        server.answer(handler, question)

    server.faults = [*[answer] * 4, *[refuse(503)] * 1000]
    code, output = run(tmp_path, content, "compare", "run.yaml")
    assert code == 1, output
    assert f"{server.url}: 503 for model 'strong'" in output
    assert len(answered) == 4
    unsupported = b'{"error": {"message": "presence_penalty is not supported"}}'
    server.faults = [lambda handler, question: send(handler, 400, unsupported), *[answer] * 1000]
    code, output = run(tmp_path, content, "compare", "run.yaml")
    assert code == 0, output
    assert output.count("strong: the server refuses presence_penalty") == 1
    folder = tmp_path / "runs" / "study" / "seed-0" / "methods" / method / "round-1"
    rows = read_table(folder / "training" / "examples.parquet", EXAMPLES).to_pylist()
    assert [row["response"] for row in rows] == [f"An answer to: {row['instruction']}" for row in rows]
    assert len(rows) == 6
    asked = [stage.parent for stage in folder.rglob("stage.json") if describe(stage.parent).program == "api-generation"]
    generated = [read_table(part, GENERATION).num_rows for stage in asked for part in stage.glob("part-*.parquet")]
    assert len(answered) == sum(generated)

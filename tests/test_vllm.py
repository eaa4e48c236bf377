"""The vLLM engine, in a worker environment of its own: the generation stage runs there as it does with transformers."""

import json
import os
from pathlib import Path

import pytest

from cluster.fanout import fan_out
from cluster.stage import Stage
from montessori_core.config import Cluster, DataSource, Resources, Sampling, Synthesis, Teacher
from montessori_core.program import Row
from montessori_core.schema import GENERATION, read_table
from montessori_core.sources import read_tasks
from montessori_core.synthesis.prompts import CLOSE, build_prompts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = Path(os.environ.get("MONTESSORI_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    assert python.exists(), f"{python} is missing: make test creates this environment"
    return str(python)


def generate(folder: Path, model: Path, python: str, rows: list[Row], sampling: Sampling) -> list[Row]:
    settings = {
        "teacher": Teacher(model=str(model)).model_dump(mode="json"),
        "engine": "vllm",
        "sampling": sampling.model_dump(mode="json"),
        "form": "tagged",
    }
    program = "montessori_core.synthesis.jobs:open_generation"
    stage = Stage("generation", 1, program, settings, {"teacher": model}, {}, folder)
    (part,) = fan_out(stage, [rows], Resources(), Cluster(), python=python)
    found: list[Row] = read_table(part, GENERATION).to_pylist()
    return found


def test_vllm_gives_n_samples_from_their_seeds(
    smollm2: Path, vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    seeds = read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    prompts = build_prompts(4, "completion", Synthesis(), seeds, [], seed=0)
    rows: list[Row] = [
        {"ids": [f"{p.id}-s{i}" for i in range(4)], "text": p.text, "seeds": [1, 2, 3, 1]} for p in prompts
    ]
    rows.append({"ids": ["france"], "text": "The capital of France is", "seeds": [1]})
    found = generate(tmp_path / "stage", smollm2, vllm_python, rows, Sampling(max_tokens=32, presence_penalty=0.0))
    assert [row["row_id"] for row in found] == [name for row in rows for name in row["ids"]]
    # Equal seeds draw equally until rounding, which differs between a read and a cached prompt, moves a border.
    starts = [[row["text"][:6] for row in found[first : first + 4]] for first in range(0, 16, 4)]
    assert sum(texts[0] == texts[3] for texts in starts) >= 3
    assert sum(len(set(texts[:3])) == 3 for texts in starts) >= 2
    assert all(row["tokens"] <= 32 for row in found)
    stopped = [row for row in found[:16] if row["finish_reason"] == "stop"]
    assert any(row["text"].endswith(CLOSE) for row in stopped)
    assert json.loads((tmp_path / "stage" / "stage.json").read_text())["settings"]["engine"] == "vllm"

"""The vLLM engine, in a separate worker environment: the generation stage runs as with transformers."""

import json
import os
import re
import signal
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch

from cluster.fanout import ShardsFailed, fan_out
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core import programs
from montessori_core.config import Cluster, DataSource, Endpoint, Lora, Resources, Sampling, Synthesis, Vllm
from montessori_core.data.rows import Rows
from montessori_core.data.sources import read_tasks
from montessori_core.data.tables import GENERATION, MT_BENCH, read_table
from montessori_core.judging.mt_bench import Dialogue, judgements, open_mt_bench_judge
from montessori_core.models.load import load_model, load_tokenizer, with_lora
from montessori_core.program import Row
from montessori_core.synthesis.prompts import CLOSE
from support import ROOT, wait_until
from support.generation import build_prompts
from support.prefect_server import free_port
from support.row_programs import as_compute

pytestmark = pytest.mark.slow  # vLLM has a separate environment


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = Path(os.environ.get("MONTESSORI_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    assert python.exists(), f"{python} is missing: make test-all creates this environment"
    return str(python)


@pytest.fixture(autouse=True)
def jobs_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of jobs: Montessori is not installed in vLLM's environment."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def generate(
    folder: Path,
    model: Path,
    python: str,
    rows: list[Row],
    sampling: Sampling,
    gpus: Vllm | None = None,
    options: dict[str, Any] | None = None,
    engine: Literal["vllm", "transformers"] = "vllm",
    size: int | None = None,
) -> list[Row]:
    settings = programs.Generation(engine=engine, engine_options=options or {}, sampling=sampling, form="tagged")
    inputs = {"teacher": model}
    if gpus is not None:
        inputs["vllm"] = folder.with_name("vllm.json")
        inputs["vllm"].write_text(gpus.model_dump_json())
    stage = Stage.of(programs.GENERATION, settings, folder, inputs, {})
    parts = fan_out(stage, Shards(Rows.of(rows), size or len(rows)), Resources(), Cluster(), python=python)
    return [row for part in parts for row in read_table(part, GENERATION).to_pylist()]


def test_vllm_samples_depend_on_their_seeds(smollm2: Path, vllm_python: str, tmp_path: Path) -> None:
    seeds = read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    prompts = build_prompts(4, "completion", Synthesis(), seeds, [], seed=0)
    rows: list[Row] = [
        {"example_ids": [f"{p.id}-s{i}" for i in range(4)], "turns": [p.text], "seeds": [1, 2, 3, 1]} for p in prompts
    ]
    rows.append({"example_ids": ["france"], "turns": ["The capital of France is"], "seeds": [1]})
    found = generate(tmp_path / "stage", smollm2, vllm_python, rows, Sampling(max_tokens=32, presence_penalty=0.0))
    assert [row["example_id"] for row in found] == [name for row in rows for name in row["example_ids"]]
    # Equal seeds draw equally until rounding, which differs between a read and a cached prompt, moves a border.
    starts = [[row["raw_output"][:6] for row in found[first : first + 4]] for first in range(0, 16, 4)]
    assert sum(texts[0] == texts[3] for texts in starts) >= 3
    assert sum(len(set(texts[:3])) == 3 for texts in starts) >= 2
    assert all(row["tokens"] <= 32 for row in found)
    stopped = [row for row in found[:16] if row["finish_reason"] == "stop"]
    assert any(row["raw_output"].endswith(CLOSE) for row in stopped)
    assert json.loads((tmp_path / "stage" / "stage.json").read_text())["settings"]["engine"] == "vllm"


CONFINED = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[2])})
import psutil
from montessori_core.config import Sampling
from montessori_core.models.load import load_tokenizer
from montessori_core.synthesis.engine import Request
from montessori_core.synthesis.generation import open_engine
if __name__ == "__main__":
    engine = open_engine("vllm", sys.argv[1], load_tokenizer(sys.argv[1]))
    list(engine.generate([Request("One, two,", seed=0)], Sampling(max_tokens=4, presence_penalty=0.0), None))
    workers = psutil.Process().children(recursive=True)
    print("cores", sorted({core for worker in workers for core in worker.cpu_affinity()}))
"""


def test_vllm_stays_on_the_cores_of_its_job(smollm2: Path, vllm_python: str, tmp_path: Path) -> None:
    (tmp_path / "confined.py").write_text(CONFINED)
    last = str(max(os.sched_getaffinity(0)))
    command = [vllm_python, str(tmp_path / "confined.py"), str(smollm2), last]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_OMP_THREADS_BIND"}
    output = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True).stdout
    assert f"cores [{last}]" in output


def test_transformers_engine_runs_with_transformers_of_vllm(smollm2: Path, vllm_python: str, tmp_path: Path) -> None:
    """An older release than the worker's: names that it lacks must not be imported."""
    rows: list[Row] = [{"example_ids": ["0", "1"], "turns": ["The capital of France is"], "seeds": [1, 2]}]
    sampling = Sampling(temperature=0.0, max_tokens=8, presence_penalty=0.0)
    found = generate(tmp_path / "stage", smollm2, vllm_python, rows, sampling, engine="transformers")
    assert all("Paris" in row["raw_output"] for row in found)


def test_copies_of_a_model_answer_all_requests(smollm2: Path, vllm_python: str, tmp_path: Path) -> None:
    """Two copies, with an option of the engine: the lengths are those of the run, not the model's 8192 positions."""
    texts = ["The capital of France is", "One, two, three, four,"]
    rows: list[Row] = [
        {"example_ids": [f"{i}-0", f"{i}-1"], "turns": [t], "seeds": [1, 2]} for i, t in enumerate(texts)
    ]
    sampling = Sampling(temperature=0.0, max_tokens=12, presence_penalty=0.0)
    gpus, options = Vllm(data_parallel=2), {"max_num_seqs": 4}
    found = generate(tmp_path / "stage", smollm2, vllm_python, rows, sampling, gpus, options)
    assert [row["example_id"] for row in found] == ["0-0", "0-1", "1-0", "1-1"]
    assert [row["raw_output"] for row in found[::2]] == [row["raw_output"] for row in found[1::2]]
    assert "Paris" in found[0]["raw_output"]
    assert "five" in found[2]["raw_output"]
    log = "".join(file.read_text() for file in (tmp_path / "stage" / "jobs").rglob("*_log.*"))
    assert "tensor_parallel 1, data_parallel 2" in log
    assert log.count("'max_model_len': 1024") == 2
    with pytest.raises(ShardsFailed, match="engine_options.max_num_seq: vLLM .*did you mean 'max_num_seqs'"):
        generate(tmp_path / "wrong", smollm2, vllm_python, rows, sampling, gpus, {"max_num_seq": 4})


def test_engine_that_does_not_load_ends_stage(smollm2: Path, vllm_python: str, tmp_path: Path) -> None:
    """Its cache is too small. Another shard would load the model again, and fail."""
    rows: list[Row] = [{"example_ids": [name], "turns": ["One, two,"], "seeds": [1]} for name in "abc"]
    gpus, options = Vllm(data_parallel=2), {"num_gpu_blocks_override": 1}
    with pytest.raises(ShardsFailed, match="vLLM does not load the model") as failure:
        generate(tmp_path / "stage", smollm2, vllm_python, rows, Sampling(), gpus, options, size=1)
    assert [(failed.shard, failed.kind) for failed in failure.value.failures] == [(n, "code_error") for n in range(3)]
    assert "No available memory for the cache" in Path(failure.value.failures[0].log).read_text()  # vLLM's own error
    assert len(list((tmp_path / "stage" / "jobs").rglob("*_log.err"))) == 1


@pytest.mark.guarantee("process of vLLM is killed")
@pytest.mark.parametrize("copies", [1, 2])
def test_generation_survives_killed_process_of_vllm(
    smollm2: Path, vllm_python: str, tmp_path: Path, copies: int
) -> None:
    rows: list[Row] = [
        {"example_ids": [f"{n}-{i}" for i in range(8)], "turns": ["One, two,"], "seeds": list(range(8))}
        for n in range(4)
    ]
    engines = list[psutil.Process]()

    def kill() -> None:
        """Kill the engine, or a whole copy, once it generates."""
        wait_until(lambda: any((tmp_path / "stage" / "progress").glob("*.json")), 300, pause=0.1)
        log = "".join(file.read_text() for file in (tmp_path / "stage" / "jobs").rglob("*_log.*"))
        [number, *_] = re.findall(r"EngineCore pid=(\d+)", log)
        engines.append(psutil.Process(int(number)))
        (engines[0].parent() if copies > 1 else engines[0]).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    sampling, gpus, options = Sampling(max_tokens=64), Vllm(data_parallel=copies), {"max_num_seqs": 4}
    found = generate(tmp_path / "stage", smollm2, vllm_python, rows, sampling, gpus, options)
    killer.join()
    assert [row["example_id"] for row in found] == [name for row in rows for name in row["example_ids"]]
    assert len(list((tmp_path / "stage" / "jobs").rglob("*_log.err"))) == 2
    assert not any(engine.is_running() for engine in engines)


def test_vllm_applies_an_adapter(smollm2: Path, vllm_python: str, tmp_path: Path) -> None:
    """The adapter has learnt one sentence by heart."""
    start, end = "The capital of France is", " a yellow elephant with nine umbrellas."
    adapter, tokenizer = tmp_path / "adapter", load_tokenizer(str(smollm2))
    model = with_lora(load_model(str(smollm2), torch.float32), Lora())
    ids = torch.tensor([tokenizer(start + end)["input_ids"]])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    row = {"example_ids": ["france"], "turns": [start], "seeds": [1]}
    sampling = Sampling(temperature=0.1, max_tokens=10, presence_penalty=0.0)
    (found,) = generate(tmp_path / "stage", adapter, vllm_python, [row], sampling)
    assert found["raw_output"].startswith(end)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def test_local_vllm_server_judges(vllm_python: str, smollm2: Path, tmp_path: Path) -> None:
    port = free_port()
    options = f"--host 127.0.0.1 --port {port} --served-model-name judge --max-model-len 2048 --enforce-eager".split()
    server = subprocess.Popen(
        [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2), *options],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/v1/models"), 300, process=server, pause=1)
        endpoint = Endpoint(model="judge", base_url=f"http://127.0.0.1:{port}/v1", max_tokens=48)
        dialogue = Dialogue("1", "writing", ("Write a line about rain.", "And one about snow."), ())
        rows = judgements([dialogue], {"1": ("It rains.", "It snows.")})
        file = tmp_path / "judge.json"
        file.write_text(endpoint.model_dump_json())
        settings = programs.BenchmarkJudging(endpoint=endpoint.identity(), prompts="own")
        judge = as_compute(open_mt_bench_judge(settings, {"endpoint": file}))
        judge(rows, tmp_path / "part.parquet", lambda done: None)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    table = read_table(tmp_path / "part.parquet", MT_BENCH)
    assert table["turn"].to_pylist() == [1, 2]
    assert all(
        value is None or 1 <= value <= 10 for value in table["score"].to_pylist()
    )  # such a small judge gives random scores

"""`montessori push`: a run's tables and models on an fsspec path, also after a crash or a refusal in the middle."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig, get_peft_model

from montessori_core.errors import UserError
from montessori_core.export import remote
from montessori_core.export.sets import open_set
from montessori_core.files import write_json
from montessori_core.layout import MOMENTS_FILE
from montessori_core.models.load import load_merged, load_model, load_tokenizer
from montessori_core.processor import processor_name
from montessori_core.provenance import write_provenance
from montessori_report.run_page import render_report
from support import ROOT
from support.reports import write_run
from support.runs import invoke


def push(run: Path, *options: str) -> tuple[int, str]:
    code, output = invoke("push", str(run), *options, cwd=run.parent)
    return code, " ".join(output.split())


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push_copies_tables_models_and_card(tiny_llama: Path, tmp_path: Path) -> None:
    run, out = (
        write_run(tmp_path / "trial", iterations=3, teacher={"model": str(tmp_path / "private" / "t")}),
        tmp_path / "out",
    )
    trained = run / "iteration-2" / "student" / "part-00000"
    shutil.copytree(tiny_llama, trained)
    (trained / MOMENTS_FILE).write_bytes(b"large")
    (run / "report.html").write_text("<p>report</p>")
    (run / "iteration-3" / "metrics.json").unlink()
    code, output = push(run, "--to", f"file://{out}")
    assert code == 0, output
    copied = content(out)
    tables = {f"data/{name}/iteration-{n}.parquet" for name in ("training", "preferences", "scored") for n in (1, 2)}
    assert tables < copied.keys()
    assert {name for name in copied if "/" not in name} == {"README.md", "report.html", "files.json"}
    assert f"models/student/{MOMENTS_FILE}" not in copied
    for name in ("training", "preferences", "scored"):
        rows = load_dataset(str(out), name, split="train", cache_dir=str(tmp_path / "cache")).to_list()
        assert rows == [
            row for number in (1, 2) for table in open_set(run, name, number).tables() for row in table.to_pylist()
        ]
    student, expected = (
        load_model(str(path), torch.float32).state_dict() for path in (out / "models" / "student", trained)
    )
    assert all(torch.equal(student[name], expected[name]) for name in expected)
    _, header, body = copied["README.md"].decode().split("---\n", 2)
    assert [entry["config_name"] for entry in yaml.safe_load(header)["configs"]] == [
        "training",
        "preferences",
        "scored",
    ]
    assert "| models/student | student of iteration 2 |" in body
    assert not any(str(tmp_path) in text.decode(errors="ignore") for text in copied.values())

    code, output = push(run, "--to", f"file://{out}")
    assert code == 0
    assert "already there, nothing copied" in output
    assert list((run / "exports").iterdir()) == []


def test_push_keeps_the_site_private(tmp_path: Path) -> None:
    private = tmp_path / "private"
    sections = {
        "teacher": {"model": str(private / "teacher")},
        "reference": {"path": str(private / "clients.jsonl")},
        "judge": {"model": "judge", "base_url": "http://internal.example:8000/v1", "key_variable": "SECRET_NAME"},
        "cluster": {
            "slurm": {
                "account": "secret-account",
                "setup": ["module load secret-module"],
                "environment": {"PROXY": "secret-proxy"},
            }
        },
    }
    private.mkdir()
    (private / "clients.jsonl").write_text('{"instruction": "Add 1 and 1.", "output": "2"}\n' * 3)
    run, out = write_run(tmp_path / "trial", **sections), tmp_path / "out"
    write_provenance(run, {"teacher": "1" * 64})
    render_report(run).write(run / "report.html")
    own = (run / "report.html").read_text()
    code, output = push(run, "--to", f"file://{out}")
    assert code == 0, output
    hidden = (str(tmp_path), "internal.example", "SECRET_NAME", os.getcwd(), platform.platform())
    for text in (*hidden, "secret-account", "secret-module", "secret-proxy"):
        assert text in own
        assert [name for name, data in content(out).items() if text.encode() in data] == []
    assert (run / "report.html").read_text() == own
    pushed = (out / "report.html").read_text()
    for text in ("PATH/clients.jsonl", "PATH/teacher", "1" * 64, processor_name()):
        assert text in pushed


def write_adapter(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write an adapter with random weights; return the weights of the merged model."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_model(str(base), torch.float32), settings).save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    weights: dict[str, torch.Tensor] = load_merged(str(folder), torch.float32).state_dict()
    return weights


def test_adapter_of_local_model_is_merged_or_refused(tiny_llama: Path, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "trial"), tmp_path / "out"
    expected = write_adapter(tiny_llama, run / "iteration-1" / "teacher" / "part-00000")
    code, output = push(run, "--to", f"file://{out}")
    assert code == 1
    assert "teacher is an adapter of a model that is not on a hub" in output
    assert "--merge" in output
    assert "--no-models" in output
    assert not out.exists()
    code, output = push(run, "--to", f"file://{out}", "--merge")
    assert code == 0, output
    pushed = content(out)
    assert "models/teacher/adapter_config.json" not in pushed
    assert not any(str(tiny_llama).encode() in data for data in pushed.values())
    weights = load_model(str(out / "models" / "teacher"), torch.float32).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "library_name: transformers" in pushed["models/teacher/README.md"].decode()


@pytest.mark.parametrize("templated", [False, True])
def test_adapter_names_its_base_on_the_hub(tiny_llama: Path, tmp_path: Path, templated: bool) -> None:
    run, out, commit = write_run(tmp_path / "trial", student={"model": "me/tiny"}), tmp_path / "out", "1" * 40
    base = tmp_path / "hub" / "models--me--tiny" / "snapshots" / commit
    if templated:
        base = run / "models" / "student"
        write_json({"me/tiny@main": commit}, run / "models.json")
    shutil.copytree(tiny_llama, base)
    trained = run / "iteration-1" / "student" / "part-00000"
    write_adapter(base, trained)
    before = content(trained)
    code, output = push(run, "--to", f"file://{out}")
    assert code == 0, output
    settings, own = (
        json.loads((path / "adapter_config.json").read_text()) for path in (out / "models/student", trained)
    )
    assert own["base_model_name_or_path"] == str(base)
    assert settings == own | {"base_model_name_or_path": "me/tiny", "revision": commit}
    assert not any(str(tmp_path).encode() in data for data in content(out).values())
    assert content(trained) == before


def test_killed_copy_continues_where_it_was(tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        (folder / "sub" / f"{number}.bin").write_bytes(os.urandom(1000 + number))
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from montessori_core.export import remote\n"
        "remote._BLOCK, blocks = 300, []\n"
        "def kill(done, total):\n"
        "    blocks.append(done)\n"
        "    if len(blocks) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "remote.copy_folder(Path(sys.argv[1]), sys.argv[2], False, kill)\n"
    )
    command = [sys.executable, "-c", program, str(folder), f"file://{out}"]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((out / "files.json").read_text())["complete"] is False
    assert remote.copy_folder(folder, f"file://{out}", False, lambda done, total: None) == 4
    assert {name: data for name, data in content(out).items() if name != "files.json"} == content(folder)
    assert json.loads((out / "files.json").read_text())["complete"] is True


def copy_with_limit(folder: Path, out: Path, size: int) -> str:
    """Copy a folder with a largest size of a file, which ends a write in its middle as a quota does; return stderr."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from montessori_core.export import remote\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "remote.copy_folder(Path(sys.argv[1]), sys.argv[2], True, lambda done, total: None)\n"
    )
    command = [sys.executable, "-c", program, str(folder), f"file://{out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr


def test_refused_file_is_reported_and_sent_later(tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_bytes(b"small")
    (folder / "b").write_bytes(os.urandom(100_000))
    refused = copy_with_limit(folder, out, 50_000)
    assert "File too large" in refused
    assert "repeat the command: it sends what is missing" in refused
    assert remote.copy_folder(folder, f"file://{out}", False, lambda done, total: None) == 1
    assert (out / "b").read_bytes() == (folder / "b").read_bytes()


def test_interrupted_list_keeps_the_earlier_one(tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    for number in range(100):
        (folder / str(number)).write_bytes(b"small")
    assert remote.copy_folder(folder, f"file://{out}", False, lambda done, total: None) == 100
    (folder / "new").write_bytes(b"small")
    refused = copy_with_limit(folder, out, 5_000)  # in the middle of the list
    assert "File too large" in refused
    assert remote.copy_folder(folder, f"file://{out}", True, lambda done, total: None) == 1
    assert content(out).keys() == {*content(folder), "files.json"}


def test_other_files_are_never_touched(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "trial"), tmp_path / "out"
    code, output = push(run, "--to", f"file://{run}", "--replace")
    assert code == 1
    assert "has files that were not pushed" in output
    before = content(run)
    assert push(run, "--to", f"file://{out}", "--no-models")[0] == 0
    (run / "iteration-1" / "metrics.json").write_text(json.dumps({"held_out_loss": {}}))
    code, output = push(run, "--to", f"file://{out}")
    assert code == 1
    assert "has other contents (README.md, report.html); nothing was copied" in output
    assert push(run, "--to", f"file://{out}", "--replace")[0] == 0
    assert "## Held-out loss" not in (out / "README.md").read_text()
    (out / "mine.txt").write_text("keep")
    code, output = push(run, "--to", f"file://{out}", "--replace")
    assert code == 1
    assert "has files that were not pushed (mine.txt)" in output
    assert (out / "mine.txt").read_text() == "keep"
    assert content(run).keys() == before.keys()


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial")
    for options, message in (
        (["--to", "s3:bucket"], "write a URL such as s3://BUCKET/FOLDER"),
        (["--to", str(tmp_path / "out")], f"or file://{tmp_path / 'out'}"),
        (["--to", "nothing://here"], "Protocol not known: nothing"),
        (["--to", "file:///x", "--private"], "--private needs --to hf://datasets/OWNER/NAME"),
        (["--to", "hf://models/me/x"], "write hf://datasets/OWNER/NAME"),
        (["--to", "ftp://me:canary@127.0.0.1:1/x"], "--to ftp://127.0.0.1:1/x: "),
    ):
        code, output = push(run, *options)
        assert code == 1, output
        assert message in output
        assert "canary" not in output
    shutil.rmtree(run / "iteration-1" / "training")
    assert "iteration 1 has no training set" not in push(run, "--to", f"file://{tmp_path / 'out'}")[1]
    (run / "iteration-1" / "metrics.json").unlink()
    code, output = push(run, "--to", f"file://{tmp_path / 'out'}")
    assert code == 1
    assert "no finished iteration; resume the run first" in output
    assert not (tmp_path / "out").exists()


def test_copy_in_memory_equals_folder(tmp_path: Path) -> None:
    """A file system without folders, as object stores are."""
    import fsspec

    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.bin").write_bytes(b"x" * 10)
    sent: list[tuple[int, int]] = []
    assert remote.copy_folder(tmp_path / "a", "memory://bucket/run", False, lambda *counts: sent.append(counts)) == 1
    assert sent == [(10, 10)]
    assert fsspec.filesystem("memory").cat_file("/bucket/run/b/c.bin") == b"x" * 10
    (tmp_path / "a" / "b" / "c.bin").write_bytes(b"y" * 10)
    with pytest.raises(UserError, match="other contents"):
        remote.copy_folder(tmp_path / "a", "memory://bucket/run", False, lambda *counts: None)
    assert remote.copy_folder(tmp_path / "a", "memory://bucket/run", True, lambda *counts: None) == 1
    assert fsspec.filesystem("memory").cat_file("/bucket/run/b/c.bin") == b"y" * 10

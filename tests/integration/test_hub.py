"""Models and data sets from a hub: the driver fetches models once, a run keeps its commit, workers need no hub.

A local server implements the hub's protocol for the real client.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support import ROOT

OPEN_RUN = """
import sys
from pathlib import Path
from montessori_core.config import parse_experiment
from montessori_core.errors import UserError
from tasks.run import open_run
content = {"teacher": {"model": "group/tiny"}, "student": {"model": sys.argv[2]},
    "reference": {"path": "builtin", "limit": 4}, "evaluation": {"path": "builtin", "limit": 4}}
try:
    run, _ = open_run(parse_experiment(content, "test"), Path(sys.argv[1]))
except UserError as error:
    sys.exit(str(error))
print(Path(run.initial_teacher().path).name, run.initial_teacher().sha256)
"""

READ_ROWS = """
from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
from montessori_core.errors import UserError
try:
    print(len(read_tasks(DataSource(path="group/tiny"), "reference", True)), "rows")
except UserError as error:
    print(error)
"""


class Hub(ThreadingHTTPServer):
    """A hub with one public model or data set; `gated` requires an agreement."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.commit, self.gated = folder, "1" * 40, False
        self.asked: list[str] = []


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path, files = self.path.partition("?")[0], sorted(self.server.folder.iterdir())
        headers, status = {"X-Repo-Commit": self.server.commit}, 200
        if "/group/tiny" not in path or self.server.gated:
            reason = "GatedRepo" if self.server.gated else "RepoNotFound"
            status, content = 403 if self.server.gated else 404, b"{}"
            headers["X-Error-Code"] = reason
        elif "/tree/" in path:
            content = json.dumps(
                [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)} for f in files]
            ).encode()
        elif path.startswith("/api/"):
            names = [{"rfilename": file.name} for file in files]
            content = json.dumps({"id": "group/tiny", "sha": self.server.commit, "siblings": names}).encode()
        elif not (file := self.server.folder / path.rpartition("/")[2]).exists():
            status, content, headers["X-Error-Code"] = 404, b"{}", "EntryNotFound"
        else:
            content, headers["ETag"] = file.read_bytes(), f'"{digest(file)}"'
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tiny_llama)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-cache"))
    yield server
    server.shutdown()


def open_run(folder: Path, student: str = "group/tiny") -> subprocess.CompletedProcess[str]:
    return python(OPEN_RUN, str(folder), student)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)


@pytest.mark.guarantee("commit that changes during a run")
def test_run_keeps_its_hub_commit_offline(hub: Hub, tmp_path: Path) -> None:
    first = open_run(tmp_path / "run")
    assert first.stdout.startswith("1" * 40), first.stderr
    assert sum(path.endswith("model.safetensors") for path in hub.asked) <= 2  # a HEAD and a GET for both models
    hub.commit = "2" * 40
    assert open_run(tmp_path / "run").stdout == first.stdout
    moved = open_run(tmp_path / "later-run").stdout
    assert moved.startswith("2" * 40)
    assert moved.split()[1] != first.stdout.split()[1]
    hub.shutdown()
    hub.server_close()
    assert open_run(tmp_path / "run").stdout == first.stdout


def test_unavailable_hub_model_is_refused_with_remedy(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    assert "is gated: accept its licence" in open_run(tmp_path / "run").stderr
    hub.gated = False
    absent = open_run(tmp_path / "run", "group/absent")
    assert absent.returncode == 1
    assert "'group/absent', revision main, cannot be downloaded from the hub" in absent.stderr
    assert "Check id, revision" in absent.stderr
    assert "'smolm2-135m' (did you mean 'smollm2-135m'?), revision" in open_run(tmp_path / "run", "smolm2-135m").stderr
    assert not (tmp_path / "run").exists()


LICENCE = """
import sys
from montessori_core.models.fetch import fetch_model
from montessori_core.models.licences import licence_of
print(licence_of("group/tiny"), end=" ")
fetch_model("group/tiny", sys.argv[1])
print(licence_of("group/tiny"), licence_of("group/tiny", sys.argv[1]))
"""


def test_licence_is_that_of_the_downloaded_card(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (hub.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    for revision, known in (("1" * 40, "None None apache-2.0"), ("main", "None apache-2.0 apache-2.0")):
        command = [sys.executable, "-c", LICENCE, revision]
        said = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == known


ORIGIN = """
import sys
from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
origins = {}
read_tasks(DataSource(path="group/tiny", revision=sys.argv[1]), "reference", True, None, origins)
print(origins["reference"].licence_text, origins["reference"].commit)
"""


def test_origin_of_hub_data_set_is_recorded(hub: Hub, tmp_path: Path) -> None:
    """The commit of a branch when it was read, and the licence in the card of that commit."""
    hub.folder = tmp_path / "rows"
    hub.folder.mkdir()
    (hub.folder / "train.jsonl").write_text(json.dumps({"instruction": "Name a colour.", "output": "Red."}))
    first = python(ORIGIN, "main")
    assert first.stdout == f"not stated {'1' * 40}\n", first.stderr
    hub.commit = "2" * 40
    (hub.folder / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n# Tiny\n")
    assert python(ORIGIN, "main").stdout == f"mit, cc-by-4.0 {'2' * 40}\n"
    hub.shutdown()
    hub.server_close()
    assert python(ORIGIN, "main").stdout == f"mit, cc-by-4.0 {'2' * 40}\n"  # the data set is in the cache


EVALUATION = """
import sys
from pathlib import Path
from flows.evaluation import evaluated_experiment, open_evaluation
from montessori_core.data.origins import read_origins
from montessori_core.export.hub_models import configured_on_hub, models_on_hub
from montessori_core.export.published import public_names
content = {"student": {"max_length": 128, "revision": "v1"}, "evaluation": {"path": sys.argv[3]}}
for _ in range(2):
    evaluation, warnings = open_evaluation(evaluated_experiment(content, sys.argv[2], "mine", "test"), Path(sys.argv[1]))
run = evaluation.run
print(warnings, public_names(run.folder, run.experiment), models_on_hub(run.folder))
print(configured_on_hub(run.folder, run.experiment.student), read_origins(run.folder / "data_sets.json"))
"""


def test_evaluation_records_what_it_read_from_the_hub(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    hub.folder, local = shutil.copytree(tiny_llama, tmp_path / "hub"), tmp_path / "rows.jsonl"
    for file in (hub.folder / "train.jsonl", local):
        file.write_text(json.dumps({"instruction": "Name a colour.", "output": "Red."}))
    rows = python(EVALUATION, str(tmp_path / "rows"), str(tiny_llama), "group/tiny")
    assert rows.stdout.splitlines() == [
        "[] {'group/tiny'} set()",
        f"None {{'evaluation': Origin(licence=None, commit='{'1' * 40}')}}",
    ], rows.stderr
    model = python(EVALUATION, str(tmp_path / "model"), "group/tiny", str(local))
    assert model.stdout.splitlines() == [
        "[] {'group/tiny'} {'group/tiny'}",
        f"HubModel(id='group/tiny', commit='{'1' * 40}') {{'evaluation': Origin(licence=None, commit=None)}}",
    ], model.stderr
    assert any(path.endswith("/revision/v1") for path in hub.asked)


@pytest.mark.guarantee("decompression bombs")
def test_bomb_in_hub_data_set_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "rows"
    hub.folder.mkdir()
    row = json.dumps({"instruction": "Name a colour.", "output": "Red."}).encode()
    (hub.folder / "train.jsonl.gz").write_bytes(gzip.compress(row))
    assert python(READ_ROWS).stdout == "1 rows\n"
    for commit, name, message in (
        ("2" * 40, "train.jsonl.gz", "grow to more than"),
        ("3" * 40, "train.jsonl", "compressed in a way that its name does not say"),
    ):
        hub.commit = commit
        (hub.folder / "train.jsonl.gz").unlink()
        (hub.folder / name).write_bytes(gzip.compress(row + b" " * 2**25))
        refused = python(READ_ROWS)
        assert f"{commit}/{name}: " in refused.stdout, refused.stderr
        assert message in refused.stdout

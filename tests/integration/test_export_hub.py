"""`montessori export --to hub` and `push --to hf://`: the real client, a local server with the hub's protocol."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from support import ROOT
from support.reports import write_run

TOKEN = "hf_token-of-the-test"


class DataHub(ThreadingHTTPServer):
    """A hub with data sets, whose owner is 'me'; Parquet files go through LFS."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.commits = 0
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits += 1


def described(path: str, content: bytes) -> dict[str, Any]:
    """Return a file as the hub's API does, under the names of both its lists."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"rfilename": path, "path": path, "type": "file", "size": len(content), "blobId": blob, "oid": blob}
    if path.endswith(".parquet"):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha, "oid": sha, "size": len(content), "pointerSize": 130}
    return entry


class _Answer(BaseHTTPRequestHandler):
    server: DataHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.files:
                return self._send({"error": "exists", "url": f"{hub.address}/datasets/{name}"}, 409)
            hub.files[name] = {".gitattributes": b"*.parquet filter=lfs\n"}
            hub.private |= {name} if asked.get("visibility") == "private" else set()
            return self._send({"url": f"{hub.address}/datasets/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/datasets/(.+).git/info/lfs/objects/batch", self.path):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.address}/upload/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self._send({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/datasets/(.+)/preupload/main", self.path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".parquet") else "regular" for path in files}
            return self._send(
                {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in files]}
            )
        match = re.fullmatch(r"/api/datasets/(.+)/commit/main", self.path)
        assert match, self.path
        hub.commit(match[1], [json.loads(line) for line in body.splitlines()])
        commit = f"{hub.commits:040d}"
        address = f"{hub.address}/datasets/{match[1]}/commit/{commit}"
        return self._send({"success": True, "commitOid": commit, "commitUrl": address})

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/.*)?", path)
        if match is None or match[1] not in hub.files:
            return self._send({"error": "Repository not found"}, 404)
        files = [described(name, content) for name, content in hub.files[match[1]].items()]
        if match[2] and match[2].startswith("/tree/"):
            return self._send(files)
        sha = f"{hub.commits:040d}"
        return self._send({"id": match[1], "sha": sha, "siblings": files, "private": match[1] in hub.private})

    def do_PUT(self) -> None:
        self.server.uploads[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send({})

    def _send(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    server = DataHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # LFS instead: Xet is a protocol of its own, in a library
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


def export(run: Path, *options: str) -> tuple[int, str]:
    return montessori("export", run, *options)


def montessori(command_name: str, run: Path, *options: str) -> tuple[int, str]:
    """Run a command in a new process: the client reads its environment when it is imported."""
    command = [sys.executable, "-m", "flows.cli", command_name, str(run), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(command, cwd=run.parent, env=environment, capture_output=True, text=True, check=False)
    return outcome.returncode, " ".join((outcome.stdout + outcome.stderr).split())


def test_export_is_pushed_with_its_card(hub: DataHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "trial")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, output = export(run, "--to", "hub", "--repo", "me/set", "--private", "--output", "kept")
    assert (code, "then repeat the command" in output) == (1, True), output
    assert [path.name for path in tmp_path.iterdir() if "kept" in path.name] == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, output = export(run, "--to", "hub", "--repo", "me/set", "--private", "--output", "kept")
    assert code == 0, output
    assert f"pushed to {hub.address}/datasets/me/set" in output
    written = {p.relative_to(tmp_path / "kept").as_posix(): p for p in (tmp_path / "kept").rglob("*") if p.is_file()}
    assert set(written) == {"README.md", "data/train.jsonl"}
    pushed = {name: content for name, content in hub.files["me/set"].items() if name != ".gitattributes"}
    assert pushed == {name: path.read_bytes() for name, path in written.items()}
    assert hub.private == {"me/set"}
    assert TOKEN not in output
    assert not any(TOKEN in path.read_text(errors="ignore") for path in run.rglob("*") if path.is_file())

    code, output = export(run, "--to", "hub", "--repo", "me/set")
    assert (code, hub.commits) == (0, 1), output
    assert "/tmp" not in output
    assert "already there, nothing pushed" in output


@pytest.mark.slow
def test_other_contents_are_replaced_only_if_told(hub: DataHub, tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial")
    code, output = export(run, "--to", "hub", "--repo", "set", "--format", "parquet", "--what", "scored")
    assert code == 0, output
    before = dict(hub.files["me/set"])
    assert set(before) == {".gitattributes", "README.md", "data/train.parquet"}
    code, output = export(run, "--to", "hub", "--repo", "me/set")
    assert code == 1
    assert "has other contents (README.md, data/train.jsonl, data/train.parquet); nothing was pushed" in output
    assert hub.files["me/set"] == before
    assert hub.commits == 1
    code, output = export(run, "--to", "hub", "--repo", "me/set", "--replace", "--private")
    assert code == 1
    assert "is public, and --private does not change that" in output
    assert hub.commits == 1
    code, output = export(run, "--to", "hub", "--repo", "me/set", "--replace")
    assert code == 0, output
    assert set(hub.files["me/set"]) == {".gitattributes", "README.md", "data/train.jsonl"}
    code, output = export(run, "--to", "hub", "--repo", "me/pairs", "--what", "preferences")
    assert code == 0, output
    assert "chosen" in json.loads(hub.files["me/pairs"]["data/train.jsonl"].splitlines()[0])


def test_run_is_pushed_with_its_models(hub: DataHub, tiny_llama: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial")
    shutil.copytree(tiny_llama, run / "iteration-1" / "student" / "part-00000")
    to_hub = ["--to", "hf://datasets/me/run", "--private"]
    code, output = montessori("push", run, *to_hub)
    assert code == 0, output
    assert f"pushed to {hub.address}/datasets/me/run" in output
    pushed = hub.files["me/run"]
    assert pushed["models/student/model.safetensors"] == (tiny_llama / "model.safetensors").read_bytes()
    assert {f"data/{name}/iteration-1.parquet" for name in ("training", "preferences", "scored")} < pushed.keys()
    assert (hub.private, hub.commits) == ({"me/run"}, 1)
    code, output = montessori("push", run, *to_hub)
    assert (code, hub.commits) == (0, 1), output
    assert "already there, nothing pushed" in output


@pytest.mark.slow
def test_push_without_right_or_hub_is_refused(hub: DataHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "trial")
    to_hub = ["--to", "hub", "--repo"]
    assert "write OWNER/NAME" in export(run, *to_hub, "a/b/c")[1]
    assert "--to hub needs --repo" in export(run, "--to", "hub")[1]
    assert "need --to hub" in export(run, "--to", "alpaca", "--private")[1]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, output = export(run, *to_hub, "me/set")
    assert code == 1
    assert "the token may write" in output
    assert "hf_wrong" not in output
    monkeypatch.delenv("HF_TOKEN")
    assert "no token; set HF_TOKEN" in export(run, *to_hub, "me/set")[1]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.shutdown()
    hub.server_close()
    code, output = export(run, *to_hub, "me/set")
    assert code == 1
    assert "did not answer" in output
    assert not (run / "exports").exists()

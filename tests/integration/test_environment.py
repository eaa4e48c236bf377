"""Commands and jobs work whatever the environment and the working directory hold: modules, proxies, Prefect's settings."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import patch

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_CLIENT_CUSTOM_HEADERS, temporary_settings

from cluster.fanout import fan_out
from cluster.import_path import check_import_path
from cluster.stage import Stage
from flows import deployments
from flows.prefect_api import problem_of
from flows.prefect_yaml import read_deployments
from montessori_core.config import Resources
from montessori_core.environment import set_process_defaults
from montessori_core.errors import UserError
from montessori_core.files import cache_root
from montessori_entry import FLOWS
from support import NO_LIBRARIES, ROOT, wait_until
from support.prefect_server import free_port, prefect_server
from support.row_programs import as_shards
from support.runs import call, configuration
from support.squares import CLUSTER, EXPECTED, SHARDS, folder, results, stage

__all__ = ["folder"]

OURS = ["cluster", "tasks", "flows", "montessori_core", "montessori_report"]
OWN_MODULES = [*OURS, "submitit", "numpy", "queue"]
SCRIPT = "import sys\nfrom montessori_entry import main\nsys.exit(main())\n"
"""The script `montessori` of an installation."""

PROXY = "http://127.0.0.1:9"  # nothing listens on this port
PROXIES = ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]


def fill(folder: Path) -> Path:
    """Write modules of a user with common names into a folder."""
    folder.mkdir(exist_ok=True)
    for name in OWN_MODULES:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} of the working directory')\n")
    return folder


def script(folder: Path, *arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Run the installed command."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "montessori").write_text(SCRIPT)
    outcome = subprocess.run(
        [sys.executable, folder / "bin" / "montessori", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return outcome.returncode, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("python", [None, sys.executable], ids=["forked jobs", "new interpreters"])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_jobs_import_installed_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, python: str | None, processes: int
) -> None:
    monkeypatch.chdir(fill(folder / "own"))
    if processes == 1:  # several processes join through torch
        monkeypatch.setenv("PYTHONPATH", f"{NO_LIBRARIES}{os.pathsep}{os.environ['PYTHONPATH']}")
    resources = Resources(parallel_jobs=1, cpus_per_process=1, processes_per_node=processes, infrastructure_retries=0)
    parts = fan_out(stage(folder), as_shards(*SHARDS), resources, CLUSTER, python=python)
    assert results(parts) == EXPECTED


def test_children_of_jobs_ignore_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's engine and other libraries start Python processes of their own."""
    (folder / "parent_program.py").write_text(
        "import subprocess, sys\n"
        "def open_parent(settings, inputs):\n"
        "    def compute(rows, output, report):\n"
        "        code = 'import cluster, numpy; print([module.__file__ for module in (cluster, numpy)])'\n"
        "        output.write_text(subprocess.check_output([sys.executable, '-c', code], text=True))\n"
        "    return compute\n"
    )
    monkeypatch.chdir(fill(folder / "own"))
    monkeypatch.setenv("PYTHONPATH", f"{NO_LIBRARIES}{os.pathsep}{os.environ['PYTHONPATH']}")
    parent = Stage("parent", 1, "parent_program:open_parent", {}, {}, {}, folder / "stage", ".json")
    [part] = fan_out(parent, as_shards(SHARDS[0]), Resources(infrastructure_retries=0), CLUSTER)
    assert str(ROOT / "cluster") in part.read_text()
    assert str(folder / "own") not in part.read_text()


def test_driver_ignores_working_directory(tmp_path: Path) -> None:
    code, output = script(tmp_path, "methods", cwd=fill(tmp_path / "own"))
    assert code == 0, output


@pytest.mark.parametrize("hidden", ["flows", pytest.param("montessori_report", marks=pytest.mark.slow)])
def test_driver_imports_installed_packages(tmp_path: Path, hidden: str) -> None:
    own = _only(fill(tmp_path / "own"), hidden)
    code, output = script(tmp_path, "methods", cwd=tmp_path, PYTHONPATH=f"{own}{os.pathsep}{ROOT}")
    assert code == 0, output


def test_deployed_flows_import_installed_packages(tmp_path: Path) -> None:
    """A worker or `montessori up` loads a flow by its entrypoint, wherever PYTHONPATH leads."""
    own = _only(fill(tmp_path / "own"), *OURS)
    code = (
        "import sys\nfrom prefect.flows import load_flow_from_entrypoint as load\n"
        "from montessori_entry import FLOWS\n"
        "print([load(f'montessori_entry.{name}').fn.__module__ for name in FLOWS])\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{own}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert outcome.stdout == "['flows.experiment', 'flows.tailor', 'flows.study', 'flows.evaluation']\n", outcome.stderr


def test_deployments_name_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "_registered", lambda deployment: None)
    shipped = read_deployments(ROOT / "flows" / "prefect.yaml")
    entrypoints = {deployments._to_deployment(deployment, "pool").entrypoint for deployment in shipped}
    assert entrypoints == {f"montessori_entry.{name}" for name in FLOWS}


def _only(folder: Path, *names: str) -> Path:
    for path in folder.glob("*.py"):
        if path.stem not in names:
            path.unlink()
    return folder


@pytest.mark.parametrize("name", ["cluster", "montessori_core"])
@pytest.mark.parametrize("entry", ["{own}", "", "."], ids=["folder", "empty", "dot"])
def test_own_package_on_pythonpath_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, entry: str
) -> None:
    own = _only(fill(folder / "own"), name)
    monkeypatch.chdir(own)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([entry.format(own=own), str(folder), str(ROOT)]))
    with pytest.raises(UserError, match=rf"{own}/{name}.py in place of Montessori's package {name}.*PYTHONPATH"):
        fan_out(stage(folder), as_shards(*SHARDS), Resources(), CLUSTER)


def test_own_package_of_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a virtual environment, packages of pip install --user come before those of the system."""
    own = _only(fill(folder / "own"), "cluster")
    monkeypatch.setattr("site.ENABLE_USER_SITE", True)
    monkeypatch.setattr("site.getusersitepackages", lambda: str(own))
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(UserError, match=rf"{own}/cluster.py in place of Montessori's package cluster"):
        fan_out(stage(folder), as_shards(*SHARDS), Resources(), CLUSTER)


@pytest.mark.parametrize("command", ["export PYTHONPATH={own}", 'PYTHONPATH="{own}:$PYTHONPATH"; module load x'])
def test_own_package_of_setup_commands_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    own = _only(fill(tmp_path / "own"), "montessori_core")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    check_import_path(["module load python", "export PYTHONPATH=$PYTHONPATH:/absent"])
    with pytest.raises(UserError, match=rf"{own}/montessori_core.py in place of"):
        check_import_path([command.format(own=own)])


@pytest.mark.slow
def test_own_method_is_found_on_pythonpath(tmp_path: Path) -> None:
    """As docs/comparing.md says; and PYTHONSAFEPATH does not hide it."""
    (tmp_path / "mine.py").write_text(
        "from flows.methods.method import Method\nMINE = Method('mine', 'Mine.', lambda now: None)\n"
    )
    code = "from flows.study import find_method; print(find_method('mine:MINE').name)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=fill(tmp_path / "own"), capture_output=True
    )
    assert outcome.stdout == b"mine\n", outcome.stderr


@pytest.fixture
def no_proxy() -> Iterator[None]:
    """An environment without proxies; what a test sets there is removed."""
    with patch.dict(os.environ):
        for name in (*PROXIES, "no_proxy", "NO_PROXY"):
            os.environ.pop(name, None)
        yield


@pytest.fixture
def proxy(no_proxy: None) -> None:
    """An environment with a proxy that refuses connections, as login nodes set one."""
    os.environ.update(dict.fromkeys(PROXIES, PROXY))


@pytest.fixture(scope="module", params=["127.0.0.1", "::1"])
def loopback(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server on this machine."""

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if request.param == "::1" else socket.AF_INET

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    try:
        server = Server((request.param, 0), Answer)
    except OSError:
        pytest.skip(f"this machine has no address {request.param}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"[{request.param}]" if request.param == "::1" else request.param
    yield f"http://{host}:{server.server_port}"
    server.shutdown()


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("before", [{}, {"no_proxy": "a.org"}, {"NO_PROXY": "a.org, b.org"}, {"no_proxy": "*"}])
def test_loopback_uses_no_proxy(loopback: str, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]) -> None:
    import requests

    for name, value in before.items():
        monkeypatch.setenv(name, value)
    set_process_defaults()
    assert httpx.get(loopback).json() is True
    assert requests.get(loopback, timeout=5).json() is True
    assert problem_of(loopback) is None
    if "127.0.0.1" in loopback:
        opener = urllib.request.build_opener()  # that of urlopen would keep the proxies for later tests
        assert opener.open(loopback, timeout=5).read() == b"true"
        assert httpx.get(loopback.replace("127.0.0.1", "localhost")).json() is True
        assert httpx.get(loopback.replace("127.0.0.1", "0.0.0.0")).json() is True
    for host in filter(None, "".join(before.values()).replace(" ", "").split(",")):
        assert host in os.environ["no_proxy"].split(",")
        assert host in os.environ["NO_PROXY"].split(",")
    set_process_defaults()
    assert os.environ["no_proxy"].count("::1") == 1


@pytest.mark.usefixtures("no_proxy")
def test_environment_without_proxy_stays() -> None:
    """Alone, no_proxy would hide the proxies of macOS's settings."""
    set_process_defaults()
    assert "no_proxy" not in os.environ


def test_empty_cache_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MONTESSORI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert cache_root() == Path.home() / ".cache" / "montessori"


@pytest.mark.slow
@pytest.mark.usefixtures("proxy")
def test_run_ignores_proxy_and_working_directory(talking_llama: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, talking_llama)
    # Models are files, and HF_HUB_OFFLINE keeps the hub out: only loopback is reached.
    code, output = script(
        tmp_path,
        "run",
        str(config),
        "--run-root",
        str(tmp_path / "runs"),
        cwd=fill(tmp_path / "own"),
        HF_HUB_OFFLINE="1",
    )
    assert code == 0, output
    assert (tmp_path / "runs" / "tiny" / "report.html").exists()


def set_api(source: str, api: str, folder: Path) -> tuple[dict[str, str], str]:
    """Set PREFECT_API_URL in one of Prefect's sources; return environment variables and the text that names the source."""
    home = folder / "home"
    home.mkdir()
    variables = {"PREFECT_HOME": str(home)}
    if source == "environment":
        return variables | {"PREFECT_API_URL": api}, "set in the environment"
    if source == ".env":
        (folder / ".env").write_text(f"PREFECT_API_URL={api}\n")
        return variables, str(folder / ".env")
    if source == "prefect.toml":
        (folder / "prefect.toml").write_text(f'[api]\nurl = "{api}"\n')
        return variables, str(folder / "prefect.toml")
    if source == "pyproject.toml":
        (folder / "pyproject.toml").write_text(f'[tool.prefect.api]\nurl = "{api}"\n')
        return variables, str(folder / "pyproject.toml")
    (home / "profiles.toml").write_text(f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{api}"\n')
    return variables, f"the profile mine of {home / 'profiles.toml'}"


@pytest.mark.parametrize(
    "source",
    [
        "profile",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("environment", ".env", "prefect.toml", "pyproject.toml")
        ),
    ],
)
def test_place_of_prefect_address_is_named(tmp_path: Path, source: str) -> None:
    api = f"http://127.0.0.1:{free_port()}/api"
    environment, place = set_api(source, api, tmp_path)
    code = "import flows.prefect_api as p; from prefect.settings import PREFECT_API_URL; p.check_api(PREFECT_API_URL.value())"
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | environment
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    message = outcome.stderr.splitlines()[-1]
    assert f"PREFECT_API_URL is {api}, but no Prefect server answers there" in message
    assert place in message


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "up", "deploy"])
def test_missing_prefect_server_is_one_sentence(talking_llama: Path, tmp_path: Path, command: str) -> None:
    api = f"http://127.0.0.1:{free_port()}/api"
    environment, place = set_api("environment", api, tmp_path)
    arguments = {"run": ["run", str(configuration(tmp_path, talking_llama))], "deploy": ["deploy", "--pool", "p"]}
    code, output = call(*arguments.get(command, [command]), cwd=tmp_path, **environment)
    assert code == 1
    assert f"error: PREFECT_API_URL is {api}, but no Prefect server answers there" in output
    assert place in output
    assert "Traceback" not in output


@pytest.mark.parametrize("command", ["up", *(pytest.param(name, marks=pytest.mark.slow) for name in ("run", "deploy"))])
def test_socks_proxy_without_its_package_is_one_sentence(talking_llama: Path, tmp_path: Path, command: str) -> None:
    arguments = {"run": ["run", str(configuration(tmp_path, talking_llama))], "deploy": ["deploy", "--pool", "p"]}
    code, output = call(*arguments.get(command, [command]), cwd=tmp_path, all_proxy="socks5://me:secret@127.0.0.1:9")
    assert code == 1
    assert "error: ALL_PROXY is socks5://127.0.0.1:9, a SOCKS proxy" in output
    assert "pip install socksio" in output
    assert "secret" not in output
    assert "Traceback" not in output


def test_other_server_is_not_prefect(tmp_path: Path) -> None:
    """An address without /api: Prefect's pages answer it."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = {"/api/health": 503, "/login/health": 401}.get(self.path, 200)
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert "ends in /api" in str(problem_of(url))
    assert "not ready (503)" in str(problem_of(f"{url}/api"))
    assert problem_of(f"{url}/login") is None
    server.shutdown()
    server.server_close()
    assert "no Prefect server answers" in str(problem_of("http://no such host"))
    assert "no Prefect server answers" in str(problem_of(url))


def test_server_behind_login_proxy_gets_headers() -> None:
    """The proxy redirects requests without its header to a page, as those of sites do; a slash ends the address."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("CF-Access-Client-Id") == "mine"
            status = (
                200 if (known and self.path == "/api/health") or self.path == "/login" else 302 if not known else 404
            )
            self.send_response(status)
            self.send_header("Location", "/login")
            self.send_header("Content-Type", "application/json" if known else "text/html")
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = f"http://127.0.0.1:{server.server_port}/api/"
        assert "not Prefect's API" in str(problem_of(api))
        with temporary_settings({PREFECT_CLIENT_CUSTOM_HEADERS: {"CF-Access-Client-Id": "mine"}}):
            assert problem_of(api) is None
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["its own", "a site's"])
def test_run_that_loses_its_server_says_so(talking_llama: Path, tmp_path: Path, own: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PREFECT_HOME": str(home), "PREFECT_CLIENT_MAX_RETRIES": "0"}
    with ExitStack() as server:
        if not own:
            environment |= server.enter_context(prefect_server(home, kill=True))

        def end_server() -> None:
            wait_until(lambda: list((tmp_path / "runs").rglob("ledger.json")), 600)
            server.close()
            for process in psutil.process_iter(["cmdline", "environ"]):
                command, home_of = process.info["cmdline"] or [], (process.info["environ"] or {}).get("PREFECT_HOME")
                if own and "flows.temporary_server" in command and home_of == str(home):
                    process.kill()

        threading.Thread(target=end_server, daemon=True).start()
        code, output = call("run", str(configuration(tmp_path, talking_llama)), cwd=tmp_path, **environment)
    assert code == 1, output
    assert "error: the run lost its Prefect server at http://127.0.0.1:" in output
    assert "/api: no Prefect server answers" in output
    assert "montessori resume" in output


@pytest.mark.slow
@pytest.mark.guarantee("disk full")
def test_run_whose_database_is_full_says_so(talking_llama: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(home)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")

    def fill() -> None:
        wait_until(lambda: list((tmp_path / "runs").rglob("ledger.json")), 600)
        with suppress(OSError), (home / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        threading.Thread(target=fill, daemon=True).start()
        config = str(configuration(tmp_path, talking_llama))
        code, output = call("run", config, cwd=tmp_path, PREFECT_HOME=str(home))
        assert code == 1, output
        last = output[output.rindex("error: ") :]
        assert "Prefect's server could not record the run" in last
        assert "see whether the disk with its database is full" in last
        assert "montessori resume" in last
        assert "Traceback" not in last
        (home / "filling").unlink()
        code, output = call("run", config, cwd=tmp_path, PREFECT_HOME=str(home))
        assert code == 0, output
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)

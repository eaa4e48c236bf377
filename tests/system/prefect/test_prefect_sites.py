"""Prefect as a site runs it: behind TLS and a login, restarted in the middle of a stage, upgraded."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from support.postgresql import postgresql
from support.prefect_server import free_port, prefect_server
from support.runs import await_job, call, configuration, digests, kill_everything, left_over, montessori
from support.tls import TlsProxy

pytestmark = pytest.mark.timeout(1800)
LOGIN = "group:a-login-for-tests"
OLDER = ("prefect==3.8.8", "fastapi<0.150")
"""A version of Prefect with another schema of its database, and of a package whose newest version it cannot use."""


@pytest.mark.guarantee("runs started on your Prefect server")
def test_server_behind_tls_and_a_login_needs_both_settings(tmp_path: Path) -> None:
    """The last error is of the server itself: commands reach it."""
    home = tmp_path / "server"
    home.mkdir()
    port = free_port()
    proxy = TlsProxy(tmp_path, port)
    client = {"PREFECT_API_URL": f"https://localhost:{proxy.port}/api"}
    trusted = {"PREFECT_API_SSL_CERT_FILE": str(proxy.certificate)}
    login = {"PREFECT_API_AUTH_STRING": LOGIN}
    with prefect_server(home, port, PREFECT_SERVER_API_AUTH_STRING=LOGIN):
        for settings, words in (
            (client | login, "set PREFECT_API_SSL_CERT_FILE to the file of the authority that signed it"),
            (client | trusted, "set PREFECT_API_AUTH_STRING=user:password"),
            (client | trusted | login, "has no work pool 'absent'"),
        ):
            code, output = call("deploy", "--pool", "absent", cwd=tmp_path, **settings)
            assert (code, words in output, "Traceback" in output) == (1, True, False), output
    proxy.close()


@pytest.mark.slow
@pytest.mark.guarantee("Prefect server killed in the middle of a stage")
def test_run_on_server_behind_tls_and_login(finished_run: Path, talking_llama: Path, tmp_path: Path) -> None:
    """Its certificate is the site's own. The server is killed and started again while a job runs."""
    home = tmp_path / "server"
    home.mkdir()
    config = configuration(tmp_path, talking_llama)
    port = free_port()
    proxy = TlsProxy(tmp_path, port)
    client = {"PREFECT_API_URL": f"https://localhost:{proxy.port}/api"}
    trusted = {"PREFECT_API_SSL_CERT_FILE": str(proxy.certificate)}
    login = {"PREFECT_API_AUTH_STRING": LOGIN}
    run = tmp_path / "runs" / "tiny"
    warmup = run / "iteration-1" / "warmup"
    with prefect_server(home, port, kill=True, PREFECT_SERVER_API_AUTH_STRING=LOGIN):
        driver = montessori("run", str(config), cwd=tmp_path, **client, **trusted, **login)
        await_job(driver, warmup)
    time.sleep(5)
    with prefect_server(home, port, PREFECT_SERVER_API_AUTH_STRING=LOGIN):
        output, _ = driver.communicate(timeout=600)
    proxy.close()
    assert driver.returncode == 0, output
    assert len(Ledger(warmup / "jobs").submissions) == 1
    assert digests(run) == digests(finished_run / "runs" / "tiny")
    assert not left_over(tmp_path)


@pytest.mark.slow
@pytest.mark.guarantee("Prefect's database restarted in the middle of a stage")
@pytest.mark.skipif(shutil.which("initdb") is None, reason="PostgreSQL is not installed")
def test_run_survives_a_restart_of_the_database(finished_run: Path, talking_llama: Path, tmp_path: Path) -> None:
    home = tmp_path / "server"
    home.mkdir()
    config = configuration(tmp_path, talking_llama)
    run = tmp_path / "runs" / "tiny"
    warmup = run / "iteration-1" / "warmup"
    with postgresql() as database, prefect_server(home, PREFECT_API_DATABASE_CONNECTION_URL=database.url) as client:
        driver = montessori("run", str(config), cwd=tmp_path, **client)
        await_job(driver, warmup)
        database.stop()
        time.sleep(20)
        database.start()
        output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    ledgers = list(run.rglob("jobs/ledger.json"))
    assert ledgers
    assert all(len(Ledger(path.parent).submissions) == 1 for path in ledgers)
    assert digests(run) == digests(finished_run / "runs" / "tiny")
    assert not left_over(tmp_path)


@pytest.fixture(scope="module")
def older_prefect(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with an older version of Prefect, from the package index."""
    folder = tmp_path_factory.mktemp("older-prefect")
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *OLDER], check=True)
    return python


@pytest.mark.slow
@pytest.mark.guarantee("Prefect server upgraded between start and resume")
def test_run_resumes_on_an_upgraded_server(
    finished_run: Path, talking_llama: Path, older_prefect: str, tmp_path: Path
) -> None:
    """The newer server takes over the older one's database; drivers have the newer version from the start."""
    home = tmp_path / "server"
    home.mkdir()
    config = configuration(tmp_path, talking_llama)
    run = tmp_path / "runs" / "tiny"
    with prefect_server(home, python=older_prefect) as client:
        driver = montessori("run", str(config), cwd=tmp_path, **client)
        await_job(driver, run / "iteration-1" / "influence")
        kill_everything(driver, signal.SIGKILL)
    finished = (run / "iteration-1" / "warmup" / "jobs" / "ledger.json").read_bytes()
    with prefect_server(home) as client:
        code, output = call("resume", str(run), cwd=tmp_path, **client)
    assert code == 0, output
    assert digests(run) == digests(finished_run / "runs" / "tiny")
    assert (run / "iteration-1" / "warmup" / "jobs" / "ledger.json").read_bytes() == finished
    assert not left_over(tmp_path)

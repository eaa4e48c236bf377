"""The batch script of a driver's job, and what is refused before it is submitted."""

import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED, temporary_settings

from cluster.backends.sbatch import DRIVER_JOB, sbatch_command
from cluster.driver_job import _requeue, script_of
from cluster.lock import Driver, _interrupt, _write, driver_of, only_driver
from flows.cli.interrupt import _open_api
from flows.driver_job import check_driver_job, drive_by_job
from flows.experiment import montessori
from montessori_core.config import Cluster, Slurm, parse, read_experiment
from montessori_core.config.slurm import DriverJob
from montessori_core.errors import ConfigError, UserError
from montessori_core.files import read_json, write_json
from support.runs import call, configuration, invoke
from support.slurm_lab import put_command
from tasks.run import open_run, reopen_run

SLURM = Slurm(
    partition="gpu", account="project", qos="normal", driver=DriverJob(partition="cpu", setup=("module load x",))
)


def options_of(script: str) -> list[str]:
    """Return the options of sbatch in a script."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)]


def test_driver_script_has_settings() -> None:
    folder = Path("/runs of mine/50%/tiny")
    script = script_of(folder, "montessori-driver-1", ["resume", str(folder)], {"SET": "a b"}, SLURM)
    options = options_of(script)
    for option in (
        "partition=cpu",
        "account=project",
        "qos=normal",
        "mem=8GB",
        "time=1440",
        "signal=B:USR1@90",
        "requeue",
    ):
        assert f"--{option}" in options
    assert "--output=/runs of mine/50%%/tiny/driver.log" in options
    lines = script.splitlines()
    assert lines.index("module load x") < lines.index("export SET='a b'")
    assert f"export {DRIVER_JOB}=montessori-driver-1" in lines
    assert shlex.split(lines[-1])[-2:] == ["resume", str(folder)]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_driver_options_follow_settings() -> None:
    driver = DriverJob(
        memory_gb=None, time_limit_minutes=2, extra={"reservation": "a b", "exclusive": True, "hold": False}
    )
    options = options_of(script_of(Path("/run"), "name", [], {}, Slurm(driver=driver)))
    assert "--reservation=a b" in options
    assert "--exclusive" in options
    assert "--signal=B:USR1@30" in options
    assert not {word.partition("=")[0] for word in options} & {"--mem", "--hold", "--partition", "--account", "--qos"}


def test_driver_in_job_drops_its_variables(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/sh\n#SBATCH --ntasks=1\n")
    names = ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT", DRIVER_JOB)
    of_job = dict.fromkeys(names, "1")
    command = sbatch_command(tmp_path / "job.sh", of_job | {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine"})
    assert [f"--unset={name}" for name in sorted(of_job)] == command[1:-3]
    assert command[-3:] == ["sbatch", "--ntasks=1", str(tmp_path / "job.sh")]


@pytest.mark.parametrize("option", ["time", "--mem", "cpus_per_task", "signal", "requeue", "partition", "output"])
def test_driver_option_of_a_setting_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=r"slurm\.driver: extra: .*: sbatch would get this option twice"):
        parse(Cluster, {"slurm": {"driver": {"extra": {option: "1"}}}}, "test")


def test_driver_job_needs_slurm_profile(tiny_llama: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_llama)
    code, output = invoke("run", str(config), "--submit-driver", cwd=tmp_path)
    assert code == 1
    assert "cluster.profile is local" in output
    assert "profile: slurm" in output
    assert not (tmp_path / "runs").exists()


def test_driver_job_needs_reachable_prefect_server(tiny_llama: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(configuration(tmp_path, tiny_llama).read_text()) | {"cluster": {"profile": "slurm"}}
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(content))
    command = ["run", str(tmp_path / "slurm.yaml"), "--submit-driver"]
    code, output = call(*command, cwd=tmp_path, PREFECT_API_URL="http://127.0.0.1:4200/api")
    assert code == 1
    assert "PREFECT_API_URL is http://127.0.0.1:4200/api, which the nodes of the cluster cannot reach" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("profile", "approve", "reason"),
    [
        ("local", False, "submit_driver: cluster.profile is local"),
        ("slurm", True, "a driver's job cannot wait for approval"),
        ("slurm", False, "the nodes of the cluster cannot reach this Prefect server, http://127.0.0.1:4200/api"),
    ],
)
def test_driver_job_of_flow_run_is_refused(profile: str, approve: bool, reason: str) -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}),
        pytest.raises(UserError, match=re.escape(reason)),
    ):
        check_driver_job(Cluster(profile=profile), approve)


def test_scheduled_run_without_driver_makes_no_folder(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = read_experiment(configuration(tmp_path, tiny_llama))
    with pytest.raises(UserError, match="cluster.profile is local"):
        montessori.fn(experiment, add_iterations=1, submit_driver=True)
    assert not (tmp_path / "runs").exists()


def test_driver_that_fails_leaves_no_record(tmp_path: Path) -> None:
    def drive() -> None:
        with only_driver(tmp_path):
            assert read_json(tmp_path / "driver.lock")["process"] == os.getpid()
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        drive()
    assert (tmp_path / "driver.lock").read_text() == ""
    assert driver_of(tmp_path) is None


def test_driver_job_is_requeued_when_the_controller_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = tmp_path / "failures"
    put_command(tmp_path / "bin" / "scontrol", f'echo "$@" >>{failures}; [ "$(wc -l <{failures})" -gt 2 ]')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr("cluster.driver_job._REQUEUE_PAUSE", 0.01)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        _requeue("17")
        assert failures.read_text() == 3 * "requeue 17\n"
        put_command(tmp_path / "bin" / "scontrol", "exit 1")
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # Slurm ends the job
        _requeue("17")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Restarting(http.server.BaseHTTPRequestHandler):
    """Prefect's API: its server is not ready at first, then its database."""

    answers: ClassVar[list[tuple[int, object]]] = []

    def do_GET(self) -> None:
        status, content = self.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_driver_job_waits_for_prefect_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.prefect_api._PAUSE", 0.01)
    with http.server.HTTPServer(("127.0.0.1", 0), _Restarting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = f"http://127.0.0.1:{server.server_port}/api"
        with temporary_settings({PREFECT_API_URL: api, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False}):
            _Restarting.answers = [(503, None), (200, True), (500, "no database"), (200, True), (200, [])]
            monkeypatch.setenv(DRIVER_JOB, "montessori-driver-1")
            assert _open_api() == api
            assert _Restarting.answers == []
            _Restarting.answers = [(200, True), (500, "no database")]
            monkeypatch.delenv(DRIVER_JOB)
            with pytest.raises(UserError, match="is not ready"):
                _open_api()
        server.shutdown()


def test_interrupting_an_ended_driver_is_no_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert _interrupt(Driver(process=ended.pid, host=socket.gethostname()))


def test_unknown_state_of_driver_job_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job may still be in the queue, so that a second driver is refused."""
    put_command(tmp_path / "bin" / "squeue", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    write_json(Driver(job="17", job_name="montessori-driver-1").model_dump(), tmp_path / "driver.lock")
    with pytest.raises(UserError, match=r"Slurm job 17: squeue does not answer.* remove .*driver\.lock"):
        driver_of(tmp_path)
    with pytest.raises(UserError, match="Slurm job 17: squeue does not answer"), only_driver(tmp_path):
        pass


def test_copied_run_lacks_the_original_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(tmp_path / "bin" / "squeue", 'echo "17|PENDING|Priority"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    run = tmp_path / "run"
    run.mkdir()
    with (run / "driver.lock").open("a+") as lock:
        _write(lock, Driver(job="17", job_name="montessori-driver-1"))
    (tmp_path / "link").symlink_to(run)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert driver_of(run) is not None
    assert driver_of(tmp_path / "link") is not None
    assert driver_of(copy) is None
    with only_driver(copy):
        pass
    assert driver_of(run) is not None
    assert driver_of(run.rename(tmp_path / "moved")) is not None


def driven_by_job(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run of one iteration whose driver's job is in the queue, and has left it when squeue is asked again.

    sbatch, for the next driver, writes the files of two finished iterations.
    """
    run = open_run(read_experiment(configuration(folder, model)), folder / "run")[0].folder
    with (run / "driver.lock").open("a+") as lock:
        _write(lock, Driver(job="17", job_name="montessori-driver-1"))
    (folder / "queued").touch()
    put_command(
        folder / "bin" / "squeue", f'[ -e {folder}/queued ] && rm {folder}/queued && echo "17|RUNNING|n1"; true'
    )
    finish = f"cd {run} && mkdir -p iteration-1 iteration-2 && touch report.html iteration-1/metrics.json"
    put_command(folder / "bin" / "sbatch", f"{finish} iteration-2/metrics.json ../submitted; echo 18")
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    return run


def drive(run: Path, iterations: int) -> None:
    """Drive a run by a job with this number of iterations, as a flow run does."""
    experiment = reopen_run(run).experiment.model_copy(update={"iterations": iterations})
    with disable_run_logger():
        drive_by_job(run, lambda: open_run(experiment, run), ["resume", str(run)], SLURM)


def test_flow_run_applies_settings_after_an_earlier_driver(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's job was submitted for fewer iterations."""
    run = driven_by_job(tmp_path, tiny_llama, monkeypatch)
    (run / "iteration-1").mkdir()
    for name in ("iteration-1/metrics.json", "report.html"):
        (run / name).touch()
    drive(run, 2)
    assert reopen_run(run).experiment.iterations == 2
    assert (tmp_path / "submitted").exists()
    (tmp_path / "submitted").unlink()
    drive(run, 2)
    assert not (tmp_path / "submitted").exists()  # finished


def test_flow_run_submits_no_driver_after_a_failed_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may have cancelled it."""
    run = driven_by_job(tmp_path, tiny_llama, monkeypatch)
    with pytest.raises(UserError, match="the driver's job has ended before run was finished"):
        drive(run, 2)
    assert not (tmp_path / "submitted").exists()

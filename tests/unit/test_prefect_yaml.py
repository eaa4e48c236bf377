"""Prefect without its server: deployments in `prefect.yaml` and their configurations, cancellation, served reports."""

import threading
from contextlib import suppress
from datetime import timedelta
from http.client import HTTPConnection
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_HOME, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings
from rich.console import Console

from flows import evaluation, experiment, tailor
from flows.deployments import warn_of_job_variables
from flows.local_server import served_reports
from flows.prefect_server import host_database
from flows.prefect_yaml import find_deployments, read_deployments
from montessori_core.config import Study, read_study
from montessori_core.errors import ConfigError, UserError
from support import CONFIGS, ROOT
from tasks.resume import RUN_ROOT


def written(folder: Path, **deployment: Any) -> Path:
    path = folder / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [{"name": "mine", **deployment}]}))
    return path


def test_shipped_deployments_match_configurations() -> None:
    short, *experiments, evaluation, study = read_deployments(ROOT / "flows" / "prefect.yaml")
    assert short["parameters"] == {"tailored": {"name": "tailored"}}
    for deployment in (*experiments, evaluation):
        config = CONFIGS / f"{'evaluation' if deployment is evaluation else deployment['name']}.yaml"
        assert deployment["parameters"]["experiment"] == yaml.safe_load(config.read_text())
    for deployment in experiments:
        assert deployment["parameters"].keys() == {"experiment"}
        assert deployment["concurrency_limit"].limit == 1
    shipped = read_study(CONFIGS / "studies" / "quickstart.yaml")
    assert Study.model_validate(study["parameters"]["study"]) == shipped
    assert study["concurrency_limit"].limit == 1


def test_invalid_deployment_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [{"name": "mine", "parameters": {"experiment": {"seed": -1}}}]}))
    with pytest.raises(ConfigError, match=r"(?s)deployment 'mine'.*seed.*teacher: missing"):
        read_deployments(path)


def test_config_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "mine.yaml").write_text("{name: other, teacher: {model: t}, student: {model: s}}")
    [deployment] = read_deployments(written(tmp_path, config="mine.yaml", parameters={"approve": True}))
    experiment = {"name": "other", "teacher": {"model": "t"}, "student": {"model": "s"}}  # no defaults
    assert deployment["parameters"] == {"approve": True, "experiment": experiment}
    assert "config" not in deployment
    (tmp_path / "study.yaml").write_text("{experiment: mine.yaml, seeds: [5]}")
    path = written(tmp_path, config="study.yaml", entrypoint="flows/study.py:compare")
    [deployment] = read_deployments(path)
    assert deployment["parameters"] == {"study": {"experiment": experiment, "seeds": [5]}}


@pytest.mark.parametrize(
    ("deployment", "message"),
    [
        ({}, "set either config .* or parameters.experiment"),
        ({"config": "quickstart", "parameters": {"experiment": {}}}, "set either config .* or parameters.experiment"),
        ({"config": "quikstart"}, "config: .*quikstart: no such file, and no preset .* paper-1b, paper-8b, quickstart"),
        ({"config": "paper-8b", "entrypoint": "flows/study.py:compare"}, "config: .*no preset .*: laptop, quickstart"),
        ({"config": ["quickstart"]}, "config: .*no such file, and no preset"),
        ({"config": "quickstart", "entrypoint": "flows/x.py:y"}, "no entrypoint 'flows/x.py:y'"),
        ({"config": "quickstart", "schedules": [{"rrule": "FREQ=DAILY"}]}, "schedules: .*set either cron, or interval"),
        ({"config": "quickstart", "schedules": [{"cron": "0 20 * * 9"}]}, "schedules: .*cron: .*Invalid cron string"),
        (
            {"config": "quickstart", "schedules": [{"cron": "0 20 * * 5", "timezone": "Europe/Berln"}]},
            "schedules: .*timezone: .*Europe/Berln",
        ),
        ({"config": "quickstart", "schedules": [{"interval": "daily"}]}, "schedules: .*interval: .*valid timedelta"),
        ({"config": "quickstart", "schedules": [{"interval": 0}]}, "schedules: .*interval: .*greater than"),
        (
            {"config": "quickstart", "schedules": [{"interval": 60, "active": "perhaps"}]},
            "schedules: .*active: .*boolean",
        ),
        (
            {"config": "quickstart", "schedules": [{"interval": 60, "parameters": {"add_iterations": 1}}]},
            "schedules: .*no setting 'parameters'; available: cron, interval, timezone, active",
        ),
        ({"config": "quickstart", "schedules": {"interval": 60}}, "schedules must be a list"),
        (
            {"config": "quickstart", "schedule": [{"interval": 60}]},
            "no setting 'schedule'; available: name, .*schedules",
        ),
        (
            {"config": "quickstart", "concurrency_limit": {"limit": 1, "collision_strategy": "QUEUE"}},
            "concurrency_limit: .*collision_strategy: .*'ENQUEUE' or 'CANCEL_NEW'",
        ),
        (
            {"config": "quickstart", "concurrency_limit": {"limit": 1, "strategy": "ENQUEUE"}},
            "concurrency_limit: .*'strategy'",
        ),
        ({"config": "quickstart", "concurrency_limit": "one"}, "concurrency_limit: one: set a number"),
        ({"config": "quickstart", "tags": "montessori"}, "tags must be a list"),
    ],
)
def test_bad_deployment_is_refused(deployment: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"prefect.yaml, deployment 'mine': {message}"):
        read_deployments(written(tmp_path, **deployment))


def test_schedules_and_limits_are_prefects(tmp_path: Path) -> None:
    schedules = [{"cron": "0 20 * * 5", "timezone": "Europe/Berlin"}, {"interval": 86400, "active": False}]
    path = written(tmp_path, config="quickstart", schedules=schedules, concurrency_limit=2)
    [deployment] = read_deployments(path)
    weekly, daily = deployment["schedules"]
    assert (weekly.schedule.cron, weekly.schedule.timezone, weekly.active) == ("0 20 * * 5", "Europe/Berlin", True)
    assert (daily.schedule.interval, daily.active) == (timedelta(days=1), False)
    assert deployment["concurrency_limit"] == 2


def test_deployment_without_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefect.yaml, deployment None: name must be a text"):
        read_deployments(written(tmp_path, name=None, config="quickstart"))


@pytest.mark.parametrize(
    ("module", "parameters", "name"),
    [
        (experiment, {"experiment": {"teacher": {"model": "t"}, "student": {"model": "s"}}}, "experiment"),
        (tailor, {"tailored": {}}, "tailored"),
        (evaluation, {"model": "m"}, "evaluation"),
    ],
)
def test_cancelled_flow_run_may_lack_a_name(
    module: ModuleType, parameters: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect gives a hook the parameters of the flow run without their defaults."""
    monkeypatch.setenv(RUN_ROOT, str(tmp_path))
    with pytest.raises(UserError, match=rf"{tmp_path / name}: not a run"):
        module.end_jobs(None, FlowRun(flow_id=uuid4(), parameters=parameters), None)


def test_server_of_reports_ends_after_an_error(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with suppress(UserError), served_reports(tmp_path, 0):
        (thread,) = set(threading.enumerate()) - before
        raise UserError("the Prefect server did not start")
    thread.join(10)
    assert not thread.is_alive()


def test_pages_of_runs_and_studies_are_served_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("report.html", "comparison.html", "config.yaml"):
        (tmp_path / "mine" / name).write_text(name)
    (tmp_path / "report.html").write_text("outside")
    served = {}
    with served_reports(tmp_path, 0) as url:
        for path in ("mine/report.html", "mine/comparison.html", "mine/config.yaml", "../report.html", "mine/", "mine"):
            connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
            connection.request("GET", f"/{path}")
            answer = connection.getresponse()
            served[path] = answer.read().decode() if answer.status == 200 else answer.status
            connection.close()
    pages = {f"mine/{name}": name for name in ("report.html", "comparison.html")}
    assert served == pages | dict.fromkeys(("mine/config.yaml", "../report.html", "mine/", "mine"), 404)


def test_up_warns_of_job_variables(tmp_path: Path) -> None:
    shown = StringIO()
    console = Console(file=shown, width=500)
    warn_of_job_variables(read_deployments(written(tmp_path, config="quickstart")), console)
    assert shown.getvalue() == ""
    path = written(tmp_path, config="quickstart", job_variables={"env": {"A": "b"}})
    warn_of_job_variables(read_deployments(path), console)
    assert "montessori up ignores job_variables (of mine), which are for workers" in shown.getvalue()


def test_shipped_file_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_deployments() == ROOT / "flows" / "prefect.yaml"
    written(tmp_path, config="quickstart")
    assert find_deployments() == Path("prefect.yaml")


def test_hosts_that_share_a_home_have_own_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first with `montessori up` keeps Prefect's default one: its runs are in it. A run alone takes it from nobody."""

    def database_on(host: str, claim: bool = False) -> dict[str, str]:
        monkeypatch.setattr("flows.prefect_server.socket.gethostname", lambda: host)
        return host_database(claim)

    own = f"sqlite+aiosqlite:///{tmp_path / 'prefect-login2.db'}"
    with temporary_settings({PREFECT_HOME: tmp_path}):
        assert database_on("login1", claim=True) == {}  # of a disk of this machine
        mount = SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")
        monkeypatch.setattr("flows.prefect_server.psutil.disk_partitions", lambda all: [mount])
        assert [database_on("node1"), database_on("login1", claim=True), database_on("login1")] == 3 * [{}]
        assert database_on("login2", claim=True) == {"PREFECT_SERVER_DATABASE_CONNECTION_URL": own}
        with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: "postgresql+asyncpg://server/prefect"}):
            assert database_on("login2") == {}

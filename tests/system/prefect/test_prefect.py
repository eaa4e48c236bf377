"""Prefect's UI: a real server, real runs of a tiny model, and a browser."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from playwright.sync_api import Browser, Page, expect

from cluster.ledger import Ledger
from flows.prefect_server import starting_server
from support import ROOT
from support.prefect_server import CANARY, ENDS, Inbox, Server, free_port, prefect_server, wait_until
from support.runs import configuration, digests, job_ids

expect.set_options(timeout=30_000)
SCREENSHOTS = os.environ.get("MONTESSORI_SCREENSHOTS")
"""Folder for the pictures of docs/prefect.md; without it, none are taken."""


@pytest.fixture(scope="module")
def server(
    finished_run: Path, talking_llama: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("prefect").resolve()
    shutil.copytree(finished_run / "prefect", folder / "prefect")  # a database takes seconds to make
    content = yaml.safe_load(configuration(folder, talking_llama).read_text())
    whole = yaml.safe_load((finished_run / "tiny.yaml").read_text())
    content["comparison"] = {"unmodified_teacher": False, "influence_examples": 0}  # halves the time
    content["synthesis"]["oversampling"] = 3.0  # one round suffices
    limit = {"limit": 1, "collision_strategy": "ENQUEUE"}
    deployments = [
        {"name": "tiny", "parameters": {"experiment": content}, "tags": ["montessori"]},
        {"name": "whole", "parameters": {"experiment": whole}},
        {"name": "quickstart", "config": "quickstart"},
        {"name": "alone", "parameters": {"experiment": content}, "concurrency_limit": limit},
        {
            "name": "nightly",
            "parameters": {"experiment": content | {"name": "nightly"}},
            "concurrency_limit": limit,
            "schedules": [{"interval": 20, "active": False}],
        },
        {
            "name": "short",
            "entrypoint": "flows/tailor.py:tailor",
            "parameters": {"tailored": {"teacher": str(talking_llama), "student": str(tiny_llama)}},
        },
        {
            "name": "study",
            "entrypoint": "flows/study.py:compare",
            "parameters": {
                "study": {
                    "name": "study",
                    "experiment": content,
                    "methods": ["self_instruct"],
                    "transfer": [{"model": str(tiny_llama), "max_length": 128}],
                    "seeds": [0],
                }
            },
        },
    ]
    running = Server(folder, deployments)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGINT)
        try:
            running.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.process.pid, signal.SIGKILL)
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if f"--port {running.port}" in " ".join(p.info["cmdline"] or [])
    ]


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new page."""
    window = browser.new_page(viewport={"width": 1400, "height": 1000})
    window.set_default_timeout(60_000)
    if not SCREENSHOTS:
        window.route("**/graph-v2*", lambda route: route.abort())  # drawing the graph takes most of a core
    yield window
    window.close()


def leave(page: Page) -> None:
    """Leave the page of a run: redrawing its graph takes most of a core."""
    page.goto("about:blank")


_SHORTEN_PATHS = """folders => {
    const shorten = text => folders.reduce((text, folder) => text.replaceAll(folder, "~"), text);
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) texts.currentNode.data = shorten(texts.currentNode.data);
    for (const field of document.querySelectorAll("input, textarea")) field.value = shorten(field.value);
}"""
"""Leaves the folders of this machine out of a picture."""


def photograph(page: Page, name: str, height: int = 1000) -> None:
    if SCREENSHOTS:
        page.wait_for_timeout(2000)  # animations
        folders = [*(str(folder) for folder in Path(tempfile.gettempdir()).glob("pytest-of-*/*/*")), str(Path.home())]
        page.evaluate(_SHORTEN_PATHS, folders)
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", clip={"x": 0, "y": 0, "width": 1400, "height": height})


@pytest.fixture(scope="module")
def finished(server: Server) -> str:
    """An uninterrupted run."""
    run = server.start("tiny", "finished")
    server.wait_for(run, "Completed")
    return run


def test_second_up_finds_running_server(server: Server) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "flows.cli", "up"],
        cwd=server.folder,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"already running: {server.url}" in again.stdout


@pytest.mark.slow
def test_up_finds_server_that_another_started_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    (tmp_path / "prefect.yaml").write_text("deployments:\n- {name: small, config: quickstart}\n")
    log, port = tmp_path / "up.log", free_port()
    with ExitStack() as servers:
        with starting_server(), log.open("w") as output:
            up = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "up", "--file", "prefect.yaml", "--port", str(port)],
                cwd=tmp_path,
                stdout=output,
                stderr=output,
            )
            servers.callback(up.kill)
            opened = psutil.Process(up.pid).open_files
            wait_until(lambda: any(file.path.endswith("server.lock") for file in opened()), 60, log.read_text)
            servers.enter_context(prefect_server(tmp_path, port))
        wait_until(lambda: f"Prefect: http://127.0.0.1:{port}" in log.read_text(), 60, log.read_text)
        up.send_signal(signal.SIGINT)
        up.wait(60)
    assert not list((tmp_path / "runs").glob(".montessori-*/server.log"))


@pytest.mark.guarantee("requests from other web pages")
def test_server_refuses_other_origins(server: Server) -> None:
    def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/api/deployments/filter", b"{}", headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.headers["Access-Control-Allow-Origin"]

    assert allowed("http://elsewhere.example") is None
    assert allowed(server.url) == server.url


@pytest.mark.guarantee("runs started on your Prefect server")
def test_server_without_login_warns(server: Server) -> None:
    assert "no login: whoever has an account on this machine" in (server.folder / "up.log").read_text()


@pytest.mark.parametrize(
    ("flow", "deployment", "least"), [("montessori", "tiny", 16), ("compare", "study", 16), ("tailor", "short", 1)]
)
def test_form_explains_every_field(server: Server, flow: str, deployment: str, least: int) -> None:
    schema = server.deployment(deployment, flow)["parameter_openapi_schema"]
    sections = [name for name in schema["definitions"] if "properties" in schema["definitions"][name]]
    assert len(sections) >= least
    for section in sections:
        for name, field in schema["definitions"][section]["properties"].items():
            described = field if "$ref" not in field else schema["definitions"][field["$ref"].rpartition("/")[2]]
            assert field.get("description", described.get("description")), f"{section}.{name}"


def test_form_refuses_invalid_values(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.start("tiny", "bad", experiment={"iterations": 0})
    assert refusal.value.code in (409, 422)
    assert not (server.runs / "bad").exists()


@pytest.mark.slow
def test_run_shows_stages_artifacts_and_report(server: Server, finished: str, page: Page) -> None:
    expected = {"iteration 1: influence of the probing set, screen", "iteration 1: teacher update", "report"}
    server.wait_for_tasks(finished, expected)
    [iteration, *_] = server.subflows(finished)
    nodes = {node["label"]: node for _, node in server.ask(f"flow_runs/{iteration}/graph-v2")["nodes"]}
    by_id = {node["id"]: label for label, node in nodes.items()}
    upstream = {label: {by_id.get(parent["id"]) for parent in node["parents"]} for label, node in nodes.items()}
    assert "iteration 1: preference pairs" in upstream["iteration 1: teacher update"]
    assert "iteration 1: influence of the probing set: table" in upstream["iteration 1: preference pairs"]
    assert "iteration 1: student warm-up" in upstream["iteration 1: influence of the probing set, screen"]
    page.goto(f"{server.url}/runs/flow-run/{iteration}")
    expect(page.get_by_text("finished: iteration 1").first).to_be_visible()
    photograph(page, "prefect-run")
    kinds = {artifact["type"] for artifact in server.artifacts(finished)}
    assert {"progress", "table", "markdown", "image"} <= kinds
    [report] = [a for a in server.artifacts(finished) if "report.html" in str(a["data"])]
    address = re.search(r"http://127[^)\s\"]+", report["data"])
    assert address is not None
    with urllib.request.urlopen(address[0]) as answer:
        assert answer.read() == (server.runs / "finished" / "report.html").read_bytes()
    for stranger in ("finished/config.yaml", "../prefect.yaml", "finished/../../prefect.yaml"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address[0].rpartition("/finished/")[0] + "/" + stranger)
    logs = server.logs(finished)
    assert "cluster.worker: warmup: shard 0, 4 rows" in logs  # from the training's log
    for shard in range(4):
        assert f"cluster.worker: influence: shard {shard}, 4 rows" in logs
    [path] = set(re.findall(r"log of shards 0 to 3: (.*/iteration-1/influence/jobs/.*)", logs))
    assert Path(path).read_text()


def test_up_runs_many_flows_at_once(server: Server) -> None:
    """More than five, the limit of Prefect's runner. They are suspended and killed before they begin."""
    runs = [server.start("tiny", f"crowd-{number}") for number in range(6)]

    def drivers() -> list[psutil.Process]:
        children = psutil.Process(server.process.pid).children()
        found = [child for child in children if "prefect.engine" in child.cmdline()]
        for driver in found:
            driver.suspend()
        return found

    try:
        wait_until(lambda: len(drivers()) == len(runs), 60)
    finally:
        for driver in drivers():
            driver.kill()
    for run in runs:
        server.wait_for(run, "Crashed")


def test_failure_of_the_runner_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").write_text("deployments:\n- {name: small, config: quickstart}\n")
    (tmp_path / "runner_storage").touch()  # the runner makes a folder of this name
    ended = subprocess.run(
        [sys.executable, "-m", "flows.cli", "up"],
        cwd=tmp_path,
        env=server.environment | {"PREFECT_API_URL": f"{server.url}/api", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "Prefect's runner failed: NotADirectoryError" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def start_in_browser(server: Server, page: Page, name: str) -> str:
    """Start a run with the form of its deployment, which first refuses a number; return its id."""
    page.goto(f"{server.url}/deployments/deployment/{server.deployment('whole')['id']}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    expect(page.get_by_text("Teacher updates, one after the other.")).to_be_visible()
    photograph(page, "prefect-form", height=690)
    iterations = page.locator("input[type=number]").nth(1)
    iterations.fill("0")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("0 is less than the minimum of 1").first).to_be_visible()
    photograph(page, "prefect-refused")
    iterations.fill("1")
    page.locator("textarea").first.fill(name)
    for _ in range(3):  # the form ignores the button while it still shows the refusal
        page.get_by_role("button", name="Submit").click()
        with suppress(AssertionError):
            wait_until(lambda: server.run_named(name) is not None, 30)
            break
    run = server.run_named(name)
    assert run is not None
    leave(page)
    return run


def retry_in_browser(server: Server, page: Page, run: str) -> None:
    page.goto(f"{server.url}/runs/flow-run/{run}")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    wait_until(lambda: server.state(run) != "Failed")
    leave(page)


def open_report_in_browser(server: Server, page: Page, run: str, name: str) -> Page:
    page.goto(f"{server.url}/runs/flow-run/{run}")
    page.get_by_text("Artifacts", exact=True).last.click()
    page.get_by_text(f"Report of {name}").click()
    with page.expect_popup() as popup:
        page.get_by_role("link", name="report.html").click()
    return popup.value


@pytest.fixture(scope="module")
def inbox(server: Server) -> Iterator[Inbox]:
    """A server for the messages of the guide's automations, set up as documented."""
    opened = Inbox()
    block = server.python(
        "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block\n"
        f"block = Block(name='inbox', url={opened.url!r}, json_data={{'text': '{{{{subject}}}}: {{{{body}}}}'}})\n"
        "print(block.save('inbox'))"
    )
    guide = (ROOT / "docs" / "prefect.md").read_text()
    [examples] = re.findall(r"```yaml\n(automations:.*?)```", guide, re.DOTALL)
    examples = examples.replace("<id of a notification block>", block.strip()).replace("threshold: 10", "threshold: 1")
    (server.folder / "automations.yaml").write_text(examples)
    command = [sys.executable, "-m", "prefect", "automation", "create", "--from-file", "automations.yaml"]
    environment = server.environment | {"PREFECT_API_URL": f"{server.url}/api"}
    subprocess.run(command, cwd=server.folder, env=environment, check=True)
    yield opened
    opened.close()


@pytest.mark.guarantee("API keys in logs, tables or databases")
def test_run_is_started_and_retried_in_browser(server: Server, finished_run: Path, inbox: Inbox, page: Page) -> None:
    """A run without influence is continued: a shard fails, the retry computes this shard alone, and the run ends."""
    folder = server.runs / "clicked"
    shutil.copytree(finished_run / "runs" / "tiny", folder)
    influence = folder / "iteration-1" / "influence"
    shutil.rmtree(influence)
    in_the_way = influence / "part-00002.parquet"
    in_the_way.mkdir(parents=True)
    (in_the_way / "file").touch()  # blocks the commit of the shard
    run = start_in_browser(server, page, "clicked")
    server.wait_for(run, "Failed")
    assert server.counts(run)["iteration-1/influence"] == (0, 3, 1)
    assert "1 of 4 shards failed" in server.ask(f"flow_runs/{run}")["state"]["message"]
    wait_until(lambda: "shard 2 (code_error)" in server.logs(run), 60)  # Prefect sends logs every few seconds
    if SCREENSHOTS:
        page.goto(f"{server.url}/runs/flow-run/{server.subflows(run)[0]}")
        photograph(page, "prefect-failed")
        leave(page)
    wait_until(lambda: any("shards fail: iteration 1: influence" in text for text in inbox.messages), 60)
    assert not any("iteration is finished: clicked" in text for text in inbox.messages)
    shutil.rmtree(in_the_way)
    retry_in_browser(server, page, run)
    server.wait_for(run, "Completed")
    counts = server.counts(run)
    assert counts["iteration-1/influence"] == (3, 1, 0)
    assert counts["iteration-1/warmup"] == (1, 0, 0)
    assert digests(folder) == digests(finished_run / "runs" / "tiny")
    wait_until(lambda: any("iteration is finished: clicked" in text for text in inbox.messages), 60)
    expect(open_report_in_browser(server, page, run, "clicked")).to_have_title(re.compile("clicked"))
    check_api_key_is_nowhere(server)


def follow(page: Page, name: str) -> None:
    """Follow a link in the same tab; the old interface opens another one."""
    link = page.get_by_role("link", name=name, exact=True)
    link.evaluate("link => link.target = ''")
    link.click()


def cancel_short_run(server: Server, run: str) -> None:
    server.set_state(run, "CANCELLING")
    server.wait_for(run, "Cancelled", "Failed", seconds=90)  # failed: this model cannot write for the preset's sizes
    wait_until(lambda: not server.jobs(), 60)


@pytest.mark.slow
def test_short_form_shows_its_plan_first(server: Server, talking_llama: Path, page: Page) -> None:
    """The plan links to the full form, filled in with the values of the run."""
    page.goto(f"{server.url}/deployments/deployment/{server.deployment('short', 'tailor')['id']}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    expect(page.locator("textarea")).to_have_count(8)
    expect(page.get_by_role("button", name="None", exact=True)).to_have_count(0)  # no switches between text and None
    photograph(page, "prefect-tailor")
    page.locator("textarea").first.fill("short")
    page.get_by_role("button", name="Submit").click()
    wait_until(lambda: (server.runs / "short").exists())
    leave(page)
    [run] = [run["id"] for run in server.ask("flow_runs/filter", {}) if run["name"] == "short"]
    wait_until(lambda: bool(server.artifacts(run)))
    plan = min(server.artifacts(run), key=lambda artifact: str(artifact["created"]))
    assert plan["description"] == "Plan of short"
    page.goto(f"{server.url}/artifacts/artifact/{plan['id']}")
    expect(page.get_by_role("cell", name="iteration 1: teacher update")).to_be_visible()
    expect(page.get_by_text("on this machine, by its speed")).to_be_visible()
    photograph(page, "prefect-plan")
    for interface in ("", "/v2"):
        page.goto(f"{server.url}{interface}/artifacts/artifact/{plan['id']}")
        follow(page, "the form with every setting")
        expect(page.get_by_text("Teacher updates, one after the other.")).to_be_visible()
        assert f"{interface}/deployments/deployment/{server.deployment('quickstart')['id']}/run?" in page.url
        filled = [field.input_value() for field in page.locator("textarea").all()[:2]]
        assert filled == ["short", str(talking_llama)]
    leave(page)
    cancel_short_run(server, run)


def test_short_form_starts_a_run_in_new_interface(server: Server, page: Page) -> None:
    """In the interface that Prefect is moving to, under /v2."""
    deployment = server.deployment("short", "tailor")
    page.goto(f"{server.url}/v2/deployments/deployment/{deployment['id']}/run")
    fields = deployment["parameter_openapi_schema"]["definitions"]["Tailored"]["properties"]
    for field in fields.values():
        expect(page.get_by_text(field["description"], exact=True)).to_be_visible()
    page.get_by_role("textbox", name="Name (Optional)").fill("new")
    page.get_by_role("button", name="Submit", exact=True).click()
    wait_until(lambda: (server.runs / "new").exists())
    leave(page)
    [run] = [run["id"] for run in server.ask("flow_runs/filter", {}) if run["name"] == "new"]
    cancel_short_run(server, run)


@pytest.mark.parametrize("interface", ["", "/v2"])
def test_short_form_links_to_full_forms(server: Server, page: Page, interface: str) -> None:
    """The new interface shows the texts of a form as they are, so that links are in the deployment's description."""
    page.goto(f"{server.url}{interface}/deployments/deployment/{server.deployment('short', 'tailor')['id']}")
    page.get_by_text("Description", exact=True).first.click()
    links = page.get_by_role("link").filter(has_text=re.compile("^(tiny|whole|quickstart|alone|nightly)$"))
    expect(links).to_have_count(5)
    follow(page, "quickstart")
    expect(page.get_by_text("Teacher updates, one after the other.")).to_be_visible()
    assert page.url == f"{server.url}{interface}/deployments/deployment/{server.deployment('quickstart')['id']}/run"


@pytest.mark.slow
def test_cancelled_run_stops_jobs_and_resumes(server: Server, finished: str, page: Page) -> None:
    folder = server.copy_of(finished, "cancelled", "evaluation")
    run = server.start("tiny", "cancelled")
    server.hold_job()
    page.goto(f"{server.url}/runs/flow-run/{run}")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
    wait_until(lambda: server.state(run) != "Running", 60)
    leave(page)
    wait_until(lambda: not server.jobs(), 60)
    server.wait_for(run, "Cancelled", seconds=90)
    result = Path("iteration-1", "evaluation", "part-00000.parquet")
    assert not (folder / result).exists()
    server.wait_for(server.start("tiny", "cancelled"), "Completed")
    assert (folder / result).read_bytes() == (server.runs / "finished" / result).read_bytes()


@pytest.mark.slow
def test_killed_run_is_crashed_and_retry_finds_jobs(server: Server, finished: str) -> None:
    folder = server.copy_of(finished, "crashed", "warmup")
    run = server.start("tiny", "crashed")
    warmup = folder / "iteration-1" / "warmup"
    wait_until(lambda: job_ids(warmup))
    server.driver(run).kill()
    server.wait_for(run, "Crashed", seconds=120)
    server.set_state(run, "SCHEDULED")
    server.wait_for(run, "Completed")
    assert len(Ledger(warmup / "jobs").submissions) == 1  # the running training was awaited, not started again
    assert digests(folder) == digests(server.runs / "finished")


@pytest.mark.slow
def test_run_waits_for_approval_once(server: Server, finished: str, page: Page) -> None:
    server.copy_of(finished, "approved")
    run = server.start("tiny", "approved", approve=True)
    wait_until(lambda: any(server.state(flow) == "Paused" for flow in server.subflows(run)))
    [paused] = [flow for flow in server.subflows(run) if server.state(flow) == "Paused"]
    schema_key = server.ask(f"flow_runs/{paused}")["state"]["state_details"]["run_input_keyset"]["description"]
    question = str(server.ask(f"flow_runs/{paused}/input/{schema_key}"))
    assert "update the teacher on these pairs?" in question
    assert "**rejected**" in question
    page.goto(f"{server.url}/runs/flow-run/{paused}")
    page.get_by_role("button", name="Resume", exact=True).click()
    expect(page.get_by_text("update the teacher on these pairs?").first).to_be_visible()
    switch = page.get_by_role("dialog").get_by_role("switch")  # the form appears by itself
    expect(switch).not_to_be_checked()
    switch.click()
    expect(switch).to_be_checked()
    photograph(page, "prefect-approval")
    submit = page.get_by_role("button", name="Submit")
    submit.click()
    expect(submit).to_be_hidden()
    leave(page)
    server.wait_for(run, "Completed")
    again = server.start("tiny", "approved", approve=True)
    server.wait_for(again, "Completed")


@pytest.mark.slow
def test_scheduled_run_adds_iterations_without_overlap(server: Server, finished: str) -> None:
    server.copy_of(finished, "weekly")
    runs = [server.start("alone", "weekly", add_iterations=1) for _ in range(2)]
    wait_until(lambda: any(server.state(run) == "Running" for run in runs))
    time.sleep(10)  # time for the other to try
    assert sorted(server.state(run) for run in runs) in (
        ["AwaitingConcurrencySlot", "Running"],
        ["Running", "Scheduled"],
    )
    [running, waiting] = sorted(runs, key=lambda run: server.state(run) != "Running")
    server.set_state(waiting, "CANCELLED")
    server.wait_for(running, "Completed")
    assert (server.runs / "weekly" / "iteration-2" / "metrics.json").exists()
    assert not (server.runs / "weekly" / "iteration-3").exists()


@pytest.mark.slow
def test_schedule_starts_runs(server: Server, finished: str) -> None:
    server.copy_of(finished, "nightly")
    nightly = server.deployment("nightly")
    [schedule] = nightly["schedules"]

    def completed() -> int:
        own = {
            "deployments": {"id": {"any_": [nightly["id"]]}},
            "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        }
        return len(server.ask("flow_runs/filter", own))

    server.ask(f"deployments/{nightly['id']}/schedules/{schedule['id']}", {"active": True}, "PATCH")
    try:
        wait_until(lambda: completed() > 0, 300)
    finally:
        server.ask(f"deployments/{nightly['id']}/schedules/{schedule['id']}", {"active": False}, "PATCH")
    wait_until(lambda: not server.unfinished_runs(nightly["id"]))
    assert digests(server.runs / "nightly") == digests(server.runs / "finished")


@pytest.mark.slow
def test_run_resumes_after_up_ended(server: Server, finished: str) -> None:
    folder = server.copy_of(finished, "interrupted", "warmup")
    run = server.start("tiny", "interrupted")
    server.hold_job()
    server.process.send_signal(signal.SIGTERM)  # like systemd; the fixture uses Ctrl-C
    assert server.process.wait(120) == 0
    assert server.jobs() == []
    assert "stopped; a retried run resumes" in (server.folder / "up.log").read_text().splitlines()[-1]
    server.process = server.up()
    wait_until(lambda: server.state(run) in ENDS, 180)
    assert server.state(run) != "Completed"
    server.set_state(run, "SCHEDULED")
    server.wait_for(run, "Completed")
    assert digests(folder) == digests(server.runs / "finished")


@pytest.mark.slow
def test_study_deployment_runs_transfer_students(server: Server) -> None:
    identity = server.deployment("study", "compare")["id"]
    run = server.ask(f"deployments/{identity}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
    server.wait_for(run, "Completed")
    [table] = [a for a in server.artifacts(run) if a["description"] == "Comparison of methods: study"]
    [row] = json.loads(table["data"])
    assert (row["method"], row["gain"]) == ("self_instruct", 0.0)
    assert any("/study/comparison.html" in str(a["data"]) for a in server.artifacts(run))
    result = json.loads((server.runs / "study" / "comparison.json").read_text())
    [transferred] = result["transfer"]
    # A student with random weights guesses among 4096 tokens; the study's student can only write tasks. The difference
    # depends on the processor that trained the test's model: values from 0.4 to more than 1 occur.
    assert transferred["methods"][0]["held_out_loss"] == pytest.approx(math.log(4096), abs=0.3)
    assert result["methods"][0]["held_out_loss"] > transferred["methods"][0]["held_out_loss"] + 0.1
    page = (server.runs / "study" / "comparison.html").read_text()
    assert "Transfer to " in page
    assert f"{result['untrained_loss']:.4f}" in page
    server.wait_for_tasks(run, {"self_instruct: student training"})


@pytest.mark.slow
def test_work_pool_deployments_run_on_a_worker(server: Server, finished: str) -> None:
    server.python("from prefect.blocks.system import Secret; " + f"Secret(value={CANARY!r}).save('hf-token')")
    server.python("from prefect.blocks.system import Secret; " + f"Secret(value={str(server.runs)!r}).save('root')")
    server.copy_of(finished, "pooled")
    secrets = {
        "HF_TOKEN": "{{ prefect.blocks.secret.hf-token }}",
        "MONTESSORI_RUN_ROOT": "{{ prefect.blocks.secret.root }}",
    }
    [tiny, *_] = yaml.safe_load((server.folder / "prefect.yaml").read_text())["deployments"]
    every_day = [{"interval": 86400, "active": False}]
    pooled = tiny | {"name": "pooled", "job_variables": {"env": secrets}, "schedules": every_day}
    (server.folder / "pooled.yaml").write_text(yaml.safe_dump({"deployments": [pooled]}))
    elsewhere = server.folder / "worker"
    elsewhere.mkdir()
    environment = server.environment | {"PREFECT_API_URL": f"{server.url}/api"}
    del environment["HF_TOKEN"]

    def deploy() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", "deploy", "--pool", "cluster", "--file", "pooled.yaml"],
            cwd=server.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    refused = deploy()
    assert refused.returncode == 1
    assert "has no work pool 'cluster'; create it: prefect work-pool create" in refused.stdout
    server.ask("work_pools/", {"name": "cluster", "type": "process"})
    assert deploy().returncode == 0
    first = server.deployment("pooled")
    assert [one["schedule"]["interval"] for one in first["schedules"]] == [86400.0]
    hourly = [{"schedule": {"interval": 3600}, "active": False}]  # as added in the UI
    server.ask(f"deployments/{first['id']}/schedules", hourly)
    automations = {one["id"] for one in server.ask("automations/filter", {})}
    assert deploy().returncode == 0
    again = server.deployment("pooled")
    assert again["id"] == first["id"]
    assert sorted(one["schedule"]["interval"] for one in again["schedules"]) == [3600.0, 86400.0]
    assert not any(one["active"] for one in again["schedules"])
    assert {one["id"] for one in server.ask("automations/filter", {})} == automations
    with workers(server, "cluster", environment, elsewhere):
        run = server.start("pooled", "pooled")
        server.wait_for(run, "Completed")
    assert server.counts(run)["iteration-1/warmup"] == (1, 0, 0)  # so it had the run root from the Secret block


@contextmanager
def workers(
    server: Server, pool: str, environment: dict[str, str], *folders: Path
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Start a worker of a work pool in each folder; kill them and their flow runs when the block ends."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
    with (server.folder / "worker.log").open("a") as log:
        started = [
            subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
            for folder in folders
        ]
    try:
        yield started
    finally:
        for worker in started:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


@pytest.mark.guarantee("worker on a login node dies")
@pytest.mark.slow
def test_other_worker_continues_run_of_killed_one(server: Server, finished: str, tmp_path: Path) -> None:
    folder = server.copy_of(finished, "moved", "warmup")
    [tiny, *_] = yaml.safe_load((server.folder / "prefect.yaml").read_text())["deployments"]
    root = {"MONTESSORI_RUN_ROOT": str(server.runs)}
    pooled = tiny | {"name": "on-logins", "job_variables": {"env": root}}
    (server.folder / "logins.yaml").write_text(yaml.safe_dump({"deployments": [pooled]}))
    server.ask("work_pools/", {"name": "logins", "type": "process"})
    environment = server.environment | {"PREFECT_API_URL": f"{server.url}/api"}
    deploy = [sys.executable, "-m", "flows.cli", "deploy", "--pool", "logins", "--file", "logins.yaml"]
    subprocess.run(deploy, cwd=server.folder, env=environment, capture_output=True, check=True)
    logins = [tmp_path / "one", tmp_path / "two"]
    for login in logins:
        login.mkdir()
    warmup = folder / "iteration-1" / "warmup"
    with workers(server, "logins", environment, *logins) as started:
        run = server.start("on-logins", "moved")
        wait_until(lambda: job_ids(warmup))
        driver = server.driver(run)
        [busy] = [worker for worker in started if driver in psutil.Process(worker.pid).children(recursive=True)]
        driver.kill()
        busy.kill()
        server.wait_for(run, "Crashed", seconds=420)  # five minutes without heartbeats
        server.set_state(run, "SCHEDULED")
        server.wait_for(run, "Completed")
    assert len(Ledger(warmup / "jobs").submissions) == 1  # the running training was awaited, not started again
    assert digests(folder) == digests(server.runs / "finished")


@pytest.mark.guarantee("API keys in logs, tables or databases")
@pytest.mark.slow
@pytest.mark.usefixtures("finished")
def test_api_key_is_never_written(server: Server) -> None:
    check_api_key_is_nowhere(server)


def check_api_key_is_nowhere(server: Server) -> None:
    """Check run folders, logs and pickles of jobs, Prefect's database, and responses of its API."""
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert any(path.suffix == ".db" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    tables = [path for path in files if path.suffix == ".parquet"]  # compressed
    assert len(tables) > 20
    assert [path for path in tables if CANARY in json.dumps(pq.read_table(path).to_pylist())] == []
    for route in ("flow_runs", "deployments", "artifacts", "logs"):
        assert CANARY not in json.dumps(server.ask(f"{route}/filter", {}))


@pytest.mark.guarantee("runs started on your Prefect server")
@pytest.mark.slow
def test_server_with_login_requires_it(tmp_path: Path, page: Page) -> None:
    """The login is never written; the UI finds the API at any address of the server, such as a tunnel."""
    [service] = [
        service
        for name, service in yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"].items()
        if name == "server"
    ]
    shipped = {name: value for name, value in service["environment"].items() if "DATABASE" not in name}
    login, home, port = f"group:{CANARY}", tmp_path / "server", free_port()
    settings = shipped | {
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_UI_ENABLED": "true",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(tmp_path / "ui"),
    }
    home.mkdir()
    with prefect_server(home, port, **settings) as address:
        (tmp_path / "prefect.yaml").write_text((ROOT / "flows" / "prefect.yaml").read_text())
        client = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "client")} | address

        def deploy(**more: str) -> subprocess.CompletedProcess[str]:
            arguments = [sys.executable, "-m", "flows.cli", "deploy", "--pool", "cluster"]
            return subprocess.run(
                arguments, cwd=tmp_path, env=client | more, capture_output=True, text=True, check=False
            )

        refused = deploy()
        assert refused.returncode == 1
        assert "PREFECT_API_AUTH_STRING" in refused.stdout
        create = [sys.executable, "-m", "prefect", "work-pool", "create", "cluster", "--type", "process"]
        subprocess.run(create, env=client | {"PREFECT_API_AUTH_STRING": login}, capture_output=True, check=True)
        registered = deploy(PREFECT_API_AUTH_STRING=login)
        assert registered.returncode == 0, registered.stdout + registered.stderr
        page.goto(f"http://localhost:{port}/deployments")
        page.locator("input[type=password]").fill(login)
        page.keyboard.press("Enter")
        expect(page.get_by_text("quickstart").first).to_be_visible()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []

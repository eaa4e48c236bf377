"""Measure the load on Prefect of a stage of 100, 1,000 and 10,000 shards, and whether all task runs are shown.

    python benchmarks/prefect_view.py [--shards 100 1000 10000] [--database postgresql+asyncpg://...]

The program starts a Prefect server (with SQLite or the given database) and runs stages of tiny shards in a flow, as a run
does. It reports the task runs; how many are recorded as completed, and how long after the flow's end (the recorder works
behind a queue); the server's memory; the time to load the run's graph; and the time until headless Chromium lists the task
runs on the run's page.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, sync_playwright

from flows.local_server import server_environment, wait_for_server

PORT = 4298
API = f"http://127.0.0.1:{PORT}/api"
PROGRAM = """
import pyarrow as pa, pyarrow.parquet as pq
def open_rows(settings, inputs):
    def compute(rows, output, report):
        pq.write_table(pa.table({"row": [row["n"] for row in rows]}), output)
    return compute
"""
FLOW = """
import sys
from pathlib import Path
from prefect import flow
from cluster.fanout import fan_out
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.data.rows import Rows
from montessori_core.config import Cluster, Resources
from tasks.stage_progress import StageTaskRuns

@flow(flow_run_name=sys.argv[2])
def one_stage(folder, shards):
    stage = Stage("rows", 1, "rows_program:open_rows", {}, {}, {}, folder / f"stage-{shards}")
    rows = Shards(Rows.of([{"n": n} for n in range(shards)]), 1)
    with StageTaskRuns("iteration 1: influence", stage, shards, [], lambda part: part) as view:
        fan_out(stage, rows, Resources(parallel_jobs=2, cpus_per_process=1), Cluster(poll_seconds=2), view.show)
    assert len(view.results()) == shards

one_stage(Path(sys.argv[1]), int(sys.argv[2]))
"""


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000, 10_000], help="numbers of shards")
    parser.add_argument("--database", help="database URL for Prefect (default: SQLite in a scratch folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows_program.py").write_text(PROGRAM)
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{Path(__file__).resolve().parent.parent}"
        environment = server_environment(PORT)
        if arguments.database:
            environment["PREFECT_API_DATABASE_CONNECTION_URL"] = arguments.database
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(PORT)]
        with (folder / "server.log").open("w") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for_server(server, API)
            print(  # noqa: T201
                "| shards | wall, s | task runs | recorded as completed | lag, s | server, MB | graph, s | page, s |\n"
                "|---|---|---|---|---|---|---|---|"
            )
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                for shards in arguments.shards:
                    print(row(shards, folder, server, browser), flush=True)  # noqa: T201
        finally:
            server.terminate()
            server.wait()


def row(shards: int, folder: Path, server: "subprocess.Popen[bytes]", browser: Browser) -> str:
    """Run one stage; return its row of the table."""
    started = time.time()
    environment = os.environ | {"PREFECT_API_URL": API, "PREFECT_LOGGING_LEVEL": "WARNING"}
    subprocess.run([sys.executable, "-c", FLOW, str(folder), str(shards)], env=environment, check=True)
    ended = time.time()
    [run] = ask("flow_runs/filter", {"flow_runs": {"name": {"any_": [str(shards)]}}})
    expected = -(-shards // max(25, -(-shards // 20)))
    completed = 0
    while completed < expected and time.time() - ended < 120:
        task_runs = ask("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [run["id"]]}}})
        completed = sum(task["state_type"] == "COMPLETED" for task in task_runs)
        time.sleep(0.5)
    lag = time.time() - ended
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    memory = sum(process.memory_info().rss for process in processes) / 1e6
    requested = time.time()
    nodes = ask(f"flow_runs/{run['id']}/graph-v2")["nodes"]
    assert len(nodes) >= completed
    graph = time.time() - requested
    numbers = f"{ended - started:.0f} | {expected} | {completed} | {lag:.1f} | {memory:.0f} | {graph:.2f}"
    return f"| {shards} | {numbers} | {page_seconds(browser, run['id']):.1f} |"


def page_seconds(browser: Browser, run: str) -> float:
    """Return the seconds until the page of a run lists its task runs."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    started = time.time()
    page.goto(f"http://127.0.0.1:{PORT}/runs/flow-run/{run}")
    page.get_by_text("Task Runs", exact=True).first.click()
    page.get_by_text("iteration 1: influence").first.wait_for()
    seconds = time.time() - started
    page.close()
    return seconds


def ask(path: str, content: dict[str, Any] | None = None) -> Any:
    """Send a request to Prefect's API; return the response."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"{API}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


if __name__ == "__main__":
    main()

"""Events of failed shards on a Prefect server."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from support import ROOT, squares, wait_until
from support.prefect_server import prefect_server

folder = squares.folder

TWO_SHARDS = """
import sys
from pathlib import Path
from prefect import flow
from cluster.fanout import fan_out
from montessori_core.config import Resources
from support.row_programs import as_shards
from support.squares import CLUSTER, SHARDS, stage
from tasks.stage_progress import StageTaskRuns

@flow
def two_shards():
    made, shards = stage(Path(sys.argv[1]), seconds=8.0), as_shards(*SHARDS[:2])
    with StageTaskRuns("squares", made, len(shards), [], read=lambda part: part) as view:
        fan_out(made, shards, Resources(parallel_jobs=2, cpus_per_process=1), CLUSTER, view.show)

two_shards()
"""
"""A flow with a stage: its first shard may fail at once, the second takes 24 seconds."""


@pytest.mark.slow
def test_failed_shard_is_announced_while_others_run(folder: Path) -> None:
    (folder / "fail-0").touch()
    with prefect_server(folder) as variables:

        def events() -> list[dict[str, Any]]:
            content = {"filter": {"event": {"name": ["montessori.shard.failed"]}}}
            answer = httpx.post(f"{variables['PREFECT_API_URL']}/events/filter", json=content)
            return [event["payload"] for event in answer.json()["events"]]

        flow_run = subprocess.Popen(
            [sys.executable, "-c", TWO_SHARDS, str(folder)],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_until(events, 120, process=flow_run, pause=0.5)
        assert not squares.stage(folder, seconds=8.0).manifest(1).exists()
        output, _ = flow_run.communicate(timeout=120)
        assert squares.stage(folder, seconds=8.0).manifest(1).exists()
        assert [(event["shard"], event["error"]) for event in events()] == [(0, "ValueError: row 0 is bad")], output

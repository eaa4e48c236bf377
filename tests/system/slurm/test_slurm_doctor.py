"""`montessori doctor` on a real Slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.scripts import check_jobs
from montessori_core.config import Cluster, Resources, StageResources
from support import runs as whole
from support import squares as local
from support import wait_until
from support.slurm_lab import LAB, queued

pytestmark = pytest.mark.guarantee("no sacct")


folder = local.folder


@pytest.mark.slow
def test_doctor_passes_on_working_cluster(tmp_path: Path) -> None:
    code, output = doctor(tmp_path, {"slurm": {"partition": "main"}})
    assert code == 0, output
    for text in (
        "scheduler: answers",
        "accounting: none",
        "partition: main: 2 nodes",
        "sbatch options of generation, training, teacher_update, influence, evaluation: --cpus-per-task=2 --nodes=1",
        "sbatch options of judging: --cpus-per-task=1 --nodes=1 --ntasks-per-node=1 --partition=main --requeue --time=240",
        "sbatch options of driver: ",
        "see the same files",
        "training job: environment: Python 3",
        "all-reduce over 2 nodes: 2 processes, sum 2",
    ):
        assert text in output
    assert not list((tmp_path / "runs").iterdir())
    assert queued() == []


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            {"slurm": {"stages": {"influence": {"partition": "nowhere"}}}},
            r"Slurm refuses the jobs of influence \(.*--partition=nowhere.*invalid partition.*slurm.stages.influence",
        ),
        ({"slurm": {"constraint": "nothing"}}, r"jobs of generation, .*Invalid feature.*resources\.generation"),
        ({"slurm": {"extra": {"reservation": "night"}}}, r"jobs of generation, .*reservation.*nvalid"),
        ({"slurm": {"extra": {"no-such-option": "1"}}}, r"jobs of generation, .*unrecognized option"),
    ],
)
def test_run_refuses_impossible_jobs_at_once(
    tiny_llama: Path, tmp_path: Path, cluster: dict[str, Any], message: str
) -> None:
    """The jobs of a late stage, too: before the first is submitted."""
    config = whole.configuration(tmp_path, tiny_llama)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"profile": "slurm", **cluster}))
    code, output = whole.invoke("run", str(config), "--cluster", "cluster.yaml", cwd=tmp_path)
    assert code == 1
    assert re.search(message, " ".join(output.split())), output
    assert not list((tmp_path / "runs").rglob("ledger.json"))


def test_jobs_without_nodes_are_warned_of() -> None:
    """The nodes may be down: sbatch accepts such jobs, and they wait."""
    large = Resources(memory_gb=9000)
    cluster = Cluster(profile="slurm", resources=StageResources(evaluation=large, judging=large))
    [warning] = check_jobs(cluster, unused=["judging"])
    assert re.search(r"jobs of evaluation \(.*--mem=9000GB.*resources\.evaluation", warning, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {"slurm": {"partition": "nowhere"}},
            ["no partition nowhere; available: brief, main, urgent", "set cluster.slurm.partition"],
        ),
        (
            {"resources": {"influence": {"gpus_per_node": 8}}},
            ["GPUs of main: 2 per node, 8 requested", "gpus_per_node"],
        ),
        (
            {"slurm": {"partition": "brief"}},
            ["time limits of brief: 2 minutes in the partition, 240 requested", "time_limit_minutes"],
        ),
        (
            {
                "slurm": {"partition": "brief", "hold": {"minutes": 1}},
                "resources": {"training": {"time_limit_minutes": 2}},
            },
            ["time limits of brief: 2 minutes in the partition, 241 requested", "cluster.slurm.hold.minutes"],
        ),
        (
            {"slurm": {"stages": {"judging": {"partition": "brief"}}}},
            ["time limits of brief: 2 minutes in the partition, 240 requested", "partition: main: 2 nodes"],
        ),
        (
            {"slurm": {"stages": {"judging": {"constraint": "nothing"}}}},
            [
                "sbatch options of judging: --constraint=nothing",
                "Invalid feature specification",
                "change cluster.slurm",
            ],
        ),
        (
            {"generation_python": sys.executable},
            ["generation job: environment", "vllm: ModuleNotFoundError", "make install-generation"],
        ),
        ({"slurm": {"max_array_size": 100_000}}, ["MaxArraySize is", "or less"]),
        (
            {"slurm": {"python": "/nowhere/python"}},
            ["training job: lost", "does the Python that the configuration names"],
        ),
        ({"resources": {"influence": {"memory_gb": 9000}}}, ["sbatch options of influence: ", "--mem=9000GB"]),
    ],
)
def test_doctor_names_faults_and_remedies(tmp_path: Path, change: dict[str, object], messages: list[str]) -> None:
    code, output = doctor(tmp_path, change)
    assert code == 1
    for message in messages:
        assert message in " ".join(output.split())
    assert queued() == []


@pytest.mark.slow
def test_doctor_detects_unshared_folder() -> None:
    """Each node of the lab has a separate /dev/shm, like /tmp on a cluster."""
    private = Path("/dev/shm") / f"montessori-doctor-{os.getpid()}"
    try:
        code, output = doctor(private, {})
    finally:
        shutil.rmtree(private, ignore_errors=True)
    assert code == 1
    assert "is this folder on a shared file system" in output


@pytest.mark.slow
def test_doctor_gives_up_on_queued_jobs(tmp_path: Path) -> None:
    code, output = doctor(tmp_path, {"slurm": {"extra": {"begin": "now+1hour"}}}, "--patience", "3")
    assert code == 1
    assert "no result within 3 s; its jobs were cancelled" in output
    assert queued() == []


@pytest.mark.slow
def test_doctor_cancels_its_jobs_at_hangup(tmp_path: Path) -> None:
    command, options = doctor_call(tmp_path, {"slurm": {"extra": {"begin": "now+1hour"}}}, "--patience", "150")
    with whole.hangups_end_children():
        process = subprocess.Popen(command, **options)
    wait_until(lambda: queued("--format=%l") == ["5:00"], 60)  # ends by itself if the doctor is killed
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert queued() == []


def doctor(folder: Path, cluster: dict[str, object], *options: str) -> tuple[int, str]:
    command, keywords = doctor_call(folder, cluster, *options)
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, **keywords)
    return outcome.returncode, outcome.stdout + outcome.stderr


def doctor_call(folder: Path, cluster: dict[str, object], *options: str) -> tuple[list[str], dict[str, Any]]:
    """Write a cluster file; return the command that checks it, and keywords of subprocess."""
    folder.mkdir(exist_ok=True)
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"profile": "slurm", "poll_seconds": 0.5} | cluster))
    command = [sys.executable, "-m", "flows.cli", "doctor", "--cluster", str(path), *options]
    return command, {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(LAB.parent.parent)}}

"""A shared file system that misbehaves, on a real Slurm: a library makes calls of the C library fail, or see changes late."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.fanout import ShardsFailed, fan_out
from montessori_core.config import Cluster, HeldJobs, Resources, Slurm
from support import file_faults
from support import squares as local
from support.file_faults import faults
from support.row_programs import as_shards
from support.squares import submissions

DRIVER = """
import logging, sys
from pathlib import Path
from cluster.lock import only_driver
from support.squares import results
from test_slurm_file_faults import run
logging.basicConfig(level=logging.INFO)
folder = Path(sys.argv[1])
with only_driver(folder):
    parts = run(folder, held=sys.argv[2] == "held")
print(results(parts))
"""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

folder = local.folder


libraries = file_faults.libraries


def run(folder: Path, held: bool = False) -> list[Path]:
    """Compute the stage of squares, six shards in as many jobs, two at a time."""
    resources = Resources(parallel_jobs=2, shards_per_job=1, cpus_per_process=1, time_limit_minutes=30)
    cluster = Cluster(profile="slurm", slurm=Slurm(hold=HeldJobs() if held else None))
    return fan_out(local.stage(folder, 0.2), as_shards(*local.SHARDS), resources, cluster)


def drive(folder: Path, held: bool = False, **variables: str) -> tuple[list[int], str]:
    """Run a driver whose process has environment variables that its jobs have too; return the squares and its log."""
    paths = [os.environ["PYTHONPATH"], str(Path(__file__).parent)]
    driver = subprocess.run(
        # The shell becomes the driver: `$$` is its process.
        [
            "sh",
            "-c",
            'LATE_PROCESS=$$ exec "$@"',
            "sh",
            sys.executable,
            "-c",
            DRIVER,
            str(folder),
            "held" if held else "",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    return json.loads(driver.stdout), driver.stderr


@pytest.mark.guarantee("results seen late")
@pytest.mark.parametrize(
    ("seconds", "stubborn"), [("60", {}), pytest.param("15", {"LATE_STUBBORN": "1"}, marks=pytest.mark.slow)]
)
def test_late_results_are_awaited(folder: Path, libraries: Path, seconds: str, stubborn: dict[str, str]) -> None:
    late = {"LATE_ROOT": str(folder), "LATE_SECONDS": seconds, **stubborn}
    squares, log = drive(folder, LD_PRELOAD=str(libraries / "late_files.so"), **late)
    assert squares == local.EXPECTED
    assert "completed, but its results are not visible here yet" in log
    assert len(submissions(folder)) == 1
    assert sorted(local.computed(folder)) == local.NUMBERS


@pytest.mark.guarantee("results seen late")
@pytest.mark.slow
def test_late_results_of_steps_are_awaited(folder: Path, libraries: Path) -> None:
    """Steps in held jobs end on another node than the driver's, as jobs of a stage do."""
    late = {"LATE_ROOT": str(folder / "stage"), "LATE_SECONDS": "60"}
    squares, log = drive(folder, held=True, LD_PRELOAD=str(libraries / "late_files.so"), **late)
    assert squares == local.EXPECTED
    assert "completed, but its results are not visible here yet" in log
    assert all(not submission.lost for submission in submissions(folder))
    assert sorted(local.computed(folder)) == local.NUMBERS


@pytest.mark.guarantee("stale file handles")
@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["rows.parquet", "stage.json", "manifest.json", "ledger.json", "part-"])
def test_passing_read_failures_change_nothing(folder: Path, libraries: Path, name: str, error: int) -> None:
    variables = faults(folder / "stage", libraries, "open", [name], error, 3)
    squares, _ = drive(folder, **variables)
    assert squares == local.EXPECTED


@pytest.mark.guarantee("stale file handles")
def test_job_with_stale_handle_is_submitted_again(
    folder: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in faults(folder / "stage", libraries, "open", ["rows.parquet"], errno.ESTALE, 2).items():
        monkeypatch.setenv(variable, value)
    assert local.results(run(folder)) == local.EXPECTED
    lost = [kind for submission in submissions(folder) for kind in submission.lost.values()]
    assert lost == ["file_system"] * 2


@pytest.mark.guarantee("quota reached in the middle of a commit")
@pytest.mark.parametrize("name", ["part-", pytest.param("manifest.json", marks=pytest.mark.slow)])
def test_quota_reached_in_a_commit_keeps_finished_shards(
    folder: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as quota:
        for variable, value in faults(folder / "stage", libraries, "write", [name], errno.EDQUOT, 1).items():
            quota.setenv(variable, value)
        with pytest.raises(ShardsFailed, match=r"\(disk_full\): .*Disk quota exceeded") as failure:
            run(folder)
    assert len(failure.value.failures) == 1
    assert local.results(run(folder)) == local.EXPECTED
    assert len(local.computed(folder)) == len(local.NUMBERS) + len(local.SHARDS[0])

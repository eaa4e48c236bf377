"""What Slurm says of jobs before a run begins: refused for good, refused for now, or no answer."""

from pathlib import Path

import pytest

from cluster import scripts
from cluster.scripts import check_jobs
from montessori_core.config import Cluster
from montessori_core.errors import UserError
from support.slurm_lab import become_login_node

CLUSTER = Cluster(profile="slurm")
BUSY = "allocation failure: Requested node configuration is not available"


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the answer of sbatch, which counts its calls."""
    answer = tmp_path / "answer"
    script = f"echo called >> {tmp_path}/calls\ncat {answer} >&2\ngrep -q failure {answer} && exit 1\nexit 0"
    become_login_node(monkeypatch, tmp_path, sbatch=script)
    monkeypatch.setattr(scripts, "_accepted", set())
    return answer


@pytest.mark.parametrize(
    ("answer", "permanent"),
    [
        ("sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified", True),
        ("sbatch: error: Invalid account or account/partition combination\nfailure", True),
        (BUSY, False),
        (f"sbatch: lua: use --account to avoid Invalid account errors\n{BUSY}", False),
    ],
)
def test_refusal_is_permanent_by_lines_of_sbatch(answer: str, permanent: bool, sbatch: Path) -> None:
    sbatch.write_text(answer)
    if permanent:
        with pytest.raises(UserError, match=r"Slurm refuses the jobs of [^\n]*\nChange cluster\.slurm"):
            check_jobs(CLUSTER, unused=["judging"])
    else:
        [warning] = check_jobs(CLUSTER, unused=["judging"])
        assert BUSY in warning


@pytest.mark.parametrize(
    "answer",
    [
        "sbatch: unrecognized option '--test-only'\nfailure",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    ],
)
def test_jobs_are_not_checked_without_an_answer(answer: str, sbatch: Path) -> None:
    """Not of an emulation of sbatch, nor of a controller that is down."""
    sbatch.write_text(answer)
    assert check_jobs(CLUSTER, unused=["judging"]) == []


def test_accepted_jobs_are_checked_once(sbatch: Path) -> None:
    """The runs of a study have the same jobs."""
    sbatch.write_text("sbatch: Job 1 to start now")
    for _ in range(2):
        assert check_jobs(CLUSTER, unused=["judging"]) == []
    assert len((sbatch.parent / "calls").read_text().splitlines()) == 1

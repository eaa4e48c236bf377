"""Progress and remaining time of a stage, in the bar, `montessori status` and the driver."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.progress import Progress, rows_per_second
from cluster.records import Manifest, ShardProgress
from cluster.stage import RowClock
from montessori_core.files import read_json
from tasks.progress import ProgressBar


def manifest(rows: int, seconds: float, row_seconds: float | None) -> Manifest:
    fields = {"key": "k", "bytes": 1, "sha256": "", "job_id": "1", "flops": 0}
    return Manifest(rows=rows, seconds=seconds, row_seconds=row_seconds, **fields)


def test_pace_counts_all_jobs() -> None:
    fast, slow = ShardProgress(done=3.5, row_seconds=0.5), ShardProgress(done=0.25, row_seconds=2.0)
    assert rows_per_second([fast, slow], []) == pytest.approx(2.5)
    # A job without a pace counts as a typical one; a stage without jobs has no pace.
    assert rows_per_second([fast, None, ShardProgress(done=0.0)], []) == pytest.approx(6.0)
    assert rows_per_second([], [manifest(4, 8.0, 1.0)]) is None


def test_initial_pace_is_from_earlier_shards() -> None:
    assert rows_per_second([None], []) is None
    assert rows_per_second([ShardProgress(done=7.0)], []) is None  # an earlier job's rows give no pace
    earlier = [manifest(4, 100.0, 1.0), manifest(4, 100.0, 3.0), manifest(1, 2.0, None)]
    assert rows_per_second([None, None], earlier) == pytest.approx(1.0)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the clock."""
    seconds = [1000.0]
    monkeypatch.setattr("cluster.stage.time.monotonic", lambda: seconds[0])

    def move(to: float) -> None:
        seconds[0] = to

    return move


def test_clock_ignores_rows_before_its_start(tmp_path: Path, now: Callable[[float], None]) -> None:
    clock = RowClock(tmp_path / "progress.json", "7_3", pause=0.0)
    now(1060.0)  # the model is loaded
    clock(50)
    assert read_json(tmp_path / "progress.json") == {"done": 50, "row_seconds": None, "job_id": "7_3"}
    now(1061.0)
    clock(50.25)
    assert read_json(tmp_path / "progress.json") == {"done": 50.25, "row_seconds": 4.0, "job_id": "7_3"}


def shown(capsys: pytest.CaptureFixture[str], *states: Progress) -> list[tuple[str, str, str]]:
    """Return the percentage, rows and remaining time that the bar shows for each state."""
    with ProgressBar("responses") as bar:
        for state in states:
            bar.show(state)
    lines = re.findall(r"responses +(\d+)%\|.{20}\| (\d+/\d+) \[[\d:]+<(.*?)\]", capsys.readouterr().err)
    return list(dict.fromkeys(lines))


def progress(done: float, left: float | None, shards_done: set[int]) -> Progress:
    return Progress(done, 104, left, 2, {0}, shards_done, {})


def test_bar_shows_fractions_and_ends_with_last_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tasks.progress._PAUSE", 0.0)
    states = [(0, None, set()), (3.75, 61, set()), (103.99, 0.4, {0}), (104, None, {0, 1})]
    assert shown(capsys, *(progress(*state) for state in states)) == [
        ("0", "0/104", "starting, shards 0/2"),
        ("3", "3/104", "01:01, shards 0/2"),
        ("99", "103/104", "00:00, shards 1/2"),
        ("100", "104/104", "00:00, shards 2/2"),
    ]


def test_bar_in_log_writes_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, *(progress(done, 60, set()) for done in range(100)))
    assert [rows for _, rows, _ in lines] == ["0/104", "99/104"]

"""Iterations of a schedule's flow runs."""

from pathlib import Path

import pytest

from flows.experiment import _total_iterations
from montessori_core import layout
from montessori_core.config import read_experiment
from montessori_core.files import read_json, write_json
from support.runs import configuration
from tasks.run import open_run


def finish(run: Path, iterations: int) -> None:
    """Write what says that iterations are finished."""
    for number in range(1, iterations + 1):
        (run / layout.iteration(number)).mkdir(exist_ok=True)
        (run / layout.iteration(number) / layout.METRICS).write_text("{}")


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Path:
    """A run without iterations."""
    opened, _ = open_run(read_experiment(configuration(tmp_path, tiny_llama)), tmp_path / "run")
    return opened.folder


def total(run: Path, added: int, flow_run: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", flow_run)
    return _total_iterations(run, added)


def test_schedule_counts_iterations_before_changed_settings(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(run, 3)
    assert total(run, 1, "A", monkeypatch) == 4
    changed = read_experiment(tmp_path / "tiny.yaml", ("preferences.baseline=student", "iterations=4"))
    open_run(changed, run)  # its iterations are not finished any more; then A fails
    assert not list(run.glob("iteration-*/metrics.json"))
    assert total(run, 1, "B", monkeypatch) == 4
    finish(run, 4)
    assert total(run, 1, "A", monkeypatch) == 4  # a retry
    assert total(run, 1, "C", monkeypatch) == 5


def test_schedule_forgets_iterations_of_cancelled_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(run, 1)
    assert total(run, 5, "A", monkeypatch) == 6
    assert total(run, 1, "B", monkeypatch) == 2


def test_schedule_of_earlier_run_continues(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json({"finished": 3, "A": 4}, run / layout.SCHEDULE)
    assert total(run, 1, "A", monkeypatch) == 4
    assert total(run, 2, "B", monkeypatch) == 5
    assert read_json(run / layout.SCHEDULE) == {"finished": 3, "totals": {"A": 4, "B": 5}}

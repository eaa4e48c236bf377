"""What is said about a run before its first job."""

from pathlib import Path
from typing import Any

import pytest

from montessori_core.config import parse_experiment
from tasks.run import open_run


def warnings_of(folder: Path, model: Path, **sections: Any) -> list[str]:
    """Open a run with a model as teacher and student; return its warnings."""
    content = {"teacher": {"model": str(model)}, "student": {"model": str(model)}} | sections
    return open_run(parse_experiment(content, "test"), folder / "run")[1]


@pytest.mark.parametrize(("penalty", "warned"), [(1.0, False), (1.2, False), (1.5, True)])
def test_open_run_warns_of_repetition_penalty(penalty: float, warned: bool, tiny_llama: Path, tmp_path: Path) -> None:
    instruction = {"repetition_penalty": penalty}
    warnings = warnings_of(tmp_path, tiny_llama, synthesis={"instruction": instruction})
    assert ["repetition_penalty is 1.5" in warning for warning in warnings] == [True] * warned

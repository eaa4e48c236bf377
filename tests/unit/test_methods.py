"""Methods of a study: what they are given is the same for each."""

from pathlib import Path
from typing import Any

import pytest

from flows.methods import REGISTRY, tailoring
from flows.methods.environment import Round
from flows.methods.tailoring import Probed
from montessori_core.config import parse_experiment
from tasks.run import Model, Run
from tasks.synthesis import Synthesized


@pytest.mark.parametrize("method", ["montessori", "self_instruct", "self_instruct_strong"])
def test_method_may_write_what_was_probed(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = Model("m", "0"), []
    synthesized = Synthesized(tmp_path / "instructions.parquet", tmp_path / "examples.parquet")

    def synthesize(*arguments: Any, **settings: Any) -> Synthesized:
        asked.append(settings)
        return synthesized

    monkeypatch.setattr(tailoring, "synthesize", synthesize)
    monkeypatch.setattr(tailoring, "probe", lambda *_: Probed(synthesized, model, 1, 2))
    for stage in ("measure", "collect_preferences"):
        monkeypatch.setattr(tailoring, stage, lambda *_: tmp_path)
    monkeypatch.setattr(tailoring, "update_teacher", lambda *_, **__: model)
    monkeypatch.setattr(Run, "first_teacher", lambda _: model)
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "strong_teacher": {"model": "strong"}}
    run = Run(tmp_path, parse_experiment(content, "test"))
    REGISTRY[method].propose(Round(run, tmp_path, method, 1, 1, None))
    (training,) = asked
    assert training["earlier"] == []
    assert (training["draw"], training["count"], training["seed_pool"]) == ("i1-training", 10_000, None)

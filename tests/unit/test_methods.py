"""Methods of a study: what they are given is the same for each."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.methods import REGISTRY, tailoring
from flows.methods import nomad as nomad_method
from flows.methods.environment import Round
from flows.methods.tailoring import Probed
from flows.study import open_study
from montessori_core.config import Optimization, Sampling, parse_experiment
from montessori_core.errors import UserError
from montessori_core.program import Row
from montessori_core.schema import EXAMPLES, read_table
from montessori_core.sources import Task, write_tasks
from montessori_core.study import Study
from tasks import nomad
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


def write_reference(run: Run, count: int) -> None:
    """Give a run a reference set, and two sets that are not read."""
    run.source_file("reference").parent.mkdir()
    for name in ("seed_pool", "reference", "evaluation"):
        write_tasks([Task(f"{name}-{n}", f"Count {n} rivers.", "Done.") for n in range(count)], run.source_file(name))


def test_nomad_is_decoded_and_trained_by_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, model = {"learning_rate": 2e-5, "batch_size": 128, "epochs": 4}, Model("m", "0")
    content = {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "synthesis": {"instruction": {"presence_penalty": 2.0, "repetition_penalty": 1.5}},
        "training": {"examples": 4},
        "nomad": {"training": recipe},
    }
    run = Run(tmp_path, parse_experiment(content, "test"))
    write_reference(run, 9)
    (tmp_path / "training").mkdir()
    decoded: list[Sampling] = []
    trained: list[Any] = []

    def generate(*arguments: Any) -> tuple[list[Row], list[Path]]:
        decoded.append(arguments[5])
        text = " What is {}?\nAssistant: A word."
        names = [name for shard in arguments[4] for row in shard for name in row["ids"]]
        things = ["light", "a sonnet", "the tundra", "an oboe"]
        texts = [text.format(things[number % 4]) for number in range(len(names))]
        return [
            {"row_id": name, "prompt": "User:", "text": text, "finish_reason": "stop"}
            for name, text in zip(names, texts, strict=True)
        ], []

    monkeypatch.setattr(nomad, "generate", generate)
    monkeypatch.setattr(nomad, "join_synthesis", nomad.join_synthesis.fn)
    monkeypatch.setattr("tasks.synthesis.create_table_artifact", lambda *_, **__: None)
    monkeypatch.setattr(nomad_method, "train_conversationalist", lambda *_: model)
    monkeypatch.setattr(nomad_method, "measure_norm_sim", lambda *_: tmp_path)
    monkeypatch.setattr(nomad_method, "mix_with_real", nomad.mix_with_real.fn)
    monkeypatch.setattr(nomad_method, "train_student", lambda *arguments: trained.append(arguments) or model)
    proposal = REGISTRY["nomad"].propose(Round(run, tmp_path, "nomad", 1, 1, None))
    assert set(decoded) == {Sampling(temperature=1.0, top_p=0.9, presence_penalty=0.0, max_tokens=2048)}
    assert proposal.student == model
    ((_, _, _, examples, used, count, _),) = trained
    assert used == Optimization.model_validate(recipe)
    assert count == read_table(examples, EXAMPLES).num_rows == 4


@pytest.mark.parametrize(("changes", "steps"), [({}, 2), ({"batch_size": 8, "teacher_examples": 30}, 8)])
def test_nomad_refuses_teacher_set_of_few_batches(
    changes: dict[str, int], steps: int, tiny_llama: Path, tmp_path: Path
) -> None:
    model = {"model": str(tiny_llama)}
    experiment = {"teacher": model, "student": model, "nomad": changes}
    study = {"experiment": experiment, "methods": ["nomad"], "baseline": "nomad", "seeds": [0]}
    with pytest.raises(UserError, match=rf"train the teacher for {steps} steps, .*; give a larger reference set"):
        open_study(Study.model_validate(study), tmp_path / "refused")
    experiment["nomad"] = {"training": {"batch_size": 2}}
    experiment["cluster"] = {"resources": {"training": {"processes_per_node": 2}}}
    experiment["teacher_update"] = {"batch_size": 4}
    with pytest.raises(ValidationError, match=r"nomad.training.batch_size \(2\) must be a multiple"):
        Study.model_validate(study)
    experiment |= {"nomad": changes | {"batch_size": 8, "teacher_examples": 60}, "cluster": {}}
    open_study(Study.model_validate(study), tmp_path / "fits")

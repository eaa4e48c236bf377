"""The simple form: what it sets, what it refuses, and the plan that a run shows first."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from flows.evaluation import evaluate
from flows.experiment import montessori, start_run
from flows.study import compare
from flows.tailor import describe_plan, form_address, form_values, tailor
from montessori_core.config import Experiment, Study, Tailored, parse, read_experiment
from montessori_core.errors import ConfigError, UserError
from tasks.resume import RUN_ROOT
from tasks.run import Run, open_run, reopen_run


def test_short_form_is_short() -> None:
    fields = Tailored.model_json_schema()["properties"]
    assert len(fields) <= 10
    assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize("flow", [tailor, montessori, compare, evaluate], ids=lambda flow: flow.name)
def test_form_has_no_markdown_link(flow: Flow[..., None]) -> None:
    """Prefect's new interface shows the texts of a form as they are."""
    assert re.findall(r"\[[^]]*\]\([^)]*\)", parameter_schema(flow.fn).model_dump_json()) == []


@pytest.mark.parametrize("size", ["quickstart", "paper-1b", "paper-8b"])
def test_empty_form_is_its_preset(size: Any) -> None:
    expected = read_experiment(Path(size)).model_copy(update={"name": "mine"})
    assert Tailored(name="mine", size=size).experiment() == expected


@pytest.mark.parametrize("size", ["1b", "8b"])
def test_pilot_differs_from_its_preset_in_sizes(size: str) -> None:
    pilot = parse(Tailored, {"size": f"pilot-{size}"}, "test").experiment()
    whole = read_experiment(Path(f"paper-{size}"))
    sizes = {"name", "iterations", "warmup", "influence", "training"}
    assert pilot.model_dump(exclude=sizes) == whole.model_dump(exclude=sizes)
    assert (pilot.iterations, pilot.influence.probing_examples, pilot.training.examples) == (1, 256, 256)
    assert pilot.warmup.learning_rate == whole.warmup.learning_rate


def test_form_values_replace_those_of_preset() -> None:
    tailored = Tailored(
        teacher="t", student="s", seeds="seeds.jsonl", reference="r.jsonl", evaluation="e.jsonl", cluster="workstation"
    )
    experiment, preset = tailored.experiment(), read_experiment(Path("quickstart"))
    assert (experiment.teacher.model, experiment.student.model) == ("t", "s")
    assert experiment.student.max_length == preset.student.max_length
    assert (experiment.seed_pool.path, experiment.reference.path) == ("seeds.jsonl", "r.jsonl")
    assert (experiment.reference.limit, experiment.evaluation.limit) == (24, 32)
    assert experiment.cluster.resources.influence.gpus_per_node == 1
    assert experiment.synthesis == preset.synthesis


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"reference": "r.jsonl"}, "reference is set, but evaluation is not"),
        ({"evaluation": "e.jsonl"}, "evaluation is set, but reference is not"),
        ({"size": "paper"}, "size: Input should be 'quickstart', 'pilot-1b'"),
        ({"techer": "t"}, "did you mean 'teacher'"),
        ({"name": "../up"}, "name: a name has letters"),
        ({"pilot": "../up"}, "pilot: a name has letters"),
    ],
)
def test_bad_values_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Tailored, content, "test")


@pytest.mark.parametrize("size", ["quickstart", "pilot-1b", "paper-8b"])
def test_full_form_has_values_of_experiment(size: Any) -> None:
    experiment = Tailored(name="mine", size=size, teacher="a/teacher & (more) 'é'").experiment()
    deployment = uuid4()
    path, _, query = form_address(deployment, form_values(experiment, True, False)).partition("?")
    assert path == form_address(deployment)
    assert re.fullmatch(r"[\w.=%-]+", query, re.ASCII)  # so that Markdown does not end the link
    values = json.loads(parse_qs(query)["parameters"][0])
    assert Experiment(**values["experiment"]) == experiment
    assert (values["approve"], values["submit_driver"]) == (True, False)


def test_missing_cluster_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        Tailored(cluster="nowhere.yaml").experiment()


def plan_of(folder: Path, model: Path, **values: Any) -> tuple[Run, str]:
    tailored = Tailored(name="mine", teacher=str(model), student=str(model), **values)
    run, _ = open_run(tailored.experiment(), folder / "mine")
    return run, describe_plan(run, tailored.preset, None, None)


def test_plan_says_what_where_and_how_long(tiny_llama: Path, tmp_path: Path) -> None:
    run, plan = plan_of(tmp_path, tiny_llama)
    assert f"`{tiny_llama}` learns to write what helps `{tiny_llama}`" in plan
    assert "| iteration 1: teacher update | about 24 pairs |" in plan
    assert "on this machine, by its speed" in plan
    assert "| influence | 1 | 1 | 0 | this machine |" in plan
    assert "judging" not in plan
    assert str(run.folder / "config.yaml") in plan


def test_plan_of_resumed_run_warns_of_no_models(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models may be on the disk already."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    run, plan = plan_of(tmp_path, tiny_llama)
    assert "models may need" in plan
    (run.folder / "warmup").mkdir()
    (run.folder / "warmup" / "stage.json").write_text("{}")
    assert "models may need" not in plan_of(tmp_path, tiny_llama)[1]


def test_flow_runs_warn_of_space(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name the folder as a worker knows it."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid4()))
    monkeypatch.setenv(RUN_ROOT, str(tmp_path))
    logged: list[str] = []
    for module in ("experiment", "study"):
        monkeypatch.setattr(f"flows.{module}.log_warnings", logged.extend)
    monkeypatch.setattr("flows.study._compare", lambda study, folder, seeded: None)
    models = {"teacher": str(tiny_llama), "student": str(tiny_llama)}
    experiment = Tailored(name="mine", **models).experiment()
    study = Study(name="studied", experiment=experiment, methods=("montessori", "self_instruct"), seeds=(0,))
    for start, folder in ((lambda: start_run(experiment), "mine"), (lambda: compare.fn(study), "studied")):
        logged.clear()
        start()
        (warning,) = (line for line in logged if "models may need" in line)
        assert warning.startswith(f"{tmp_path / folder}: ")
        assert "Free space, or choose another MONTESSORI_RUN_ROOT. If" in warning
    monkeypatch.setenv(RUN_ROOT, "/proc/none")
    with pytest.raises(UserError, match="free space or choose another MONTESSORI_RUN_ROOT"):
        start_run(experiment)


@pytest.mark.slow
def test_plan_forecasts_from_a_pilot(finished_run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    pilot = reopen_run(finished_run / "runs" / "tiny")
    run, _ = plan_of(tmp_path, tiny_llama)
    plan = describe_plan(run, "quickstart", pilot, None)
    assert (
        "on 1 node(s) with 0 GPUs, without waiting in queues and without failures; forecast from the pilot `tiny`"
        in plan
    )
    with pytest.raises(UserError, match="this pilot is not finished"):
        describe_plan(run, "quickstart", run, None)

"""An evaluation of any model: what it checks, and what the same name again does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cluster.backends.held import _names_of
from flows.cli.evaluate import _derive_name
from flows.evaluation import RESULT, Evaluation, evaluate, evaluated_experiment, open_evaluation
from montessori_core.config import parse_experiment
from montessori_core.data.sources import load_tasks
from montessori_core.errors import ConfigError, UserError
from support.reports import write_run, write_study
from support.runs import invoke
from support.slurm_lab import become_login_node


def write_set(path: Path, topics: list[str]) -> None:
    """Write an example for each topic."""
    path.write_text(
        "".join(json.dumps({"instruction": f"Describe {topic}.", "output": topic}) + "\n" for topic in topics)
    )


def opened(folder: Path, model: Path, **sections: Any) -> tuple[Evaluation, list[str]]:
    """Open the evaluation `mine` in a folder; return it and its warnings."""
    content = {"student": {"max_length": 128}, "evaluation": {"path": str(folder / "set.jsonl")}} | sections
    return open_evaluation(evaluated_experiment(content, str(model), "mine", "test"), folder / "mine")


def test_changed_evaluation_set_replaces_the_copy(tiny_llama: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "set.jsonl", ["rivers", "stones"])
    evaluation, warnings = opened(tmp_path, tiny_llama)
    result = evaluation.run.folder / RESULT
    result.touch()
    assert warnings == opened(tmp_path, tiny_llama)[1] == []
    assert result.exists()
    write_set(tmp_path / "set.jsonl", ["birds"])
    _, warnings = opened(tmp_path, tiny_llama)
    assert not result.exists()
    (warning,) = warnings
    assert "set.jsonl has changed since the last evaluation named mine; the held-out loss is computed again" in warning
    (example,) = load_tasks(evaluation.run.source_file("evaluation"))
    assert example.instruction == "Describe birds."


def test_result_of_a_changed_model_is_removed(tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    write_set(tmp_path / "set.jsonl", ["rivers"])
    evaluation, _ = opened(tmp_path, model)
    result = evaluation.run.folder / RESULT
    result.touch()
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    _, (warning,) = opened(tmp_path, model)
    assert "model has changed since the last evaluation named mine; it is evaluated again" in warning
    assert not result.exists()
    result.touch()
    assert opened(tmp_path, model)[1] == []
    assert result.exists()


def test_opening_keeps_held_jobs_of_killed_driver(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver that then starts waits for their steps, and uses them."""
    write_set(tmp_path / "set.jsonl", ["rivers"])
    held = f"17|17_0|RUNNING|None|3:00:00|{_names_of(tmp_path / 'mine')}12345678"
    calls = tmp_path / "calls"
    script = f'echo "$0 $*" >>{calls}'
    become_login_node(monkeypatch, tmp_path, squeue=f"{script}; echo '{held}'", scancel=script)
    cluster = {"profile": "slurm", "slurm": {"hold": {}}}
    evaluation, _ = opened(tmp_path, tiny_llama, cluster=cluster)
    (evaluation.run.folder / "held").mkdir()
    opened(tmp_path, tiny_llama, cluster=cluster)
    assert not calls.exists() or "scancel" not in calls.read_text()


def test_changed_settings_of_an_evaluation_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "set.jsonl", ["rivers"])
    write_set(tmp_path / "other.jsonl", ["birds"])
    opened(tmp_path, tiny_llama)
    with pytest.raises(UserError) as refusal:
        opened(tmp_path, tiny_llama, evaluation={"path": str(tmp_path / "other.jsonl")})
    message = str(refusal.value)
    assert "teacher" not in message
    assert "mine: this evaluation was started with another configuration:\n  evaluation.path: " in message
    assert (
        f"Use another --name for the new configuration, or resume the evaluation unchanged: montessori evaluate {tiny_llama}"
        in message
    )
    assert f"--config {tmp_path}/mine/config.yaml --run-root {tmp_path} --name mine" in message


def test_evaluation_checks_what_it_uses_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """The teacher, the seeds, the reference set, filters and recipes are of no use to an evaluation."""
    write_set(tmp_path / "set.jsonl", ["rivers"])
    unused = {
        "teacher": {"model": "absent/teacher"},
        "seed_pool": {"path": str(tmp_path / "absent.jsonl")},
        "reference": {"path": str(tmp_path / "set.jsonl")},
        "synthesis": {"filters": [{"filter": "judge"}], "engine": "transformers"},
        "teacher_update": {"max_length": 10**6},
        "training": {"batch_size": 3},
        "influence": {"sequential": {"error_rate": 0.1}, "estimator": "exact"},
        "tracking": ["wandb"],
        "cluster": {"resources": {"training": {"processes_per_node": 7}}},
    }
    evaluation, _ = opened(tmp_path, tiny_llama, **unused)
    assert evaluation.run.experiment.synthesis.engine == "transformers"
    for section, content in (("synthesis", {"enginee": "vllm"}), ("trainings", {}), ("influence", "exact")):
        with pytest.raises(ConfigError, match=section):
            opened(tmp_path, tiny_llama, **{section: content})


@pytest.mark.parametrize(
    ("configured", "options", "expected"),
    [
        (None, [], "main"),
        (None, ["--set", "student.revision=v2"], "v2"),
        ("group/other", [], "main"),
        ("group/other", ["--set", "student.revision=v2"], "v2"),
        ("group/absent", [], "v1"),  # as in the config.yaml of an evaluation that is resumed
        ("group/absent", ["--set", "student.revision=v2"], "v2"),
    ],
)
@pytest.mark.parametrize("command", [["evaluate"], ["train", "set.jsonl", "--output", "out"]])
def test_revision_is_of_the_model(
    command: list[str], configured: str | None, options: list[str], expected: str, tmp_path: Path
) -> None:
    """A configuration's revision is that of its own student; --set changes it."""
    write_set(tmp_path / "set.jsonl", ["rivers"])
    student = {"model": configured, "revision": "v1"} if configured else {}
    (tmp_path / "config.yaml").write_text(json.dumps({"student": student}))
    name, *more = command
    code, output = invoke(name, "group/absent", *more, "--config", "config.yaml", *options, cwd=tmp_path)
    assert code == 1
    assert f"'group/absent', revision {expected}, cannot be downloaded" in " ".join(output.split())


def test_flow_leaves_out_revision_of_another_model() -> None:
    student = {"model": "group/other", "revision": "v1"}
    experiment = parse_experiment({"teacher": {"model": "group/other"}, "student": student}, "test")
    for model, revision in (("group/other", "v1"), ("group/absent", "main")):
        with pytest.raises(UserError, match=f"'{model}', revision {revision}, cannot be downloaded"):
            evaluate.fn(experiment, model, "mine")


def test_evaluation_and_run_folders_are_kept_apart(tiny_llama: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "trial")
    write_study(tmp_path / "runs" / "study")
    for name in ("trial", "study"):
        code, output = invoke("evaluate", str(tiny_llama), "--name", name, cwd=tmp_path)
        assert (code, "holds a run or a study; give the evaluation another --name" in " ".join(output.split())) == (
            1,
            True,
        )
    write_set(tmp_path / "set.jsonl", ["rivers"])
    opened(tmp_path, tiny_llama)
    resume = f"montessori evaluate {tiny_llama} --config {tmp_path}/mine/config.yaml"
    commands = (["resume", "mine"], ["retry", "mine"], ["run", "quickstart", "--run-root", ".", "--name", "mine"])
    for words in (*commands, ["compare", "quickstart", "--run-root", ".", "--set", "name=mine"]):
        code, output = invoke(*words, cwd=tmp_path)
        assert code == 1
        assert "mine holds an evaluation, not a run; resume it with: cd " in output
        assert resume in output
    stage = tmp_path / "mine" / "evaluation"
    stage.mkdir()
    code, output = invoke("status", "mine", cwd=tmp_path)
    assert code == 0, output
    assert "no stage has started" in output


def test_students_of_runs_are_named_by_run(tmp_path: Path) -> None:
    student = write_run(tmp_path / "first run") / "iteration-1" / "student" / "part-00000"
    assert _derive_name(str(student)) == "evaluation-first-run-iteration-1-student-part-00000"
    assert _derive_name("group/model") == "evaluation-model"


@pytest.mark.parametrize("folder", ["a..b", "m" * 100, "..."])
def test_evaluation_derives_a_valid_name(folder: str, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / folder).symlink_to(tiny_llama)
    options = "--set", "student.max_length=100000"  # more than the model's positions, which are checked later
    code, output = invoke("evaluate", folder, *options, cwd=tmp_path)
    assert code == 1
    assert "student.max_length" in output
    assert "is not valid" not in output

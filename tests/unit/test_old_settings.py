"""Settings that earlier versions accepted: folders with them can be read, and new jobs with them are refused."""

import json
import platform
import subprocess
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.ledger import Ledger, Submission
from cluster.processes import start_time
from montessori_core.config import Cluster, read_experiment
from montessori_core.errors import UserError
from support import squares
from support.row_programs import as_shards
from support.runs import configuration, invoke
from tasks.resume import record_command
from tasks.run import open_run

IDLE = {"cluster": {"resources": {"generation": {"processes_per_node": 2}}}}
SMALL_AUDIT = {"influence": {"screening": {"error_rate": 0.01}}}


def write_old_run(folder: Path, model: Path, sections: dict[str, Any]) -> None:
    """Open a run, and add sections to its records as an earlier version would have written them."""
    open_run(read_experiment(configuration(folder.parent, model)), folder)
    for name in ("config.yaml", "opened.yaml"):
        content = yaml.safe_load((folder / name).read_text())
        (folder / name).write_text(yaml.safe_dump(merged(content, sections)))


def merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with changed fields."""
    inner = {name: merged(content[name], value) for name, value in changes.items() if isinstance(value, dict)}
    return content | changes | inner


def write_old_evaluation(folder: Path) -> None:
    """Write what an evaluation of an earlier version recorded."""
    folder.mkdir()
    record_command(folder, ["evaluate", "model"], "model", folder / "evaluation.json", Cluster())
    record = json.loads((folder / "command.json").read_text())
    (folder / "command.json").write_text(json.dumps(merged(record, IDLE)))


@pytest.mark.parametrize("kind", ["run", "evaluation"])
def test_jobs_with_idle_processes_can_be_cancelled(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    if kind == "run":
        write_old_run(folder, tiny_llama, IDLE)
    else:
        write_old_evaluation(folder)
    stage = squares.stage(folder)
    stage.write(as_shards(*squares.SHARDS))
    ledger = Ledger(stage.folder / "jobs")
    with subprocess.Popen(["sleep", "600"]) as job:
        threading.Thread(target=job.wait).start()  # a process that nobody waits for does not end
        try:
            ids = [f"{job.pid}:{start_time(job.pid)}"]
            ledger.submissions = [Submission("jobs", "w", [[0]], platform.node(), 1, steps=False, ids=ids)]
            ledger.save()
            for command, shown in (("status", "running"), ("cancel", "cancelled")):
                code, output = invoke(command, str(folder), cwd=tmp_path)
                assert (code, shown in output) == (0, True), output
            assert job.poll() is not None
        finally:
            job.kill()


def test_record_with_other_invalid_settings_is_named(tmp_path: Path) -> None:
    """A command of a later version may have them."""
    write_old_evaluation(tmp_path / "mine")
    record = (tmp_path / "mine" / "command.json").read_text()
    (tmp_path / "mine" / "command.json").write_text(record.replace('"local"', '"cloud"'))
    code, output = invoke("status", "mine", cwd=tmp_path)
    assert code == 1
    assert "mine: the cluster of its command.json is not valid" in " ".join(output.split())


def test_run_with_idle_processes_continues_with_the_remedy(tiny_llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "run" / "config.yaml"
    write_old_run(config.parent, tiny_llama, IDLE)
    with pytest.raises(UserError, match="cluster.resources.generation: nodes is 1 and processes_per_node 2"):
        open_run(read_experiment(config), config.parent)
    overrides = ["cluster.resources.judging.processes_per_node=2"]  # no API is asked: there are no such jobs
    overrides += ["cluster.resources.generation.processes_per_node=1"]
    open_run(read_experiment(config, tuple(overrides)), config.parent)


def test_finished_run_with_idle_processes_opens(tiny_llama: Path, tmp_path: Path) -> None:
    """It has no jobs, unless a benchmark is added."""
    run = tmp_path / "run"
    write_old_run(run, tiny_llama, IDLE)
    (run / "iteration-1").mkdir()
    (run / "iteration-1" / "metrics.json").write_text("{}")
    (run / "report.html").touch()
    open_run(read_experiment(run / "config.yaml"), run)
    with pytest.raises(UserError, match="cluster.resources.generation: nodes is 1 and processes_per_node 2"):
        open_run(read_experiment(run / "config.yaml", ("benchmarks.tasks=[{name: mmlu}]",)), run)


@pytest.mark.parametrize("command", ["influence", "validate", "evaluate", "doctor"])
def test_command_refuses_idle_processes_of_its_stages(command: str, tiny_llama: Path, tmp_path: Path) -> None:
    stages = {"influence": ["influence"], "validate": ["influence"], "evaluate": ["generation", "evaluation"]}
    options = ["--examples", "absent.jsonl", "--out", "out" if command == "validate" else "out.parquet"]
    words = {
        "evaluate": [str(tiny_llama), "--set", "evaluation.path=absent.jsonl"],
        "doctor": [],
    }.get(command, ["--student", str(tiny_llama), *options])
    for stage in ("generation", "influence", "evaluation", "judging"):
        (tmp_path / "cluster.yaml").write_text(json.dumps({"resources": {stage: {"processes_per_node": 2}}}))
        code, output = invoke(command, *words, "--cluster", "cluster.yaml", cwd=tmp_path)
        refused = "processes_per_node 2, but one process computes" in " ".join(output.split())
        assert (code, refused) == (1, stage in stages.get(command, [stage])), output


def test_run_with_small_audit_continues(tiny_llama: Path, tmp_path: Path) -> None:
    """It has measured exactly; other influence would compute its later stages again."""
    run = tmp_path / "run"
    write_old_run(run, tiny_llama, SMALL_AUDIT)
    open_run(read_experiment(run / "config.yaml", ("preferences.max_pairs=3",)), run)
    with pytest.raises(UserError, match="influence.screening.audit_examples: 100 are too few .* set at least 198, or"):
        open_run(read_experiment(run / "config.yaml", ("influence.reference_batch_tokens=64",)), run)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ((), True),
        (("influence.screening.audit_examples=198",), False),
        (("influence.estimator=exact",), False),
        (("influence.estimator=linear",), False),
    ],
)
def test_new_run_with_small_audit_is_refused(
    overrides: tuple[str, ...], refused: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path, tiny_llama)
    experiment = read_experiment(config, ("influence.screening.error_rate=0.01", *overrides))
    with (
        pytest.raises(UserError, match="set at least 198, or influence.estimator: exact") if refused else nullcontext()
    ):
        open_run(experiment, tmp_path / "run")


def test_task_files_of_one_name_are_refused_in_new_runs(tiny_llama: Path, tmp_path: Path) -> None:
    """Reports show them without their folders. A run of an earlier version is read and continued."""
    benchmarks = {"benchmarks": {"tasks": [{"name": f"/data/{field}/exam.yaml"} for field in ("law", "medicine")]}}
    run = tmp_path / "run"
    write_old_run(run, tiny_llama, benchmarks)
    old = read_experiment(run / "config.yaml")
    open_run(old, run)
    with pytest.raises(UserError, match="two tasks are called exam.yaml; rename one of the files"):
        open_run(old, tmp_path / "new")

"""A run through the command line: its files, output, resuming, and refused input."""

import csv
import io
import json
import shutil
import sqlite3
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import yaml
from prefect.exceptions import FlowPauseTimeout

from cluster.records import Description, read_record
from cluster.shards import Shards
from cluster.simulation import ClusterSpec, FailureModel
from cluster.stage import Stage
from cluster.status import stages_of
from flows.cli.console import console, open_console
from flows.cli.tables import print_summary
from flows.forecast import costs_may_differ, forecast, planned_stages
from montessori_core.config import DataSource, Experiment, Preferences, read_experiment
from montessori_core.data import tables as schema
from montessori_core.data.rows import Rows
from montessori_core.data.sources import read_tasks, write_tasks
from montessori_core.errors import UserError
from montessori_core.evaluation.kinds import read_classifier
from montessori_core.influence.screening import screening_report
from montessori_core.layout import CONFIG, OPENED
from montessori_core.models.adapters import adapted_model
from montessori_core.models.fetch import fingerprint
from support import ROOT
from support.judges import QUESTIONS, Judge, judged
from support.reports import Page
from support.runs import call, configuration, digests, finish_lean, invoke
from support.squares import key_of
from tasks.approval import check_approval
from tasks.run import Run, open_run, reopen_run


@pytest.fixture(scope="module")
def undisturbed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run that tests of this file may change."""
    return Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("undisturbed"), dirs_exist_ok=True))


def test_run_writes_every_documented_file(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "tiny"
    for name in ("config.yaml", "provenance.json", "report.html", "iteration-1/metrics.json"):
        assert (run / name).stat().st_size > 0
    tables = {
        "instructions": schema.INSTRUCTIONS,
        "examples": schema.EXAMPLES,
        "influence": schema.INFLUENCE,
        "preferences": schema.PREFERENCES,
        "training/examples": schema.EXAMPLES,
        "training-influence": schema.INFLUENCE,
    }
    for name, expected in tables.items():
        assert schema.read_table(run / "iteration-1" / f"{name}.parquet", expected).num_rows > 0
    moments = {path.relative_to(run).parts[:2] for path in run.rglob("adamw.safetensors")}
    assert moments == {("iteration-1", "warmup")}
    for name in ("warmup", "teacher", "student"):
        assert (run / "iteration-1" / name / "part-00000" / "model.safetensors").exists()
    metrics = json.loads((run / "iteration-1" / "metrics.json").read_text())
    assert set(metrics["held_out_loss"]) == {"student", "untrained", "unmodified"}
    screening = screening_report(schema.read_table(run / "iteration-1" / "influence.parquet", schema.INFLUENCE))
    assert screening is not None
    assert (screening.audited, screening.confirmed) == (16, 0)  # fewer than an audit: all exact
    funnel = metrics["synthesis"]["probing"]
    assert funnel["kept"] == 20
    assert sum(count for step, count in funnel.items() if step != "candidates") == funnel["candidates"]


@pytest.mark.slow
def test_run_counts_own_filter(talking_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "peopled.py").write_text(
        "from montessori_core.synthesis.filters.filter import Filter\n"
        "def reject(candidate):\n"
        "    return 'about people' if 'people' in candidate.instruction else None\n"
        "NO_PEOPLE = Filter('no_people', 'Instructions without people.', lambda settings, context: reject)\n"
    )
    change = "synthesis.filters=[length, 'peopled:NO_PEOPLE', rouge_l]"
    config = configuration(tmp_path, talking_llama)
    finish_lean("run", str(config), "--set", change, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    folder = tmp_path / "runs" / "tiny" / "iteration-1"
    examples = schema.read_table(folder / "examples.parquet", schema.EXAMPLES)["instruction"].to_pylist()
    assert [instruction for instruction in examples if "people" in instruction] == []
    reason = "no_people: about people"
    assert json.loads((folder / "metrics.json").read_text())["synthesis"]["probing"][reason] > 0
    assert reason in (tmp_path / "runs" / "tiny" / "report.html").read_text()


def test_intermediate_and_both_teachers_are_measured(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "tiny"
    metrics = json.loads((run / "iteration-1" / "metrics.json").read_text())
    kept, last = metrics["teacher_checkpoints"]
    assert kept["step"] == last["step"] // 2
    assert kept["held_out_loss"] != last["held_out_loss"] == metrics["held_out_loss"]["student"]["mean"]
    assert schema.read_table(run / "unmodified" / "training-influence.parquet", schema.INFLUENCE).num_rows == 4


def test_forecast_from_run_scales_with_sizes(undisturbed: Path) -> None:
    run = reopen_run(undisturbed / "runs" / "tiny")
    stages = stages_of(run.folder)
    works = planned_stages(run, run.experiment)
    assert [work.name for work in works] == [str(folder.relative_to(run.folder)) for folder in stages]
    for folder, work in zip(stages, works, strict=True):
        manifests = [json.loads(path.read_text()) for path in folder.glob("part-*.manifest.json")]
        took = sum(manifest["seconds"] + manifest["opening"] for manifest in manifests)
        assert sum(map(len, work.jobs)) == len(manifests)
        assert sum(map(sum, work.jobs)) + len(work.jobs) * work.opening == pytest.approx(took, rel=0.01)

    sizes = {
        "influence": {"probing_examples": 160, "later_probing_examples": 80},
        "training": {"examples": 60},
        "comparison": {"influence_examples": 100},  # there are only 60
    }
    changed = {name: getattr(run.experiment, name).model_copy(update=fields) for name, fields in sizes.items()}
    larger = run.experiment.model_copy(update={**changed, "iterations": 2})
    seconds = {work.name: sum(map(sum, work.jobs)) for work in planned_stages(run, larger)}
    before = {work.name: sum(map(sum, work.jobs)) for work in works}
    growth = {name: seconds[name] / before[name] for name in before}
    for name, factor in {
        "influence": 10,
        "student": 10,
        "warmup": 1,
        "evaluation": 1,
        "training-influence": 15,
    }.items():
        assert growth[f"iteration-1/{name}"] == pytest.approx(factor)
    assert growth["iteration-1/training/instructions-1"] == pytest.approx(10, rel=0.1)  # complete prompts
    assert growth["iteration-1/instructions-1"] == pytest.approx((160 + 4) / (16 + 4), rel=0.1)
    assert "iteration-2/warmup" not in seconds  # the last iteration's student is warm
    assert seconds["iteration-2/influence"] == pytest.approx(5 * before["iteration-1/influence"])
    assert [name for name in seconds if name.startswith("un")] == [name for name in before if name.startswith("un")]


def test_forecast_counts_confirmed_examples(tmp_path: Path) -> None:
    stage = Stage(
        "influence-confirm", 1, "p:f", {}, {}, {}, tmp_path / "iteration-1" / "influence-confirm", kind="influence"
    )
    rows = [{"example_id": str(n)} for n in range(10)]
    stage.write(Shards(Rows.of(rows), len(rows)))
    (stage.folder / "jobs").mkdir()
    stage.record_start("1", "here", restarts=0)
    with stage.commit_part(0, key_of(stage, rows), len(rows), "1") as part:
        part.touch()

    def probing(examples: int) -> Experiment:
        model = {"model": "smollm2-135m"}
        sizes = {"probing_examples": examples, "examples_per_shard": 1, "screening": {"audit_examples": 100}}
        return Experiment.model_validate({"teacher": model, "student": model, "influence": sizes})

    (work,) = planned_stages(Run(tmp_path, probing(150)), probing(1100))
    assert sum(map(len, work.jobs)) == 10 * 1000 / 50


def test_forecast_names_settings_that_change_costs(tmp_path: Path) -> None:
    def experiment(pairs: int | None, measured: int) -> Experiment:
        model = {"model": "smollm2-135m"}
        sections = {"preferences": {"max_pairs": pairs}, "comparison": {"influence_examples": measured}}
        return Experiment.model_validate({"teacher": model, "student": model, **sections})

    assert costs_may_differ(experiment(None, 4), experiment(9, 100)) == []
    assert costs_may_differ(experiment(9, 0), experiment(None, 4)) == [
        "comparison.influence_examples > 0: False -> True",
        "preferences.max_pairs: 9 -> None",
    ]
    begun = Run(tmp_path, experiment(None, 4))
    with pytest.raises(UserError, match="this pilot is not finished"):
        forecast(begun, begun.experiment, [ClusterSpec(1, 8, 64)], FailureModel(), 1)


def test_forecast_simulates_experiment_from_pilot(undisturbed: Path) -> None:
    pilot = "runs/tiny"
    arguments = [
        "--nodes",
        "1",
        "--nodes",
        "4",
        "--gpus-per-node",
        "0",
        "--preemption-hours",
        "0.05",
        "--simulations",
        "5",
    ]
    code, output = invoke(
        *("forecast", "--pilot", pilot, "--set", "student.max_length=64", *arguments), cwd=undisturbed
    )
    assert code == 0, output
    assert "costs are used nevertheless: student.max_length" in output
    assert "iteration-1/influence" in output
    whole = output.split("the whole experiment")[1].splitlines()
    assert [line.split()[1] for line in whole if line[:1] == "│"] == ["1", "4"]
    assert "jobs at a time" in output
    code, output = invoke("forecast", "--pilot", "runs", cwd=undisturbed)
    assert (code, "not a run" in output) == (1, True)
    code, output = invoke("forecast", cwd=undisturbed)
    assert (code, "--pilot" in output) == (2, True)


@pytest.mark.parametrize("part", ["", "seed-3"])
def test_study_is_resumed_as_a_whole(tmp_path: Path, part: str) -> None:
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "study.yaml").touch()
    folder = tmp_path / part
    run = ["run", "quickstart", "--run-root", str(folder.parent), "--name", folder.name]
    for command in (["resume", str(folder)], ["retry", str(folder)], run):
        code, output = invoke(*command, cwd=tmp_path)
        assert code == 1
        assert not (folder / "config.yaml").exists()
        assert f"study; resume with: montessori compare {tmp_path / 'study.yaml'}" in " ".join(output.split())


def test_relative_model_is_found_from_another_directory(talking_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(talking_llama, tmp_path / "model")
    config = configuration(tmp_path, Path("model"))
    with chdir(tmp_path):
        open_run(read_experiment(config), tmp_path / "runs" / "tiny")
    (tmp_path / "other").mkdir()
    code, output = invoke("retry", "../runs/tiny", "--shard", "0", cwd=tmp_path / "other")
    assert code == 1
    assert "no stage" in output, output
    code, output = invoke("retry", "../runs/tiny", "--stage", "iteration-1/influence", cwd=tmp_path / "other")
    assert code == 1
    assert "--stage needs --shard" in output


@pytest.mark.slow
def test_added_benchmarks_compute_nothing_else(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    manifests = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.manifest.json")}
    content = yaml.safe_load((undisturbed / "tiny.yaml").read_text())
    judge = Judge()
    sections = judged(judge, tmp_path)
    sections["benchmarks"]["mt_bench"] = sections["benchmarks"]["mt_bench_references"] = None
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(content | sections))
    try:
        code, output = call("run", str(config), cwd=tmp_path, MONTESSORI_CACHE=str(tmp_path / "cache"))
    finally:
        judge.close()
    assert code == 0, output
    assert {path: path.read_bytes() for path in manifests} == manifests
    metrics = json.loads((tmp_path / "runs" / "tiny" / "iteration-1" / "metrics.json").read_text())
    assert {one["model"] for one in metrics["scores"]} == {"student", "untrained", "unmodified"}
    (pair,) = metrics["head_to_head"]
    assert (pair["model"], pair["against"]) == ("student", "unmodified")
    assert pair["wins"] + pair["ties"] + pair["losses"] == len(QUESTIONS)
    sets = [(one["data"], one["benchmark"], one["items"]) for one in metrics["contamination"]]
    data = ("training set", "unmodified teacher's training set")
    assert sets == [(name, *benchmark) for name in data for benchmark in (("held-out", 4), ("alpaca_eval", 5))]


def test_prefect_has_artifact_of_every_stage(undisturbed: Path) -> None:
    database = sqlite3.connect(undisturbed / "prefect" / "prefect.db")
    flows = {name for (name,) in database.execute("select name from flow_run")}
    parts = ("iteration 1", "unmodified teacher", "teacher checkpoints, iteration 1")
    assert flows == {"tiny", *(f"tiny: {part}" for part in parts)}
    described = {text for (text,) in database.execute("select description from artifact")}
    for stage in (
        "iteration 1: warm-up and probing set: instructions",
        "iteration 1: student warm-up",
        "iteration 1: influence of the probing set: table",
        "Preference pairs - iteration 1",
        "iteration 1: teacher update",
        "iteration 1: student training",
        "iteration 1: held-out loss",
        "Report of tiny",
    ):
        assert any(text.startswith(stage) for text in described), stage


def test_summary_names_main_results(undisturbed: Path) -> None:
    output = (undisturbed / "output.txt").read_text()
    for text in ("preference pairs", "share that helps", "unmodified teacher", "report.html", "kept"):
        assert text in output
    (line,) = (line for line in output.splitlines() if "instructions of the target kind" in line)
    assert "not shown: a classifier of words" in line


def test_reports_show_share_of_target(undisturbed: Path, tmp_path: Path) -> None:
    """The same run, with the reference set of a built-in target."""
    run = Path(shutil.copytree(undisturbed / "runs" / "tiny", tmp_path / "tiny"))
    tasks = read_tasks(DataSource(path="builtin/maths"), "reference", with_response=True)
    write_tasks(tasks, run / "sources" / "reference.jsonl")
    folders = run / "iteration-1", run / "iteration-1" / "training"
    tables = [schema.read_table(folder / "examples.parquet", schema.EXAMPLES) for folder in folders]
    classifier = read_classifier(run)
    assert classifier is not None
    shares = [classifier.share(table["instruction"].to_pylist()) for table in tables]

    code, output = invoke("report", str(run), cwd=tmp_path)
    assert code == 0, output
    with (run / "report-data" / "target-kind-instructions-of-the-target-kind.csv").open() as file:
        values = [float(row["share of the instructions of the target kind"]) for row in csv.DictReader(file)]
    assert values == [share.value for share in shares]
    page = Page((run / "report.html").read_text())
    for table in tables:
        assert table.sort_by("example_id")["instruction"][0].as_py() in page.text

    printed = io.StringIO()
    with redirect_stdout(printed), patch.dict(vars(console), vars(open_console())):
        print_summary(reopen_run(run))
    before, after = (f"{share.value:.0%}" for share in shares)
    assert (
        f"{before} before the teacher update, {after} after (classifier: 0.85 balanced accuracy)" in printed.getvalue()
    )


def test_run_announces_its_stages_before_any_job(undisturbed: Path) -> None:
    output = (undisturbed / "output.txt").read_text()
    announced, separator, rest = output.partition("GFLOP/s")
    assert separator
    assert "iteration 1: probing set: instructions" not in announced  # a progress bar
    for stage in (
        "iteration 1: warm-up and probing set",
        "iteration 1: teacher update",
        "unmodified teacher: held-out loss",
    ):
        assert stage in announced
        assert stage in rest
    provenance = json.loads((undisturbed / "runs" / "tiny" / "provenance.json").read_text())
    assert provenance["driver"]["gflops"] > 0


def test_run_ends_with_time_of_each_stage(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "tiny"
    table = (undisturbed / "output.txt").read_text().split("time of each stage")[1]
    rows = {line.split()[1]: line.split() for line in table.splitlines() if line.startswith("│")}
    stages = [str(folder.relative_to(run)) for folder in stages_of(run)]
    assert [name for name in rows if name != "all"] == stages
    assert all(float(rows[stage][5].replace(",", "")) > 0 for stage in stages if stage.endswith("student"))


def test_compared_teachers_get_same_prompts(undisturbed: Path) -> None:
    run = undisturbed / "runs" / "tiny"
    prompts = [
        set(pq.read_table(run / folder / "training" / "instructions.parquet")["prompt"].to_pylist())
        for folder in ("iteration-1", "unmodified")
    ]
    shared = prompts[0] & prompts[1]
    assert len(shared) >= min(map(len, prompts)) > 0


@pytest.mark.slow
def test_unanswered_approval_says_what_to_do(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**options: object) -> None:
        raise FlowPauseTimeout("Flow run was paused and never resumed")

    monkeypatch.setattr("tasks.approval.pause_flow_run", time_out)
    run = reopen_run(undisturbed / "runs" / "tiny")
    folder = run.iteration(1)
    with pytest.raises(UserError, match="iteration 1: nobody has approved .* Retry this run to be asked again"):
        check_approval(run, 1, folder / "influence.parquet", folder / "preferences.parquet", "pause")
    assert not (folder / "approved.json").exists()


def test_finished_run_says_so_and_computes_nothing(undisturbed: Path, shared_server: dict[str, str]) -> None:
    run = undisturbed / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.manifest.json")}
    code, output = call("run", str(undisturbed / "tiny.yaml"), cwd=undisturbed, **shared_server)
    assert code == 0, output
    assert "tiny is finished" in output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.manifest.json")} == before


def test_status_lists_every_stage_as_done(undisturbed: Path) -> None:
    code, output = invoke("status", "runs/tiny", cwd=undisturbed)
    assert code == 0
    assert "iteration-1/influence" in output
    assert "4/4" in output
    assert "incomplete" not in output


@pytest.mark.slow
def test_single_shard_is_recomputed_on_request(undisturbed: Path, shared_server: dict[str, str]) -> None:
    run = undisturbed / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.manifest.json")}
    expected = digests(run)
    arguments = ("retry", "runs/tiny", "--stage", "iteration-1/influence", "--shard", "2")
    code, output = call(*arguments, cwd=undisturbed, **shared_server)
    assert code == 0, output
    changed = {path.relative_to(run) for path, time_then in before.items() if path.stat().st_mtime_ns != time_then}
    assert changed == {Path("iteration-1/influence/part-00002.manifest.json")}
    assert digests(run) == expected
    for stage, shard, message in (
        ("nowhere", "0", "no stage 'nowhere'; its stages are"),
        ("iteration-1/influence", "9", "has no shard 9; its shards are 0 to 3"),
    ):
        code, output = invoke("retry", "runs/tiny", "--stage", stage, "--shard", shard, cwd=undisturbed)
        assert code == 1
        assert message in " ".join(output.split())


def test_changed_configuration_is_refused_with_difference(undisturbed: Path) -> None:
    code, output = invoke("run", "tiny.yaml", "--set", "warmup.examples=5", cwd=undisturbed)
    assert code == 1
    assert "started with another configuration" in output
    assert "warmup.examples: 4 -> 5" in output
    assert "--name" in output


@pytest.mark.slow
def test_changed_preferences_keep_upstream_stages(
    undisturbed: Path, shared_server: dict[str, str], tmp_path: Path
) -> None:
    """Pairs, teacher, training set, student and report of the finished run are recomputed, nothing before them."""
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    original, run = undisturbed / "runs" / "tiny", tmp_path / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.manifest.json")}
    tables, metrics = digests(run), json.loads((run / "iteration-1" / "metrics.json").read_text())
    report = (run / "report.html").stat().st_mtime_ns
    config = str(undisturbed / "tiny.yaml")
    settings = ["--set", "preferences.baseline=null_step", "--set", "preferences.max_pairs=3"]
    code, output = invoke("run", config, *settings, "--set", "warmup.examples=5", cwd=tmp_path)
    assert (code, "warmup.examples: 4 -> 5" in output, "max_pairs" in output) == (1, True, False)
    code, output = call("run", config, *settings, cwd=tmp_path, **shared_server)
    assert code == 0, output
    assert "the confirmation of influence near the threshold and later stages are computed again" in output
    assert "preferences.baseline: 'median' -> 'null_step'" in output
    changed = {path.parent.relative_to(run) for path, then in before.items() if path.stat().st_mtime_ns != then}
    kept = {path.parent.relative_to(run) for path in before} - changed
    first = Path("iteration-1")
    assert {first / name for name in ("teacher", "student", "evaluation", "training/responses-1")} <= changed
    assert {first / name for name in ("instructions-1", "warmup", "influence", "influence-audit")} <= kept
    assert {path for path in changed if path.parts[0] != "iteration-1"} == set()
    differing = {name for name, digest in digests(run).items() if digest != tables[name]}
    # The influence table has the screening report for the threshold, which may be equal for both.
    assert differing - {"influence"} == {"preferences", "training/instructions", "training/examples"}
    measured = [pq.read_table(folder / "iteration-1" / "influence.parquet") for folder in (run, original)]
    assert measured[0].equals(measured[1])
    assert pq.read_table(run / "iteration-1" / "preferences.parquet").num_rows == 3
    again = json.loads((run / "iteration-1" / "metrics.json").read_text())
    assert again["preferences"]["pairs"] == 3 != metrics["preferences"]["pairs"]
    assert again["held_out_loss"]["student"] != metrics["held_out_loss"]["student"]
    assert again["held_out_loss"]["unmodified"] == metrics["held_out_loss"]["unmodified"]
    assert (run / "report.html").stat().st_mtime_ns != report
    assert reopen_run(run).experiment.preferences == Preferences(baseline="null_step", max_pairs=3)


@pytest.mark.slow
def test_changed_comparison_keeps_other_stages(
    undisturbed: Path, shared_server: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    tables = [run / folder / "training-influence.parquet" for folder in ("iteration-1", "unmodified")]
    assert all(table.exists() for table in tables)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.manifest.json")}
    for examples in (0, 6):
        setting = f"comparison.influence_examples={examples}"
        code, output = call("run", str(undisturbed / "tiny.yaml"), "--set", setting, cwd=tmp_path, **shared_server)
        assert code == 0, output
        assert "the comparison and later stages are computed again" in output
        assert [table.exists() for table in tables] == [examples > 0] * 2  # the report would show those of before
        changed = {path.parent.name for path, then in before.items() if path.stat().st_mtime_ns != then}
        assert changed == ({"training-influence", "training-influence-audit"} if examples else set())
        metrics = json.loads((run / "iteration-1" / "metrics.json").read_text())
        used, unused = ({stage["stage"] for stage in metrics[kind]} for kind in ("stages", "unused_stages"))
        assert used | unused == {str(folder.relative_to(run)) for folder in stages_of(run)}
        assert (unused == set()) == (examples > 0)
        assert {Path(stage).name for stage in unused} <= {"training-influence", "training-influence-audit"}
        pilot = reopen_run(run)
        assert {work.name for work in planned_stages(pilot, pilot.experiment)} == used
        _, listed = invoke("status", str(run), cwd=tmp_path)
        assert all(("of earlier settings" in text) == (examples == 0) for text in (output, listed))
        assert ("training-influence" in listed.partition("of earlier settings")[0]) == (examples > 0)
    assert [pq.read_table(table).num_rows for table in tables] == [6, 6]


@pytest.mark.slow
def test_run_pilot_warns_before_measuring_rest(
    undisturbed: Path, shared_server: dict[str, str], tmp_path: Path
) -> None:
    settings = [
        *("influence.probing_examples=256", "influence.estimator=first_order", "influence.examples_per_shard=64"),
        "preferences.margin=100",  # in standard errors: no pair remains
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    code, output = call("run", str(undisturbed / "tiny.yaml"), *options, cwd=tmp_path, **shared_server)
    assert code == 1
    warning, end = output.index("examples make 0 preference pairs"), output.index("no preference pairs:")
    assert warning < end
    assert "lower preferences.margin" in output[warning:end]
    measured = tmp_path / "runs" / "tiny" / "iteration-1"
    pilot, others = (
        sum(pq.read_table(part).num_rows for part in (measured / stage).glob("part-*.parquet"))
        for stage in ("influence-pilot", "influence")
    )
    assert 64 <= pilot < 72
    assert pilot + others == pq.read_table(measured / "influence.parquet").num_rows == 256


def test_second_iteration_starts_from_first(finished_run: Path, shared_server: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.manifest.json")}
    output = finish_lean("run", "tiny.yaml", "--set", "iterations=2", cwd=tmp_path, **shared_server)
    assert "iteration 1: student training: training again, since a later iteration needs the AdamW moments" in output
    changed = [path for path, then in before.items() if path.stat().st_mtime_ns != then]
    assert changed == [run / "iteration-1" / "student" / "part-00000.manifest.json"]  # with the same weights
    shown = pq.read_table(run / "iteration-2" / "instructions.parquet")["demonstrations"].to_pylist()
    assert all(sum(name.startswith("i1-training") for name in demonstrations) == 1 for demonstrations in shown)
    assert not (run / "iteration-2" / "warmup").exists()
    assert schema.read_table(run / "iteration-2" / "influence.parquet", schema.INFLUENCE).num_rows == 8
    for number, betas in ((1, (0.9, 0.999)), (2, (0.8, 0.99))):  # of the training that left the moments
        for name in ("influence", "training-influence"):
            description = read_record(run / f"iteration-{number}" / name / "stage.json", Description)
            assert description is not None
            assert (description.settings["step"]["beta1"], description.settings["step"]["beta2"]) == betas


@pytest.mark.slow
def test_second_iteration_continues_teachers_adapter(
    finished_run: Path, shared_server: dict[str, str], tmp_path: Path
) -> None:
    """The adapter writes the training set and the next probing set; it stays an adapter of the configured teacher.

    Its pairs are made across prompts, and the likelihood of chosen outputs is part of its loss.
    """
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    changes = (
        "iterations=2",
        "teacher_update.lora={rank: 4, alpha: 8}",
        "teacher_update.sft_weight=0.5",
        "preferences.pairs=across_prompts",
    )
    options = [word for change in changes for word in ("--set", change)]
    finish_lean("run", "tiny.yaml", *options, cwd=tmp_path, **shared_server)
    run = reopen_run(tmp_path / "runs" / "tiny")
    teachers = [run.iteration(number) / "teacher" / "part-00000" for number in (1, 2)]
    assert [adapted_model(teacher) for teacher in teachers] == [run.initial_teacher().path] * 2
    assert len({fingerprint(teacher) for teacher in teachers}) == 2
    assert "Two instructions of any prompts" in (run.folder / "report.html").read_text()
    for number in (1, 2):
        pairs = schema.read_table(run.iteration(number) / "preferences.parquet", schema.PREFERENCES)
        measured = schema.read_table(run.iteration(number) / "influence.parquet", schema.INFLUENCE)
        assert 1 <= pairs.num_rows <= measured.num_rows // 2
        assert len(set(pairs["chosen_id"].to_pylist()) | set(pairs["rejected_id"].to_pylist())) == 2 * pairs.num_rows
        examples = schema.read_table(run.iteration(number) / "training" / "examples.parquet", schema.EXAMPLES)
        assert examples.num_rows == 6


@pytest.mark.slow
def test_failed_stage_is_reported_and_shown_in_status(
    undisturbed: Path, shared_server: dict[str, str], tmp_path: Path
) -> None:
    """Like the finished run, but no response fits into its student."""
    run = tmp_path / "runs" / "short"
    shutil.copytree(undisturbed / "runs" / "tiny", run)
    shutil.rmtree(run / "iteration-1" / "warmup")
    content = yaml.safe_load((run / CONFIG).read_text())
    content["student"]["max_length"] = 32
    for name in (CONFIG, OPENED):
        (run / name).write_text(yaml.safe_dump(content))
    code, output = call("resume", "runs/short", cwd=tmp_path, **shared_server)
    assert code == 1
    assert "Traceback" not in output
    words = " ".join(output.split())
    assert "stage warmup: 1 of 1 shards failed" in words
    assert "no training example has a response within student.max_length tokens; raise max_length" in words
    log = next(line.split("log: ")[1] for line in output.splitlines() if "log: " in line)
    assert "no training example" in Path(log.strip()).read_text()
    code, output = invoke("status", "runs/short", cwd=tmp_path)
    assert "failed: iteration-1/warmup, shard 0: code_error: DataError" in output
    assert any(line.startswith("  | ") and "DataError: no training example" in line for line in output.splitlines())
    code, output = call("logs", "runs/short", "--shard", "0", "--lines", "3", cwd=tmp_path)
    assert code == 0
    assert "no training example has a response" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yaml"], "absent.yaml: cannot be read"),
        (["tiny.yaml", "--set", "warmpu.examples=5"], "warmpu: unknown key"),
        (["tiny.yaml", "--set", "teacher.model=./nowhere"], "'./nowhere': no such folder"),
        (["tiny.yaml", "--set", "seed_pool.path=empty.jsonl"], "empty.jsonl has no examples"),
        (["tiny.yaml", "--set", "seed_pool.path=broken.jsonl"], "broken.jsonl, line 2, column"),
        (["tiny.yaml", "--run-root", "/proc/nothing"], "cannot be written"),
        (["tiny.yaml", "--run-root", "tiny.yaml"], "cannot be written"),
        (["tiny.yaml", "--name", "../escape"], "name: a name has letters"),
    ],
)
def test_bad_input_is_refused_before_any_job(undisturbed: Path, arguments: list[str], message: str) -> None:
    (undisturbed / "empty.jsonl").write_text("")
    (undisturbed / "broken.jsonl").write_text('{"instruction": "fine"}\n{"instruction": }\n')
    named = [] if "--name" in arguments else ["--name", "bad"]
    code, output = invoke("run", *arguments, *named, cwd=undisturbed)
    assert code == 1
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert not list((undisturbed / "runs").glob("bad/**/stage.json"))

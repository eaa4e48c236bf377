"""Warnings of a run before its first job."""

import errno
import json
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.lock import only_driver
from flows.study import open_study
from montessori_core.config import Study, parse_experiment, read_cluster, read_experiment, write_yaml
from montessori_core.errors import UserError
from montessori_core.models.shape import USABLE
from support import CONFIGS
from support.full_disk import full_after
from support.runs import invoke
from tasks.run import open_run, reopen_run

OTHER = {"instruction": "Count the rivers of the country that you know best.", "output": "Seven."}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one object per line."""
    path.write_text("\n".join(map(json.dumps, rows)))


def warnings_of(folder: Path, model: Path, **sections: Any) -> list[str]:
    """Open a run with a model as teacher and student; return its warnings."""
    content = {"teacher": {"model": str(model)}, "student": {"model": str(model)}} | sections
    return open_run(parse_experiment(content, "test"), folder / "run")[1]


@pytest.mark.parametrize(("penalty", "warned"), [(1.0, False), (1.2, False), (1.5, True)])
def test_open_run_warns_of_repetition_penalty(penalty: float, warned: bool, tiny_llama: Path, tmp_path: Path) -> None:
    instruction = {"repetition_penalty": penalty}
    warnings = warnings_of(tmp_path, tiny_llama, synthesis={"instruction": instruction})
    assert ["repetition_penalty is 1.5" in warning for warning in warnings] == [True] * warned


@pytest.mark.parametrize(
    ("visible", "cluster", "warned"),
    [
        ("0,1", {}, ["this machine has 2 GPUs, but jobs use none; add --cluster workstation"]),
        ("3", {}, ["this machine has 1 GPU, but"]),
        ("3", read_cluster(Path("workstation")).model_dump(), []),
        ("", {}, []),
        ("GPU-5a3f", {}, []),
    ],
)
def test_open_run_warns_of_unused_gpus(
    visible: str,
    cluster: dict[str, Any],
    warned: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    warnings = warnings_of(tmp_path, tiny_llama, cluster=cluster)
    assert [text in warning for text, warning in zip(warned, warnings, strict=True)] == [True] * len(warned)


@pytest.mark.parametrize(("words", "warned"), [(8, True), (0, False)])
def test_open_run_warns_of_contaminated_references(words: int, warned: bool, tiny_llama: Path, tmp_path: Path) -> None:
    shared = "What are the names of some famous actors that started their careers on Broadway?"
    write_jsonl(tmp_path / "reference.jsonl", [{"instruction": shared.upper(), "output": "Some."}, OTHER])
    write_jsonl(tmp_path / "outputs.jsonl", [{"instruction": shared, "output": "Several."}, OTHER])
    write_jsonl(tmp_path / "questions.jsonl", [{"question_id": 1, "category": "writing", "turns": ["Sing.", "Stop."]}])
    benchmarks = {
        "alpaca_eval": str(tmp_path / "outputs.jsonl"),
        "mt_bench": str(tmp_path / "questions.jsonl"),
        "contamination_words": words,
    }
    write_jsonl(tmp_path / "evaluation.jsonl", [{"instruction": "Name the tallest tower.", "output": "This one."}])
    sections = {
        "reference": {"path": str(tmp_path / "reference.jsonl"), "limit": 2},
        "evaluation": {"path": str(tmp_path / "evaluation.jsonl")},
        "judge": {"model": "judge"},
    }
    warnings = warnings_of(tmp_path, tiny_llama, benchmarks=benchmarks, **sections)
    assert ["2 of 2 reference examples are also in benchmarks.alpaca_eval" in w for w in warnings] == [True] * warned


@pytest.mark.parametrize("name", ["paper-1b", "paper-8b"])
def test_paper_presets_use_unseen_alpaca_examples(name: str) -> None:
    experiment = read_experiment(CONFIGS / f"{name}.yaml")
    seeds, reference, evaluation = experiment.seed_pool, experiment.reference, experiment.evaluation
    assert (reference.path, reference.split, reference.limit) == ("vicgalle/alpaca-gpt4", "train", 256)
    assert (evaluation.path, evaluation.split) == ("vicgalle/alpaca-gpt4", "train[256:512]")
    assert (seeds.path, seeds.split, seeds.limit) == ("vicgalle/alpaca-gpt4", "train[512:]", None)


@pytest.mark.parametrize(
    ("reference", "evaluation", "warned"),
    [
        ("{}/good.jsonl", "builtin/coding", True),
        ("builtin/maths", "builtin/coding", True),
        ("builtin/maths", "builtin/maths", False),
        ("{}/good.jsonl", "{}/heldout.jsonl", False),
    ],
)
def test_open_run_warns_of_evaluation_of_another_kind(
    reference: str, evaluation: str, warned: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "good.jsonl", [{"instruction": f"Count to {n}.", "output": "One."} for n in range(8)])
    write_jsonl(tmp_path / "heldout.jsonl", [OTHER])
    sections = {"reference": reference.format(tmp_path), "evaluation": evaluation.format(tmp_path)}
    warnings = warnings_of(tmp_path, tiny_llama, **{name: {"path": path} for name, path in sections.items()})
    assert ["of different kinds" in warning for warning in warnings] == [True] * warned


def test_open_run_warns_of_evaluation_without_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    resources = {"influence": {"gpus_per_node": 1}}
    [warning] = warnings_of(tmp_path, tiny_llama, cluster={"resources": resources})
    assert "set cluster.resources.evaluation.gpus_per_node: 1" in warning
    resources["evaluation"] = {"gpus_per_node": 1}
    assert not warnings_of(tmp_path, tiny_llama, cluster={"resources": resources})


def test_influence_settings_may_change_in_started_run(tiny_llama: Path, tmp_path: Path) -> None:
    """They are the remedy for a measurement that does not fit the memory; warm-up and examples are kept."""
    warnings_of(tmp_path, tiny_llama)
    [warning] = warnings_of(tmp_path, tiny_llama, influence={"reference_batch_tokens": 64})
    assert "the influence of the probing set and later stages are computed again, earlier stages are kept" in warning
    assert reopen_run(tmp_path / "run").experiment.influence.reference_batch_tokens == 64
    with pytest.raises(UserError, match="influence.probing_examples: 10000 -> 5"):
        warnings_of(tmp_path, tiny_llama, influence={"reference_batch_tokens": 64, "probing_examples": 5})


def test_open_run_lists_rows_that_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    """Rows that remain are copied with the bytes that they would have without the bad one."""
    rows = [
        {"instruction": f"Name river {number} of the country that you know best.", "output": "Rhine."}
        for number in range(9)
    ]
    reference = {"path": str(tmp_path / "reference.jsonl"), "drop_bad_rows": True, "max_bad_rows": 0.1}
    write_jsonl(tmp_path / "reference.jsonl", [*rows[:4], {"instruction": "Name a river.", "output": None}, *rows[4:]])
    warnings_of(tmp_path, tiny_llama, reference=reference)
    sources = tmp_path / "run" / "sources"
    [bad] = map(json.loads, (sources / "bad_rows.jsonl").read_text().splitlines())
    assert bad["place"].endswith("reference.jsonl, line 5")
    assert (bad["set"], bad["reason"]) == ("reference", "field 'output' is null")
    copied = (sources / "reference.jsonl").read_bytes()
    messages = [
        {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
        for row in rows
    ]
    write_jsonl(tmp_path / "reference.jsonl", messages)
    (tmp_path / "other").mkdir()
    warnings_of(tmp_path / "other", tiny_llama, reference=reference)
    sources = tmp_path / "other" / "run" / "sources"
    assert (sources / "reference.jsonl").read_bytes() == copied
    assert not (sources / "bad_rows.jsonl").exists()


def test_open_run_needs_no_git(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    warnings_of(tmp_path, tiny_llama)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["git_revision"] is None


def test_corrected_reference_replaces_that_of_unfinished_opening(tiny_llama: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "wrong.jsonl", [OTHER | {"output": f"{n}."} for n in range(8)])
    write_jsonl(tmp_path / "right.jsonl", [OTHER | {"output": f"{n}0."} for n in range(8)])
    warnings_of(tmp_path, tiny_llama, reference={"path": str(tmp_path / "wrong.jsonl")})
    (tmp_path / "run" / "config.yaml").unlink()  # as if the driver had been killed before it wrote this last file
    warnings_of(tmp_path, tiny_llama, reference={"path": str(tmp_path / "right.jsonl")})
    copy = (tmp_path / "run" / "sources" / "reference.jsonl").read_text()
    assert '"20."' in copy
    assert '"2."' not in copy


def test_changed_benchmark_file_replaces_the_copy(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        row = {"question_id": 1, "category": "writing", "turns": [f"{name}: write a poem.", "Shorter."]}
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        benchmarks = {"mt_bench": str(tmp_path / f"{name}.jsonl")}
        warnings_of(tmp_path, tiny_llama, benchmarks=benchmarks, judge={"model": "judge"})
    copy = tmp_path / "run" / "sources" / "mt_bench.jsonl"
    assert "second: write a poem." in copy.read_text()
    (tmp_path / "second.jsonl").unlink()  # a run needs the original no more
    for path in (benchmarks["mt_bench"], str(copy)):
        warnings_of(tmp_path, tiny_llama, benchmarks={"mt_bench": path}, judge={"model": "judge"})
        assert "second: write a poem." in copy.read_text()


@pytest.mark.parametrize("edit", ["max_length: 129", "limit: 5"])
def test_edited_configuration_is_refused(tiny_llama: Path, tmp_path: Path, edit: str) -> None:
    """The copies of the data sets are of the settings that the run was opened with; cards name those of config.yaml."""
    warnings_of(tmp_path, tiny_llama)
    config = tmp_path / "run" / "config.yaml"
    setting = edit.partition(":")[0]
    line = next(line for line in config.read_text().splitlines() if line.strip().startswith(f"{setting}:"))
    config.write_text(config.read_text().replace(line, line.replace(line.strip(), edit), 1))
    with pytest.raises(
        UserError, match=rf"(?s){setting}: .* -> .*config.yaml was edited; its former settings are in opened"
    ):
        open_run(read_experiment(config), tmp_path / "run")
    shutil.copy(tmp_path / "run" / "opened.yaml", config)
    open_run(read_experiment(config), tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "variables", "remedy"),
    [
        ("run", {}, "this run was .* Use another --name for the new configuration, or resume the run unchanged: "),
        ("run", {}, r"montessori resume \S+/run$"),
        (
            "study/seed-1",
            {},
            r"this study was .* Use another name \(in its file, or with --set name=NAME\) for the new",
        ),
        ("study/seed-1", {}, r"montessori compare \S+/study/study.yaml --run-root \S+$"),
        (
            "run",
            {"PREFECT__FLOW_RUN_ID": "1"},
            "Set another name among the parameters of the flow run .* retry its first flow run",
        ),
    ],
)
def test_refusal_of_changed_settings_names_the_remedy(
    place: str,
    variables: dict[str, str],
    remedy: str,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").touch()
    before, after = (
        parse_experiment(
            {
                "teacher": {"model": str(tiny_llama)},
                "student": {"model": str(tiny_llama)},
                "warmup": {"examples": n},
            },
            "test",
        )
        for n in (64, 65)
    )
    (tmp_path / place).mkdir(exist_ok=True)
    for file in ("config.yaml", "opened.yaml"):
        write_yaml(before, tmp_path / place / file)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"(?s){remedy}") as refusal:
        open_run(after, tmp_path / place)
    assert "warmup.examples: 64 -> 65\nOf the method's settings, only influence (but" in str(refusal.value)


@pytest.mark.parametrize(
    ("resources", "sections", "warned"),
    [
        ({"training": {"gpus_per_node": 1}}, {}, ["teacher_update", "training"]),
        ({"teacher_update": {"gpus_per_node": 1}}, {}, ["teacher_update"]),
        ({"generation": {"gpus_per_node": 1}}, {}, []),
        ({"training": {"gpus_per_node": 1}}, {"zero": {"offload": "optimizer"}}, []),
        ({"training": {"gpus_per_node": 1}}, {"teacher_update": {"lora": {}}}, ["training"]),
    ],
    ids=["all trainings", "teacher update", "no training", "offload", "adapter"],
)
def test_open_run_warns_of_trainings_larger_than_gpus(
    resources: dict[str, Any],
    sections: dict[str, Any],
    warned: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tiny Llama's training takes 508 MB, most of them buckets; 503 MB without the optimizer."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("tasks.gpu_check._GPU_MEMORY", 505e6 / USABLE)
    warnings = warnings_of(tmp_path, tiny_llama, cluster={"resources": resources}, **sections)
    needs = [warning for warning in warnings if "on each GPU" in warning]
    assert [warning.partition(" ")[0] for warning in needs] == warned


def test_offload_may_change_in_started_run(tiny_llama: Path, tmp_path: Path) -> None:
    """It is the remedy for a training that ran out of memory."""
    plain = warnings_of(tmp_path, tiny_llama, zero={"stage": 3})
    assert warnings_of(tmp_path, tiny_llama, zero={"stage": 3, "offload": "optimizer"}) == plain
    assert reopen_run(tmp_path / "run").experiment.zero.offload == "optimizer"
    with pytest.raises(UserError, match="zero.stage: 3 -> 2"):
        warnings_of(tmp_path, tiny_llama, zero={"stage": 2})


@pytest.mark.parametrize("preferences", [{}, {"max_pairs": 3}])
def test_open_run_leaves_driven_run_unchanged(
    preferences: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings_of(tmp_path, tiny_llama)
    run = tmp_path / "run"
    (run / "iteration-1").mkdir()
    (run / "iteration-1" / "metrics.json").write_text("{}")  # removed when settings change
    with only_driver(run):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="already has a driver"):
            warnings_of(tmp_path, tiny_llama, preferences=preferences)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    def start_driver(experiment: object) -> None:
        with only_driver(run):
            pytest.fail("a driver started while another command was changing the files of the run")

    monkeypatch.setattr("tasks.run.check_environment", start_driver)
    with pytest.raises(UserError, match="already has a driver"):
        warnings_of(tmp_path, tiny_llama, preferences=preferences)


@pytest.mark.parametrize(
    ("sections", "finished"),
    [
        ({"cluster": {"poll_seconds": 0.5}}, True),
        ({"benchmarks": {"tasks": [{"name": "mmlu"}]}}, False),  # a driver as a job would not be submitted
    ],
)
def test_run_with_added_benchmark_is_not_finished(
    sections: dict[str, Any], finished: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    warnings_of(tmp_path, tiny_llama, iterations=1)
    (tmp_path / "run" / "iteration-1").mkdir()
    (tmp_path / "run" / "iteration-1" / "metrics.json").write_text("{}")  # as if it had run
    (tmp_path / "run" / "report.html").touch()
    warnings_of(tmp_path, tiny_llama, iterations=1, **sections)
    assert reopen_run(tmp_path / "run").finished == finished


def test_run_without_report_is_not_finished(tiny_llama: Path, tmp_path: Path) -> None:
    """Its driver was killed when it had written the metrics."""
    warnings_of(tmp_path, tiny_llama, iterations=1)
    (tmp_path / "run" / "iteration-1").mkdir()
    (tmp_path / "run" / "iteration-1" / "metrics.json").write_text("{}")
    assert not reopen_run(tmp_path / "run").finished
    (tmp_path / "run" / "report.html").touch()
    assert reopen_run(tmp_path / "run").finished


def test_open_study_leaves_driven_study_unchanged(tiny_llama: Path, tmp_path: Path) -> None:
    """Its driver is at another seed: it holds the lock of the study, not that of this seed's run."""

    def open_with(**sections: Any) -> None:
        experiment = {"teacher": {"model": str(tiny_llama)}, "student": {"model": str(tiny_llama)}} | sections
        methods = {"methods": ["self_instruct"], "baseline": "self_instruct", "seeds": [0]}
        open_study(Study.model_validate({"experiment": experiment} | methods), tmp_path / "study")

    open_with()
    with only_driver(tmp_path / "study"):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="already has a driver"):
            open_with(preferences={"max_pairs": 7})
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    open_with(preferences={"max_pairs": 7})


@pytest.mark.parametrize("finished", [False, True])
def test_open_run_leaves_run_that_another_command_creates(
    finished: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with ExitStack() as other:

        def create_run(experiment: object) -> None:
            run.mkdir()
            if finished:
                (run / "config.yaml").write_text("name: other")
            else:
                other.enter_context(only_driver(run))

        monkeypatch.setattr("tasks.run.check_environment", create_run)
        with pytest.raises(UserError, match="just created this run" if finished else "already has a driver"):
            warnings_of(tmp_path, tiny_llama)
        files = {path.name for path in run.rglob("*")}
        assert files == {"driver.lock", "config.yaml"} if finished else {"driver.lock"}


def test_interrupted_opening_keeps_no_benchmark_of_another_name(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is opened with other files, which ends at any of its writes; then the run is resumed with its former settings."""
    settings = {}
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"instruction": f"Say {name}.", "output": name}])
        (tmp_path / f"tasks-{name}").mkdir()
        (tmp_path / f"tasks-{name}" / f"{name}.yaml").touch()
        settings[name] = {
            "alpaca_eval": str(tmp_path / f"{name}.jsonl"),
            "task_folder": str(tmp_path / f"tasks-{name}"),
        }
    judge = {"model": "judge"}
    warnings_of(tmp_path / "first", tiny_llama, benchmarks=settings["a"], judge=judge)

    for writes in range(20):
        folder = tmp_path / str(writes)
        shutil.copytree(tmp_path / "first", folder)
        with full_after(writes, monkeypatch), suppress(UserError):
            warnings_of(folder, tiny_llama, benchmarks=settings["b"], judge=judge)
            break
        warnings_of(folder, tiny_llama, benchmarks=settings["a"], judge=judge)
        copies = folder / "run" / "sources"
        assert (copies / "alpaca_eval.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()
        assert [file.name for file in (copies / "task_folder").iterdir()] == ["a.yaml"]
    assert writes > 4


def test_opening_keeps_the_job_as_driver(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings_of(tmp_path, tiny_llama)
    lock = tmp_path / "run" / "driver.lock"
    lock.write_text('{"job":"17","job_name":"montessori-driver-1"}')
    monkeypatch.setenv("MONTESSORI_DRIVER_JOB", "montessori-driver-1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    warnings_of(tmp_path, tiny_llama)
    kept = json.loads(lock.read_text())
    assert (kept["job"], kept["job_name"]) == ("17", "montessori-driver-1")


@pytest.mark.parametrize(
    "words",
    [
        ["run", "quickstart"],
        ["compare", "quickstart"],
        ["preview", "quickstart"],
        ["evaluate", "student"],
        ["train", "student", "data.jsonl", "--output", "out"],
    ],
    ids=lambda words: words[0],
)
def test_set_beside_cluster_file_is_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("profile: local\n")
    setting = f"{'experiment.' if words[0] == 'compare' else ''}cluster.slurm.partition=a"
    code, output = invoke(*words, "--cluster", "cluster.yaml", "--set", setting, cwd=tmp_path)
    assert code == 1, output
    refusal = f"--set {setting}: --cluster cluster.yaml replaces the section cluster; set it in that file"
    assert refusal in " ".join(output.split())


def test_benchmark_that_cannot_be_copied_replaces_no_copy(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original of the copy may be gone; the run is continued with it when space is free again."""
    for name in ("first", "second"):
        row = {"question_id": 1, "category": "writing", "turns": [f"{name}: write a poem.", "Shorter."]}
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    first, second = ({"mt_bench": str(tmp_path / f"{name}.jsonl")} for name in ("first", "second"))
    warnings_of(tmp_path, tiny_llama, benchmarks=first, judge={"model": "judge"})
    (tmp_path / "first.jsonl").unlink()

    def copy_nothing(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as disk:
        disk.setattr(shutil, "copyfile", copy_nothing)
        with pytest.raises(UserError, match="No space left"):
            warnings_of(tmp_path, tiny_llama, benchmarks=second, judge={"model": "judge"})
    warnings_of(tmp_path, tiny_llama, benchmarks=first, judge={"model": "judge"})
    assert "first: write a poem." in (tmp_path / "run" / "sources" / "mt_bench.jsonl").read_text()

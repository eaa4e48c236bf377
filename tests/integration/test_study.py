"""Methods: selection of pairs and examples, and a study of a tiny model through the command line."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster.lock import only_driver
from cluster.usage import use_of
from flows.methods import REGISTRY
from flows.methods.bootstrap import most_influential
from flows.methods.llm2llm import hardest_half
from flows.study import find_method, open_study
from montessori_core import programs
from montessori_core.config import Preferences, TeacherUpdate, read_study
from montessori_core.data.sources import Task, write_tasks
from montessori_core.data.tables import (
    EXAMPLES,
    GENERATION,
    INFLUENCE,
    INSTRUCTIONS,
    PREFERENCES,
    REFERENCE_LOSS,
    SIMILARITY,
    UTILITY,
    UTILITY_PREFERENCES,
    read_table,
    table_from_rows,
    write_table,
)
from montessori_core.errors import ConfigError, UserError
from montessori_core.evaluation.statistics import Outcome, bootstrap_gain, compare_outcomes
from montessori_core.files import read_json
from montessori_core.influence.preferences import (
    best_of_each_prompt,
    pair_by_utility,
    pair_extremes,
    threshold_of,
    upper_half,
    write_preferences,
)
from montessori_core.influence.signals import open_in_context, open_training_loss
from montessori_core.models.examples import encode_tasks
from montessori_core.models.load import load_tokenizer
from support import CONFIGS, ROOT
from support.judges import JudgeServer
from support.row_programs import as_compute
from support.runs import call, configuration, finish_lean, invoke
from support.studies import conversations, environment_of, write_study
from support.templates import TRIMMING
from tasks.resume import command_to_compare
from tasks.run import reopen_run
from tasks.stage import Step
from tasks.studies import is_finished, reopen
from tasks.teachers import collect_preferences, update_teacher

pytestmark = pytest.mark.timeout(1800)  # the study takes minutes, on a machine that may be busy


@given(st.lists(st.floats(-1e3, 1e3), max_size=30))
def test_upper_half_has_the_larger_values(values: list[float]) -> None:
    ids = [str(number) for number in range(len(values))]
    chosen = upper_half(ids, values)
    rest = set(ids) - set(chosen)
    assert len(chosen) == (len(values) + 1) // 2
    assert all(values[int(low)] <= values[int(high)] for low in rest for high in chosen)


def test_hardest_seeds_are_upper_half_of_losses(tmp_path: Path) -> None:
    losses = {"long": 0.1, "short": 3.0, "middle": 2.0, "easy": 0.01, "none": None}
    rows: list[dict[str, object]] = [{"example_id": n, "prompt_id": "p", "utility": u} for n, u in losses.items()]
    write_table(table_from_rows(rows, UTILITY), tmp_path / "utility.parquet", UTILITY)
    assert hardest_half(tmp_path / "utility.parquet") == ["short", "middle"]


def with_texts(folder: Path, examples: pa.Table, pairs: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of the preference table."""
    write_table(examples, folder / "examples.parquet", EXAMPLES)
    write_preferences(pairs, folder / "examples.parquet", folder / "preferences.parquet", UTILITY_PREFERENCES)
    return list(read_table(folder / "preferences.parquet", UTILITY_PREFERENCES).to_pylist())


def test_utility_pairs_stay_within_a_prompt(tmp_path: Path) -> None:
    examples = table_from_rows(
        [
            {
                "example_id": f"{prompt}{n}",
                "prompt_id": prompt,
                "prompt": f"prompt {prompt}",
                "raw_output": f"output {prompt}{n}",
                "instruction": "x",
                "response": "y",
                "response_finished": True,
            }
            for prompt in "ab"
            for n in range(3)
        ],
        EXAMPLES,
    )
    scores = {"a0": 5.0, "a1": 1.0, "a2": None, "b0": 3.0, "b1": 4.0, "b2": 2.0}  # median 3
    utility = table_from_rows(
        [{"example_id": name, "prompt_id": name[0], "utility": score} for name, score in scores.items()], UTILITY
    )
    pairs = with_texts(tmp_path, examples, pair_by_utility(utility, Preferences()))
    assert [(pair["chosen_id"], pair["rejected_id"]) for pair in pairs] == [("a0", "a1"), ("b1", "b2")]
    assert pairs[0]["chosen"] == "output a0"
    assert pairs[0]["prompt"] == "prompt a"
    assert pair_by_utility(utility, Preferences(max_pairs=1))["chosen_id"].to_pylist() == ["a0"]  # the widest gap


def test_extreme_pairs_are_best_and_worst(tmp_path: Path) -> None:
    scores = {"a0": 2.0, "a1": 5.0, "a2": 1.0, "b0": 3.0, "b1": 3.0, "c0": None, "c1": 4.0}
    examples = table_from_rows(
        [
            {
                "example_id": name,
                "prompt_id": name[0],
                "prompt": name[0],
                "raw_output": name,
                "instruction": name[0],
                "response": name,
                "response_finished": True,
            }
            for name in scores
        ],
        EXAMPLES,
    )
    utility = table_from_rows(
        [{"example_id": name, "prompt_id": name[0], "utility": score} for name, score in scores.items()], UTILITY
    )
    pairs = with_texts(tmp_path, examples, pair_extremes(utility))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("a1", "a2")]  # b has equal scores, c one score
    assert best_of_each_prompt(examples, utility)["example_id"].to_pylist() == ["a1", "b0", "c1"]


def test_demonstration_with_answers_has_highest_utility(smollm2: Path, tmp_path: Path) -> None:
    write_tasks([Task("r1", "What is the secret word?", "The secret word is tamarind.")], tmp_path / "reference.jsonl")
    shown = {
        "answer": ("What is the secret word?", "The secret word is tamarind."),
        "other": ("Name a river.", "The Danube is a river in Europe."),
        "endless": ("Say a lot.", "word " * 400),
    }
    rows = [
        {"example_id": name, "prompt_id": "p", "instruction": instruction, "response": response}
        for name, (instruction, response) in shown.items()
    ]
    settings = programs.ReferenceSignal(max_length=128, batch_tokens=512, reference_reduction="example")
    compute = as_compute(open_in_context(settings, {"student": smollm2, "reference": tmp_path / "reference.jsonl"}))
    compute(rows, tmp_path / "part.parquet", lambda done: None)
    utility = dict(zip(shown, read_table(tmp_path / "part.parquet", UTILITY)["utility"].to_pylist(), strict=True))
    assert utility["answer"] > 1.0  # nats per token
    assert utility["answer"] > utility["other"] + 0.5
    assert utility["endless"] is None
    # A truncated reference example is truncated equally with and without a demonstration.
    shorter = settings.model_copy(update={"max_length": 40})
    compute = as_compute(open_in_context(shorter, {"student": smollm2, "reference": tmp_path / "reference.jsonl"}))
    compute(rows[:2], tmp_path / "part.parquet", lambda done: None)
    assert read_table(tmp_path / "part.parquet", UTILITY)["utility"].null_count == 0


def test_in_context_gain_weighs_examples_or_tokens(smollm2: Path, tmp_path: Path) -> None:
    tasks = [
        Task("short", "What is the secret word?", "Tamarind."),
        Task(
            "long", "Name a river.", "The Danube is a river in Europe; it flows from the Black Forest to the Black Sea."
        ),
    ]
    row = {"example_id": "e", "prompt_id": "p", "instruction": "What is the secret word?", "response": "Tamarind."}

    def gain(reference: list[Task], reduction: Literal["example", "token"]) -> float:
        write_tasks(reference, tmp_path / "reference.jsonl")
        settings = programs.ReferenceSignal(max_length=128, batch_tokens=512, reference_reduction=reduction)
        compute = as_compute(open_in_context(settings, {"student": smollm2, "reference": tmp_path / "reference.jsonl"}))
        compute([row], tmp_path / "part.parquet", lambda done: None)
        return float(read_table(tmp_path / "part.parquet", UTILITY)["utility"][0].as_py())

    short, long = (gain([task], "token") for task in tasks)
    tokens = [example.response_tokens for example in encode_tasks(load_tokenizer(smollm2), tasks, 128, "reference")]
    assert short > long + 1.0  # nats per token: the demonstration has the short answer
    assert tokens[1] > 2 * tokens[0]
    assert gain(tasks, "example") == pytest.approx((short + long) / 2, rel=1e-5)
    assert gain(tasks, "token") == pytest.approx(np.average([short, long], weights=tokens), rel=1e-5)


def test_training_loss_encodes_like_training(smollm2: Path, tmp_path: Path) -> None:
    settings = programs.ModelLoss(max_length=64, batch_tokens=512)
    compute = as_compute(open_training_loss(settings, {"student": smollm2}))
    row = {"prompt_id": "p", "instruction": "Name a river.", "response": "The Danube is", "response_finished": True}
    rows = [
        row | {"example_id": "whole"},
        row | {"example_id": "cut", "response_finished": False},  # has no end token
        row | {"example_id": "long", "instruction": "word " * 100},  # no response token fits
    ]
    compute(rows, tmp_path / "part.parquet", lambda done: None)
    whole, cut, long = read_table(tmp_path / "part.parquet", UTILITY)["utility"].to_pylist()
    assert long is None
    assert cut < whole  # an end token in the middle of the sentence would have the highest loss


def test_comparison_is_paired_over_examples_and_seeds() -> None:
    draw = np.random.default_rng(0)
    hard = draw.normal(3.0, 1.0, size=(1, 200))  # examples differ much more than methods
    cost = np.array([30.0, 20.0, 40.0])
    baseline = Outcome("plain", hard + draw.normal(0.0, 0.01, (3, 200)), cost / 3, 1e9 * cost / 3)
    better = Outcome("better", baseline.losses - 0.02 + draw.normal(0.0, 0.01, (3, 200)), cost, 1e9 * cost)
    first, second = compare_outcomes([baseline, better], "plain")
    assert (first["gain"], first["gain_low"], first["gain_high"]) == (0.0, 0.0, 0.0)
    assert second["gain"] == pytest.approx(0.02, abs=2e-3)
    assert second["gain_low"] < second["gain"] < second["gain_high"]
    assert second["spread_over_seeds"] == pytest.approx(np.std(second["gain_of_seeds"], ddof=1))
    assert second["job_seconds"] == 30.0
    assert second["flops"] == 30e9
    one_seed = [replace(outcome, losses=outcome.losses[:1]) for outcome in (baseline, better)]
    assert [row["spread_over_seeds"] for row in compare_outcomes(one_seed, "plain")] == [None, None]


def test_interval_of_one_seed_is_over_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = np.random.default_rng(0).normal(0.02, 0.01, (1, 200))
    low, high = bootstrap_gain(gains)
    assert high - low == pytest.approx(2 * 1.96 * 0.01 / np.sqrt(200), rel=0.1)
    monkeypatch.setattr("montessori_core.evaluation.statistics._CHUNK", 100_000)
    assert bootstrap_gain(gains) == pytest.approx((low, high), rel=1e-12)


def test_interval_of_few_seeds_is_students_t() -> None:
    """Where only seeds differ, the interval is about the t-interval over the seeds' means."""
    for seeds in ([0.0472, -0.0115, 0.2126, 0.1714, 0.0606], [0.20, 0.31, 0.26]):
        gains = np.repeat(np.array(seeds)[:, None], 64, axis=1)
        half_width = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(seeds)
        low, high = bootstrap_gain(gains)
        assert high - low == pytest.approx(2 * half_width, rel=0.15)
        assert low < np.mean(seeds) < high


@pytest.mark.slow
@pytest.mark.parametrize(("count", "of_examples"), [(5, 0.05), (5, 0.001), (3, 0.001)])
def test_interval_covers_gain_of_other_seeds(count: int, of_examples: float) -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        seeds, examples = draw.normal(0.0, 0.02, (count, 1)), draw.normal(0.0, of_examples, (1, 64))
        low, high = bootstrap_gain(seeds + examples + draw.normal(0.0, of_examples, (count, 64)))
        covered += low < 0.0 < high
    assert covered >= 182  # 95 % of 200 less three standard errors


@pytest.mark.slow
def test_invalid_study_is_refused_before_any_run(talking_llama: Path, tmp_path: Path) -> None:
    experiment = configuration(tmp_path, talking_llama)
    study = tmp_path / "study.yaml"
    (tmp_path / "own.py").write_text("from flows.methods.self_instruct import SELF_INSTRUCT as MINE")
    odd = yaml.safe_load(experiment.read_text())
    odd["nomad"] = {"batch_size": 3, "micro_batch_size": 1}
    odd["cluster"]["resources"] = {"training": {"processes_per_node": 2}}
    for section in ("warmup", "teacher_update", "training"):
        odd[section] |= {"batch_size": 2, "micro_batch_size": 1}
    short = yaml.safe_load(experiment.read_text())
    short["training"]["response_tokens"] = 100
    for content, words in [
        ({"methods": ["montessori"]}, "baseline 'self_instruct' is not in methods (montessori); add it there"),
        ({"seeds": [1, 1]}, "seeds has a duplicate entry"),
        ({"methods": ["self_instruct", "magic"]}, "no method 'magic'; available: montessori, self_instruct"),
        ({"methods": ["self_instruct", "nowhere:MINE"]}, "nowhere:MINE"),
        ({"experiment": "missing.yaml"}, "missing.yaml: cannot be read"),
        ({"sedes": [1]}, "sedes: unknown key"),
        ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
        ({"name": "a..b"}, "must not contain '..'"),
        ({"methods": ["self_instruct", "nomad"], "experiment": odd}, "nomad.batch_size (3) must be a multiple of"),
        ({"methods": ["self_instruct", "self_reward"], "experiment": short}, "self_reward trains its student itself"),
        (
            {"methods": ["self_reward"], "baseline": "self_reward", "equal_response_tokens": True},
            "equal_response_tokens: self_reward trains its student itself",
        ),
        ({"methods": ["self_instruct", "own:MINE"]}, "its name 'self_instruct' is taken"),
        ({"methods": ["self_instruct", "llm_judge"]}, "llm_judge needs experiment.judge; set its model"),
    ]:
        study.write_text(yaml.safe_dump({"experiment": experiment.name} | content))
        code, output = call("compare", str(study), cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
        assert code == 1, output
        assert words in output
    assert not (tmp_path / "runs").exists()
    for name in ("flows.cli:app", ":MINE", ".own:MINE"):
        with pytest.raises(ConfigError, match=f"methods: {name}"):
            find_method(name)


def test_changed_study_is_not_finished(tiny_llama: Path, tmp_path: Path) -> None:
    """A flow run whose driver is a job would not start one."""
    path, folder = tmp_path / "study.yaml", tmp_path / "runs" / "study"
    methods = ["self_instruct", "random"]
    path.write_text(yaml.safe_dump({"experiment": configuration(tmp_path, tiny_llama).name, "methods": methods}))
    open_study(read_study(path, ("seeds=[1]",)), folder)
    (folder / "comparison.json").write_text("{}")  # as if it had run
    for change, finished in [("experiment.cluster.poll_seconds=0.5", True), ("seeds=[1,2]", False)]:
        open_study(read_study(path, ("seeds=[1]", change)), folder)
        assert is_finished(reopen(folder)) == finished, change


def test_begun_study_takes_a_cluster_of_the_users_directory(tiny_llama: Path, tmp_path: Path) -> None:
    """Or a preset's; other paths are read from the directory in which the study was started."""
    path, folder, elsewhere = tmp_path / "study.yaml", tmp_path / "runs" / "study", tmp_path / "elsewhere"
    path.write_text(yaml.safe_dump({"experiment": configuration(tmp_path, tiny_llama).name}))
    with chdir(tmp_path):
        open_study(read_study(path, ("seeds=[1]",)), folder)
    elsewhere.mkdir()
    (elsewhere / "own.yaml").write_text("profile: allocation")
    for cluster, profile in (("workstation", "local"), ("own.yaml", "allocation")):
        command = ["compare", f"{folder}/study.yaml", "--cluster", cluster, "--submit-driver"]
        code, output = invoke(*command, cwd=elsewhere)
        assert code == 1, cluster
        assert f"cluster.profile is {profile}" in output  # the check comes after all files are read


def test_renamed_study_resumes_in_its_folder(tiny_llama: Path, tmp_path: Path) -> None:
    """With another name or --run-root, the command begins another study."""
    path, runs = tmp_path / "study.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump({"experiment": configuration(tmp_path, tiny_llama).name, "name": "first"}))
    with chdir(tmp_path):
        open_study(read_study(path, ("seeds=[1]",)), runs / "first")
    renamed = (runs / "first").rename(runs / "second")
    begun = (renamed / "study.yaml").read_text()
    for options, folder in (
        ([], renamed),
        (["--set", "name=third"], runs / "third"),
        (["--run-root", str(tmp_path / "other")], tmp_path / "other" / "first"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.yaml").write_text(begun)  # so that the lock is taken first
        with only_driver(folder):
            code, output = invoke(*command_to_compare(renamed), *options, cwd=tmp_path)
        assert (code, f"{folder}: this run already has a driver" in output) == (1, True), output


def test_refused_study_leaves_no_new_seeds(tiny_llama: Path, tmp_path: Path) -> None:
    """The error asks for another setting, which a run that exists would refuse."""
    path, folder = tmp_path / "study.yaml", tmp_path / "runs" / "study"
    content = {"experiment": configuration(tmp_path, tiny_llama).name, "methods": ["self_instruct", "select"]}
    path.write_text(yaml.safe_dump(content | {"transfer": [{"model": str(tiny_llama), "max_length": 192}]}))
    (folder / "seed-0").mkdir(parents=True)
    (folder / "seed-0" / "notes.txt").touch()
    with pytest.raises(UserError, match="raise it to 60"):
        open_study(read_study(path, ("seeds=[0,1]", "experiment.influence.probing_examples=6")), folder)
    assert [file.name for file in folder.rglob("*.txt")] == ["notes.txt"]
    open_study(read_study(path, ("seeds=[0]", "experiment.influence.probing_examples=60")), folder)
    changed = ("seeds=[0,1]", "experiment.influence.probing_examples=60", "experiment.training.examples=60")
    with pytest.raises(UserError, match="raise it to 600"):
        open_study(read_study(path, changed), folder)
    assert not (folder / "seed-1").exists()
    assert (folder / "seed-0" / "student-1" / "config.yaml").exists()


@pytest.mark.parametrize("changed", ["evaluation", "student"])
def test_added_seed_needs_inputs_of_the_first(tiny_llama: Path, tmp_path: Path, changed: str) -> None:
    """Each seed has copies from when it was opened."""
    path, folder = tmp_path / "study.yaml", tmp_path / "runs" / "study"
    files = {"evaluation": tmp_path / "evaluation.jsonl", "student": tmp_path / "template.jinja"}
    tasks = [{"instruction": task.instruction, "output": task.response} for task in conversations(4)]
    files["evaluation"].write_text("\n".join(map(json.dumps, tasks)))
    files["student"].write_text(TRIMMING)
    content = yaml.safe_load(configuration(tmp_path, tiny_llama).read_text())
    content["evaluation"] = {"path": str(files["evaluation"])}
    content["student"]["chat_template"] = str(files["student"])
    path.write_text(yaml.safe_dump({"experiment": content, "transfer": [content["student"]]}))
    open_study(read_study(path, ("seeds=[0]",)), folder)
    before = files[changed].read_text()
    files[changed].write_text(before.replace("[assistant]", "[model]").replace("rivers", "oceans"))
    with pytest.raises(
        UserError, match=f"seed-1 has different inputs from .*seed-0: {changed}\\. .*Restore the original files"
    ):
        open_study(read_study(path, ("seeds=[0,1]",)), folder)
    files[changed].write_text(before)
    assert len(open_study(read_study(path, ("seeds=[0,1]",)), folder)[0]) == 2


def test_shipped_study_is_valid() -> None:
    study = read_study(CONFIGS / "studies" / "quickstart.yaml", ("experiment.training.examples=7",))
    assert study.experiment.training.examples == 7
    assert study.seeded(2).seed == 2
    long = study.model_copy(update={"name": "x" * 80})
    assert [len({long.seeded(seed).name for seed in (1, 2)}), len(long.seeded(1).name)] == [2, 80]


@pytest.fixture(scope="module")
def compared(finished_run: Path, talking_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished study of all methods and one of a user's."""
    judge = JudgeServer(lambda response: str(len(response) % 6))
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(finished_run / "prefect", folder / "prefect")  # a database takes seconds to make
    write_study(folder, talking_llama, judge)
    environment = environment_of(folder)
    (folder / "output.txt").write_text(finish_lean("compare", "study.yaml", cwd=folder, seconds=1600, **environment))
    yield folder
    judge.close()


def test_methods_train_on_equal_numbers_of_examples(compared: Path) -> None:
    seed = compared / "runs" / "tiny-study" / "seed-3"
    for method in [*REGISTRY, "mine"]:
        (*_, last) = sorted((seed / "methods" / method).glob("round-*"))
        if method == "self_reward":  # its student learns from preferences
            assert (last / "update" / "part-00000" / "model.safetensors").exists()
        else:
            counts = json.loads((last / "student" / "part-00000" / "training_counts.json").read_text())
            assert counts["examples"] == 6, method
        assert read_table(last / "evaluation" / "part-00000.parquet", REFERENCE_LOSS).num_rows == 4
    result = json.loads((compared / "runs" / "tiny-study" / "comparison.json").read_text())
    rows = {row["method"]: row for row in result["methods"]}
    assert set(rows) == {*REGISTRY, "mine"}
    assert result["untrained_loss"] > 0
    assert rows["mine"]["gain"] == 0.0  # the same data, so the same student
    assert rows["mine"]["job_seconds"] < rows["montessori"]["job_seconds"]  # pays for shared stages
    assert rows["mine"]["flops"] == rows["self_instruct"]["flops"] > 0
    assert rows["llm_judge"]["flops"] < rows["montessori"]["flops"]  # the operations of an API judge do not count
    assert result["kind_classifier"]["objection"] is None
    assert rows["nomad"]["wanted_kind"] >= 0.5  # half of its examples are of the reference set
    assert rows["nomad"]["wanted_kind_low"] < rows["nomad"]["wanted_kind"] <= rows["nomad"]["wanted_kind_high"]
    assert "target kind" in (compared / "output.txt").read_text()
    page = (compared / "runs" / "tiny-study" / "comparison.html").read_text()
    assert "job seconds of one seed" in page
    assert "floating-point operations of one seed" in page
    assert "own:MINE" not in (compared / "output.txt").read_text()
    assert all(method in (compared / "output.txt").read_text() for method in rows)


def test_cost_of_method_leaves_evaluation_out(compared: Path, methods: Path) -> None:
    result = read_json(compared / "runs" / "tiny-study" / "comparison.json")
    (row,) = (row for row in result["methods"] if row["method"] == "self_instruct")
    stages = [path.parent for path in (methods / "self_instruct" / "round-1").rglob("stage.json")]
    assert "evaluation" in [stage.name for stage in stages]
    uses = [use_of(stage) for stage in stages if stage.name != "evaluation"]
    assert row["flops"] == sum(use.flops for use in uses)
    assert row["job_seconds"] == pytest.approx(sum(use.seconds for use in uses))


def test_seed_of_finished_study_needs_no_driver(compared: Path) -> None:
    code, output = invoke("status", "runs/tiny-study/seed-3", cwd=compared)
    assert code == 0, output
    assert "methods/montessori/round-1/student" in output
    assert "Resume with" not in output


def test_study_shows_what_the_teacher_learned(compared: Path) -> None:
    study = compared / "runs" / "tiny-study"
    result = json.loads((study / "comparison.json").read_text())
    (teacher,) = result["teachers"]
    rows = {row["method"]: row for row in teacher["influence"]}
    assert list(rows) == ["montessori", "self_instruct"]
    influence = [read_table(study / row["table"], INFLUENCE)["influence_student"].to_pylist() for row in rows.values()]
    assert list(map(len, influence)) == [4, 4]
    assert influence[0] != influence[1]
    probing = read_table(study / "seed-3" / "iteration-1" / "influence.parquet", INFLUENCE)
    assert rows["montessori"]["threshold"] == threshold_of(probing, "median")
    kept, last = teacher["checkpoints"]
    assert kept["step"] < last["step"]
    losses = {row["method"]: row["held_out_loss"] for row in result["methods"]}
    assert last["held_out_loss"] == pytest.approx(losses["montessori"])
    assert last["gain"] == pytest.approx(losses["self_instruct"] - losses["montessori"])
    assert all(seconds > 0 for seconds in teacher["seconds"].values())


@pytest.fixture(scope="module")
def iteration(compared: Path) -> Path:
    """The folder of iteration 1; all methods share its probing set."""
    return compared / "runs" / "tiny-study" / "seed-3" / "iteration-1"


@pytest.fixture(scope="module")
def methods(compared: Path) -> Path:
    """The folder with the results of all methods."""
    return compared / "runs" / "tiny-study" / "seed-3" / "methods"


def test_bootstrap_demonstrates_most_influential_half(iteration: Path, methods: Path) -> None:
    influence = read_table(iteration / "influence.parquet", INFLUENCE).to_pylist()
    ranked = sorted(influence, key=lambda row: -row["influence_student"])
    best = {row["example_id"] for row in ranked[: len(ranked) // 2]}
    tasks = most_influential(iteration / "examples.parquet", iteration / "influence.parquet")
    assert {task.example_id for task in tasks} == best
    shown = read_table(methods / "bootstrap" / "round-1" / "training" / "instructions.parquet", INSTRUCTIONS)
    names = {name for names in shown["demonstrations"].to_pylist() for name in names}
    assert names
    assert names <= best


def test_select_trains_on_most_influential_examples(iteration: Path, methods: Path) -> None:
    """Its student is the only one that is not shared: probing set and influence are those of iteration 1."""
    influence = read_table(iteration / "influence.parquet", INFLUENCE).to_pylist()
    best = sorted(influence, key=lambda row: -row["influence_student"])[:6]
    rows = chosen_by(methods, "select")
    assert {row["example_id"] for row in rows} == {row["example_id"] for row in best}
    probing = {row["example_id"]: row for row in read_table(iteration / "examples.parquet", EXAMPLES).to_pylist()}
    assert all(row == probing[row["example_id"]] for row in rows)
    stages = {path.parent.name for path in (methods / "select").rglob("stage.json")}
    assert stages == {"student", "evaluation"}


@pytest.mark.parametrize("method", ["random", "length_matched"])
def test_controls_of_select_choose_other_probing_examples(iteration: Path, methods: Path, method: str) -> None:
    probing = read_table(iteration / "influence.parquet", INFLUENCE).to_pylist()
    lengths = {row["example_id"]: row["response_tokens"] for row in probing}
    names, selected = ({row["example_id"] for row in chosen_by(methods, name)} for name in (method, "select"))
    assert len(names) == 6
    assert names <= set(lengths)
    assert names != selected
    if method == "length_matched":
        assert not names & selected
        tokens = [sum(lengths[name] for name in chosen) for chosen in (names, selected)]
        assert tokens[0] == pytest.approx(tokens[1], rel=0.2)


def chosen_by(methods: Path, method: str) -> list[dict[str, Any]]:
    """Return the examples that a method chose from the probing set."""
    return list(read_table(methods / method / "round-1" / "examples.parquet", EXAMPLES).to_pylist())


def test_target_seeds_are_instructions_of_the_reference_set(methods: Path) -> None:
    training = methods / "target_seeds" / "round-1" / "training"
    shown = {
        name
        for names in read_table(training / "instructions.parquet", INSTRUCTIONS)["demonstrations"].to_pylist()
        for name in names
    }
    assert len(shown) > 3
    assert shown <= {f"reference-{number:05d}" for number in range(1, 13)}


def test_response_pairs_answer_the_same_instruction(methods: Path) -> None:
    answers = {
        row["example_id"]: row
        for row in read_table(methods / "response" / "round-1" / "answers" / "examples.parquet", EXAMPLES).to_pylist()
    }
    pairs = read_table(methods / "response" / "round-1" / "preferences.parquet", PREFERENCES).to_pylist()
    assert pairs
    for pair in pairs:
        chosen, rejected = answers[pair["chosen_id"]], answers[pair["rejected_id"]]
        assert chosen["instruction"] == rejected["instruction"]
        assert chosen["instruction"] in pair["prompt"]
        assert pair["chosen"] == chosen["raw_output"]
        assert pair["chosen_influence_student"] > pair["rejected_influence_student"]


def test_pairs_of_answers_never_cross_instructions(
    methods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.teachers.create_table_artifact", lambda *arguments, **options: None)
    run = reopen_run(methods.parent)
    across = Preferences(pairs="across_prompts", baseline="median", max_uses=2)
    crossing = replace(run, experiment=run.experiment.model_copy(update={"preferences": across}))
    round_1 = methods / "response" / "round-1"
    tables = round_1 / "answers" / "examples.parquet", round_1 / "influence.parquet"

    def instructions(step: Step) -> list[tuple[str, str]]:
        step.folder.mkdir()
        texts = {row["example_id"]: row["instruction"] for row in read_table(tables[0], EXAMPLES).to_pylist()}
        pairs = read_table(collect_preferences.fn(step, *tables), PREFERENCES).to_pylist()
        return [(texts[pair["chosen_id"]], texts[pair["rejected_id"]]) for pair in pairs]

    assert any(chosen != rejected for chosen, rejected in instructions(Step(crossing, tmp_path / "crossing", "x")))
    pairs = instructions(Step(crossing, tmp_path / "within", "x").pairing_answers())
    assert pairs
    assert all(chosen == rejected for chosen, rejected in pairs)


def test_full_update_keeps_no_four_bit_weights(methods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[TeacherUpdate] = []
    monkeypatch.setattr(
        Step, "train", lambda step, program, settings, *others, **named: recipes.append(settings.recipe)
    )
    run = reopen_run(methods.parent)
    update = TeacherUpdate.model_validate({"lora": {}, "quantization": "nf4"})
    run = replace(run, experiment=run.experiment.model_copy(update={"teacher_update": update}))
    preferences = methods / "response" / "round-1" / "preferences.parquet"
    for lora in (True, False):
        update_teacher(Step(run, tmp_path, "x"), run.initial_teacher(), preferences, lora=lora)
    assert [recipe.quantization for recipe in recipes] == ["nf4", None]


def test_strong_teacher_trains_on_api_responses(methods: Path) -> None:
    strong = read_table(methods / "self_instruct_strong" / "round-1" / "training" / "examples.parquet", EXAMPLES)
    assert strong.num_rows == 6
    for row in strong.to_pylist():
        assert row["instruction"].startswith("Explain ")
        assert row["response"] == f"An answer to: {row['instruction']}"


def test_llm_judge_chooses_the_higher_score(iteration: Path, methods: Path) -> None:
    table = read_table(methods / "llm_judge" / "round-1" / "preferences.parquet", UTILITY_PREFERENCES)
    responses = {
        row["example_id"]: row["response"] for row in read_table(iteration / "examples.parquet", EXAMPLES).to_pylist()
    }
    assert table.num_rows > 0
    for pair in table.to_pylist():
        assert pair["chosen_utility"] == len(responses[pair["chosen_id"]]) % 6
        assert pair["chosen_utility"] > pair["rejected_utility"]


@pytest.mark.parametrize("method", ["arte", "training_loss"])
def test_utility_pairs_choose_the_higher_utility(methods: Path, method: str) -> None:
    """ARTE: the better demonstration. Training loss: the instruction with the higher loss."""
    table = read_table(methods / method / "round-1" / "preferences.parquet", UTILITY_PREFERENCES)
    assert table.num_rows > 0
    assert all(pair["chosen_utility"] > pair["rejected_utility"] for pair in table.to_pylist())


@pytest.mark.parametrize("number", [1, 2])
def test_self_reward_pairs_best_with_worst(methods: Path, number: int) -> None:
    folder = methods / "self_reward" / f"round-{number}"
    table = read_table(folder / "preferences.parquet", UTILITY_PREFERENCES)
    scores = read_table(folder / "scores" / "utility.parquet", UTILITY).to_pylist()
    assert 0 < table.num_rows <= 3
    for pair in table.to_pylist():
        own = [row["utility"] for row in scores if row["prompt_id"] == pair["prompt_id"] and row["utility"] is not None]
        assert (pair["chosen_utility"], pair["rejected_utility"]) == (max(own), min(own))
    assert read_table(folder / "answers" / "responses" / "part-00000.parquet", GENERATION).num_rows > 0


def test_first_student_learns_from_all_seeds(compared: Path, methods: Path) -> None:
    """LLM2LLM and Self-Reward share the answered seeds and the student trained on them; both pay for them."""
    seed = methods.parent
    answered = read_table(seed / "answered-seeds" / "examples.parquet", EXAMPLES).num_rows
    counts = read_json(seed / "seed-student" / "part-00000" / "training_counts.json")
    assert counts["examples"] + counts["left_out"] == answered > 0
    result = read_json(compared / "runs" / "tiny-study" / "comparison.json")
    flops = {row["method"]: row["flops"] for row in result["methods"]}
    shared = use_of(seed / "answered-seeds" / "responses").flops + use_of(seed / "seed-student").flops
    assert min(flops["llm2llm"], flops["self_reward"]) > shared > 0


def test_nomad_mixes_real_and_written_examples(methods: Path) -> None:
    """Half is from the reference set, half written by a teacher trained on ten of its examples, without repetitions."""
    folder = methods / "nomad" / "round-1"
    mixed = read_table(folder / "examples.parquet", EXAMPLES).to_pylist()
    real, written = ([row for row in mixed if (row["prompt_id"] == "real") == of_real] for of_real in (True, False))
    assert (len(real), len(written)) == (3, 3)
    counts = json.loads((folder / "teacher" / "part-00000" / "training_counts.json").read_text())
    assert counts["examples"] == 10
    reference = {task.instruction for task in conversations(12)}
    assert {row["instruction"] for row in real} < reference
    assert {row["prompt"] for row in written} == {"User:"}
    assert not {row["instruction"] for row in written} & reference
    nearness = read_table(folder / "norm-sim" / "norm-sim.parquet", SIMILARITY)
    assert set(nearness["example_id"].to_pylist()) == {row["example_id"] for row in written}
    assert all(0.0 < value < 1.0 for value in nearness["norm_sim"].to_pylist())


def test_llm2llm_imitates_the_hardest_seeds_twice(methods: Path) -> None:
    halves = []
    for number in (1, 2):
        folder = methods / "llm2llm" / f"round-{number}"
        losses = read_table(folder / "seed-loss" / "utility.parquet", UTILITY).to_pylist()
        hard = set(hardest_half(folder / "seed-loss" / "utility.parquet"))
        assert len(hard) == (len(losses) + 1) // 2
        shown = read_table(folder / "training" / "instructions.parquet", INSTRUCTIONS)
        names = {name for names in shown["demonstrations"].to_pylist() for name in names}
        assert names
        assert names <= hard
        halves.append(losses)
    assert halves[0] != halves[1]  # the second student was trained in between
    texts = defaultdict(list)
    for row in read_table(methods / "llm2llm" / "round-2" / "examples.parquet", EXAMPLES).to_pylist():
        texts[row["instruction"]].append(row["example_id"])
    assert all(len(ids) == 1 for ids in texts.values())


@pytest.mark.slow
def test_finished_study_runs_nothing_again(compared: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in (compared / "runs").rglob("part-*") if "manifest" not in path.name
    }
    environment = environment_of(compared)
    code, output = call("compare", "study.yaml", cwd=compared, **environment)
    assert code == 0, output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, output = call("compare", "study.yaml", "--set", "experiment.warmup.examples=5", cwd=compared, **environment)
    assert code == 1
    assert "this study was started with another configuration" in output


@pytest.mark.slow
def test_finished_study_is_compared_at_equal_response_tokens(compared: Path, methods: Path) -> None:
    command = ["compare", "study.yaml", "--set", "equal_response_tokens=true"]
    code, output = call(*command, cwd=compared, seconds=800, **environment_of(compared))
    assert code == 0, output
    proposing = [name for name in [*REGISTRY, "mine"] if name != "self_reward"]  # it trains its student itself
    last = {name: sorted((methods / name).glob("round-*"))[-1] / "student" for name in proposing}
    within = {name: methods / name / "equal-tokens" / "student" for name in proposing}
    counts = {
        name: [
            read_json(folder[name] / "part-00000" / "training_counts.json") or {"response_tokens": math.inf}
            for folder in (last, within)
        ]
        for name in proposing
    }
    whole = {name: both[0]["response_tokens"] for name, both in counts.items()}
    limit = min(whole.values())
    assert limit < max(whole.values())
    for name, (all_rows, rows) in counts.items():
        if whole[name] == limit:
            assert not within[name].exists()  # the same student
        else:
            assert rows["response_tokens"] <= limit < whole[name]
            assert rows["examples"] + rows["beyond_response_tokens"] == all_rows["examples"]
    result = read_json(compared / "runs" / "tiny-study" / "comparison.json")
    equal = result["equal_response_tokens"]
    assert equal["limits"] == [limit]
    assert [row["method"] for row in equal["methods"]] == proposing
    losses = {row["method"]: row["held_out_loss"] for row in equal["methods"]}
    for row in result["methods"]:
        if row["method"] in proposing:
            assert (losses[row["method"]] == row["held_out_loss"]) == (whole[row["method"]] == limit)
    assert f"at equal response tokens: {limit}" in output


TERSE = """
from flows.methods.method import Method, Proposal
from montessori_core.data.tables import EXAMPLES, table_from_rows, write_table

def method(name, words):
    def propose(now):
        row = {"prompt_id": "p", "prompt": "p", "raw_output": "r", "response_finished": True}
        rows = [row | {"example_id": str(n), "instruction": f"Count {n}.", "response": words} for n in range(6)]
        now.step.folder.mkdir(parents=True, exist_ok=True)
        write_table(table_from_rows(rows, EXAMPLES), now.step.folder / "examples.parquet", EXAMPLES)
        return Proposal(now.step.folder / "examples.parquet", now.run.initial_teacher())
    return Method(name, "Writes the same words.", propose)

TERSE, LONG, LONGER = method("terse", "1"), method("long", "one " * 20), method("longer", "one " * 30)
"""
"""Methods whose responses are short, or long: the first batch of a long one has more tokens than all short responses."""


@pytest.mark.slow
def test_short_method_is_not_compared_at_equal_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(TERSE)
    content = {
        "experiment": configuration(tmp_path, tiny_llama).name,
        "methods": ["own:TERSE", "own:LONG", "own:LONGER"],
        "baseline": "own:LONG",
        "equal_response_tokens": True,
        "seeds": [0],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    code, output = call("compare", "study.yaml", cwd=tmp_path, **environment_of(tmp_path))
    assert code == 0, output
    assert "terse: left out of the comparison at equal response tokens" in output
    result = read_json(tmp_path / "runs" / "study" / "comparison.json")
    assert [row["method"] for row in result["methods"]] == ["terse", "long", "longer"]
    assert [row["method"] for row in result["equal_response_tokens"]["methods"]] == ["long", "longer"]


@pytest.mark.slow
def test_self_reward_student_learns_from_its_scores(talking_llama: Path, judging_llama: Path, tmp_path: Path) -> None:
    experiment = yaml.safe_load(configuration(tmp_path, talking_llama).read_text())
    experiment["student"]["model"] = str(judging_llama)
    experiment["training"]["learning_rate"] = 1e-6  # the seeds have no judgements; SFT would unlearn them
    content = {"name": "own", "experiment": experiment, "methods": ["self_reward"], "baseline": "self_reward"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content | {"seeds": [0]}))
    code, output = call("compare", "study.yaml", cwd=tmp_path, seconds=800, **environment_of(tmp_path))
    assert code == 0, output
    round_1 = tmp_path / "runs" / "own" / "seed-0" / "methods" / "self_reward" / "round-1"
    judged = read_table(round_1 / "scores" / "part-00000.parquet", GENERATION).to_pylist()
    scores = {
        row["example_id"]: row["utility"]
        for row in read_table(round_1 / "scores" / "utility.parquet", UTILITY).to_pylist()
    }
    assert len(judged) == 3 * len(scores)
    for name, score in scores.items():
        own = [
            row for row in judged if row["example_id"].rpartition("-j")[0] == name and row["finish_reason"] == "stop"
        ]
        read = [int(found[1]) for row in own if (found := re.search(r"Score: ([0-5])$", row["raw_output"].strip()))]
        assert score == (pytest.approx(sum(read) / len(read)) if read else None)
    pairs = read_table(round_1 / "preferences.parquet", UTILITY_PREFERENCES)
    assert pairs.num_rows > 0
    assert (round_1 / "update" / "part-00000" / "model.safetensors").exists()

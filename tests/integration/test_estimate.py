"""The estimate of a run before its first job."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.fanout import fan_out
from cluster.stage import Stage
from flows import estimate
from flows.cli.tables import print_estimate
from flows.disk import Kept, warn_of_run, warn_of_study
from flows.estimate import PlannedStage, Sizes, estimate_run, planned_stages
from montessori_core.config import Cluster, Experiment, Optimization, Resources, Student, Study, Zero
from montessori_core.programs import Sft
from montessori_core.speed import measure_gflops
from support import ROOT
from support.killed_jobs import COUNTED_SFT
from support.row_programs import as_shards
from tasks.run import open_run, reopen_run

SIZES = Sizes(
    teacher=100,
    student=10,
    prompt=200,
    instruction=40,
    response=80,
    example=130,
    reference=20,
    evaluation=32,
    reference_tokens=2000,
    evaluation_tokens=3000,
)


def experiment(model: Path | str, **sections: object) -> Experiment:
    content = {"teacher": {"model": str(model)}, "student": {"model": str(model)}, "name": "trial", **sections}
    return Experiment.model_validate(content)


def planned(**sections: object) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in planned_stages(experiment("smollm2-135m", **sections), SIZES)}


def test_planned_stages_grow_with_sizes() -> None:
    small, large = (
        planned(training={"examples": count}, influence={"probing_examples": 10, "estimator": "first_order"})
        for count in (100, 1000)
    )
    grown = {name for name in small if large[name].flops != small[name].flops}
    parts = ("training set", "student training", "influence of the training set")
    assert grown == {f"{who}: {part}" for who in ("iteration 1", "unmodified teacher") for part in parts}
    written, trained = (f"iteration 1: {part}" for part in parts[:2])
    assert large[written].flops["write"] == pytest.approx(10 * small[written].flops["write"])
    assert small[trained].flops == {"learn": 6 * 10 * 100 * 130}


def test_planned_stages_count_exact_measurements() -> None:
    def flops(estimator: str, probing: int = 1000) -> dict[str, float]:
        stages = planned(influence={"probing_examples": probing, "estimator": estimator})
        return stages["iteration 1: influence of the probing set"].flops

    assert flops("exact")["read"] == 2 * 10 * 2000 * (3 + 1000)
    assert flops("first_order")["read"] == 2 * 10 * 2000 * 3
    assert flops("first_order")["read"] < flops("screened")["read"] < flops("exact")["read"]


def test_planned_pairs_follow_preferences() -> None:
    def pairs(**preferences: object) -> str:
        return planned(influence={"probing_examples": 1000}, preferences=preferences)[
            "iteration 1: teacher update"
        ].work

    across = {"pairs": "across_prompts", "baseline": "median"}
    assert pairs() == "about 700 pairs"
    assert pairs(**across) == "about 500 pairs"
    assert pairs(**across, max_uses=3) == "about 1,500 pairs"
    assert pairs(**across, max_uses=3, max_pairs=900) == "about 900 pairs"


def test_planned_stages_follow_iterations_and_comparison() -> None:
    names = list(planned(iterations=2, comparison={"unmodified_teacher": False, "influence_examples": 0}))
    assert names.count("iteration 2: probing set") == 1
    assert not any("unmodified" in name or "influence of the training set" in name for name in names)
    assert [name for name in names if "warm-up" in name] == [
        "iteration 1: warm-up and probing set",
        "iteration 1: student warm-up",
    ]


def test_answers_of_an_api_cost_dollars_not_operations(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"dollars_per_million_input_tokens": 1e3, "dollars_per_million_output_tokens": 2e3}
    asked = {"synthesis": {"answers": "endpoint"}, "answerer": {"model": "gpt-x", "max_tokens": 50, **prices}}
    alone, answered = planned(), planned(**asked)
    sets = [name for name in alone if name.endswith("set") and "influence" not in name]
    assert len(sets) == 3
    assert {name for name in alone if answered[name].flops != alone[name].flops} == set(sets)
    counts = {name: answered[name].answers for name in answered}
    sizes = experiment("smollm2-135m")
    assert counts[sets[0]] == sizes.warmup.examples + sizes.influence.probing_examples
    assert counts["iteration 1: training set"] == counts["unmodified teacher: training set"] == sizes.training.examples
    assert sum(counts.values()) == sum(counts[name] for name in sets)

    monkeypatch.setattr(estimate, "measure_gflops", lambda threads: 100.0)
    run, _ = open_run(experiment(tiny_llama, **asked), tmp_path / "run")
    estimated = estimate_run(run)
    assert 1e-3 * (40 + 2 * 50) * estimated.answers < 2 * estimated.dollars
    print_estimate(run.experiment, estimated)
    assert f"the time of {estimated.answers:,} answers from gpt-x is not included, about" in capsys.readouterr().out


def test_estimate_says_how_to_use_all_cores(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "measure_gflops", lambda threads: 100.0)
    run, _ = open_run(experiment(tiny_llama), tmp_path / "run")
    estimated = estimate_run(run)
    for cores in (2, 16):
        monkeypatch.setattr("os.sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        print_estimate(run.experiment, estimated)
        hint = "A job uses 2 of this machine's 16 cores. For all of them add --set 'cluster.resources.*.cpus_per_process=16'"
        assert (hint in capsys.readouterr().out) == (cores == 16)


def test_planned_stage_takes_less_on_faster_machine() -> None:
    stage = PlannedStage("s", "w", 2, {"learn": 1e12})
    assert stage.seconds(50) - stage.seconds(100) == pytest.approx(1e12 / (estimate._EFFICIENCY["learn"] * 100e9))


def test_estimate_measures_no_speed_for_gpus(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "measure_gflops", lambda threads: pytest.fail("measured"))
    monkeypatch.setattr("cluster.backends.local.gpus_of_this_machine", lambda: ["0"])
    on_gpu = {"resources": {"influence": {"gpus_per_node": 1}}}
    run, _ = open_run(experiment(tiny_llama, cluster=on_gpu), tmp_path / "run")
    print_estimate(run.experiment, estimate_run(run))
    shown = capsys.readouterr().out
    assert "iteration 1: teacher update" in shown
    assert "forecast CONFIG --pilot" in shown
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["driver"]["gflops"] is None


def test_speed_survives_reopening(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "measure_gflops", lambda threads: 217.04)
    run, _ = open_run(experiment(tiny_llama), tmp_path / "run")
    estimate_run(run)
    open_run(run.experiment, run.folder)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["driver"]["gflops"] == 217.0


def test_measure_gflops_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = measure_gflops(1)
    assert speed is not None
    assert 1 < speed < 10_000
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert measure_gflops(1) is None


def test_models_on_disk_are_as_planned(finished_run: Path) -> None:
    run = reopen_run(finished_run / "runs" / "tiny")
    written = sum(file.stat().st_size for file in run.folder.rglob("*.safetensors"))
    assert Kept.of(run).of_run(run.experiment) == pytest.approx(written, rel=0.05)


def test_checkpoints_on_disk_are_as_planned(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the peak, which is when one is complete and the one before it is not removed yet."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    recipe = Optimization(batch_size=1, micro_batch_size=1)
    settings = Sft(max_length=64, lora=None, recipe=recipe, zero=Zero(stage=0), seed=0, save_moments=False)
    rows = [{"instruction": f"Name {n} rivers.", "response": "The Rhine.", "response_finished": True} for n in range(5)]
    stage = Stage.of(COUNTED_SFT, settings, tmp_path / "stage", {"student": tiny_llama}, {})
    fan_out(stage, as_shards(rows), Resources(), Cluster(poll_seconds=0.1))
    written = [int(line) for line in (tmp_path / "stage" / "bytes.txt").read_text().split()]
    assert len(written) == 4  # steps before the last
    run, _ = open_run(experiment(tiny_llama), tmp_path / "run")
    assert Kept.of(run).checkpoints == pytest.approx(max(written), rel=0.2)  # tied embeddings are there twice more


def test_full_disk_is_announced(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = reopen_run(finished_run / "runs" / "tiny")
    run = replace(finished, folder=tmp_path)  # of a new run: a resumed one has models already
    study = Study(experiment=run.experiment, methods=("montessori", "self_instruct", "select"), seeds=(0, 1))
    assert warn_of_run(run) == warn_of_study(study, [run], run.folder) == []
    kept = Kept.of(run)
    needed = kept.of_run(run.experiment) + kept.checkpoints
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=needed))
    assert warn_of_run(run) == []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    assert len(warn_of_run(run)) == 1
    (warning,) = warn_of_study(study, [run], run.folder)
    assert "Free space, or choose another --run-root" in warning
    assert warn_of_run(finished) == warn_of_study(study, [finished], finished.folder) == []
    assert 2 * kept.of_run(run.experiment) < kept.of_study(study, [])


def test_transfer_students_need_their_own_space(finished_run: Path, smollm2: Path) -> None:
    run = reopen_run(finished_run / "runs" / "tiny")
    student = Student(model=str(smollm2))
    other = Kept.of(replace(run, experiment=run.experiment.model_copy(update={"student": student})))
    methods, kept = ("montessori", "self_instruct", "select"), Kept.of(run)
    study = Study(experiment=run.experiment, methods=methods, seeds=(0, 1), transfer=(student,))
    assert other.student > 4 * 100e6  # SmolLM2 in fp32
    assert kept.of_study(study, [other]) - kept.of_study(study, []) == 2 * 3 * other.student

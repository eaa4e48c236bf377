"""`montessori validate`: from the command line, killed in the middle, and with bad input."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from flows.validation import PAGE, PREDICTED, RESULT, TRAININGS
from montessori_core.data.tables import PREDICTIONS, RETRAINING, read_table
from support import ROOT, wait_until
from support.runs import invoke, kill_everything, left_over, montessori

EXAMPLES = [
    {"instruction": f"Describe object {i}.", "output": f"Object {i} is " + "round " * (1 + i % 5)} for i in range(22)
]
EXAMPLES.append({"id": "long", "instruction": "word " * 200, "output": "cut off"})
REFERENCE = [{"instruction": f"What is object {i}?", "output": f"It is round {i}."} for i in range(8)]
OPTIONS = ["--learning-rate", "1e-3", "--max-length", "64", "--batch-size", "4", "--subsets", "8", "--leave-out", "8"]
RESULTS = (RESULT, TRAININGS, PREDICTED, PAGE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("data", EXAMPLES), ("warmup", EXAMPLES[:8]), ("reference", REFERENCE)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def arguments(folder: Path, model: Path, *options: str) -> list[str]:
    files = {"--examples": "data.jsonl", "--reference": "reference.jsonl", "--out": "validation"}
    given = [text for option, name in files.items() for text in (option, str(folder / name))]
    return ["validate", "--student", str(model), *given, *options]


def test_validation_reports_every_predictor(tiny_llama: Path, folder: Path) -> None:
    code, output = invoke(*arguments(folder, tiny_llama, "--warmup", str(folder / "warmup.jsonl"), *OPTIONS), cwd=ROOT)
    assert code == 0, output
    check_results(folder / "validation", output)
    code, output = invoke("resume", "validation", cwd=folder)
    assert code == 1
    assert "validation holds a validation of influence, not a run" in output


@pytest.mark.slow
def test_killed_validation_resumes_to_same_numbers(tiny_llama: Path, folder: Path) -> None:
    command = arguments(folder, tiny_llama, "--warmup", str(folder / "warmup.jsonl"), *OPTIONS)
    driver = montessori(*command, cwd=folder)
    committed = folder / "validation" / "retraining" / "part-00000.manifest.json"
    wait_until(committed.exists, 500, process=driver)
    kill_everything(driver, signal.SIGKILL)
    wait_until(lambda: not left_over(folder))
    assert not (folder / "validation" / RESULT).exists()
    before = committed.stat().st_mtime_ns
    code, output = invoke(*command, cwd=ROOT)
    assert code == 0, output
    assert committed.stat().st_mtime_ns == before
    results = {name: (folder / "validation" / name).read_bytes() for name in RESULTS}

    # Without an interruption, from the same warm student.
    for name in ("retraining", "retraining-tenths", "cosine", *RESULTS):
        path = folder / "validation" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, output = invoke(*command, cwd=ROOT)
    assert code == 0, output
    assert {name: (folder / "validation" / name).read_bytes() for name in RESULTS} == results
    check_results(folder / "validation", output)


def check_results(out: Path, output: str) -> None:
    names = ["exact", "first order", "linear", "loss", "response tokens", "gradient norm", "gradient cosine", "BM25"]
    for text in (
        "22 examples (1 left out), 8 reference",
        "the end of 11 of 23 examples is cut",
        "8 random subsets of 5",
        "8 groups of 3",
        "deciles (2",
        *names,
    ):
        assert text in output
    result = json.loads((out / RESULT).read_text())
    for part in ("random_subsets", "left_out"):
        assert [score["predictor"] for score in result[part]["scores"]] == names
        assert len(result[part]["measured"]) == len(result[part]["predicted"]["exact"]) == 8
    trainings = {row["training_id"]: row for row in read_table(out / TRAININGS, RETRAINING).to_pylist()}
    assert len(trainings) == 1 + 8 + 1 + 8 + 3 * len(names)
    assert trainings["none"]["reference_loss"] == result["student_loss"]
    assert len(trainings["all"]["example_ids"]) == 22
    assert trainings["random-00003"]["steps"] == 2  # of 4 and 1
    fall = trainings["none"]["reference_loss"] - trainings["random-00003"]["reference_loss"]
    assert result["random_subsets"]["measured"][3] == fall
    predictions = read_table(out / PREDICTED, PREDICTIONS).to_pylist()
    assert len(predictions) == 23 * len(names)
    unmeasured = {row["predictor"] for row in predictions if row["example_id"] == "long" and row["value"] is None}
    assert unmeasured == {"exact", "first order", "linear", "loss", "gradient norm", "gradient cosine"}
    members = trainings["random-00003"]["example_ids"]
    summed = sum(row["value"] for row in predictions if row["predictor"] == "exact" and row["example_id"] in members)
    assert result["random_subsets"]["predicted"]["exact"][3] == pytest.approx(summed)


@pytest.mark.slow
def test_example_weights_are_compared(tiny_llama: Path, folder: Path) -> None:
    """Without a warm-up; the second run has another weight, and repeats no training on random subsets."""
    options = [*OPTIONS[:-1], "0", "--no-exact", "--example-weight", "1"]
    code, output = invoke(*arguments(folder, tiny_llama, *options), cwd=ROOT)
    assert code == 0, output
    part = folder / "validation" / "retraining" / "part-00000.parquet"
    before = part.stat().st_mtime_ns
    code, output = invoke(
        *arguments(folder, tiny_llama, *options, "--example-weight", "0.125", "--weight-per", "token"), cwd=ROOT
    )
    assert code == 0, output
    assert "score less first order, weight 1 per token" in output
    assert "left out in turn" not in output
    assert part.stat().st_mtime_ns == before


def test_bad_validations_are_refused_before_any_job(tiny_llama: Path, folder: Path) -> None:
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES[:19])))
    (folder / "seven.jsonl").write_text("\n".join(map(json.dumps, REFERENCE[:7])))
    (folder / "cluster.yaml").write_text("resources: {training: {processes_per_node: 3}}")
    (folder / "gpus.yaml").write_text("resources: {training: {gpus_per_node: 99}}")
    warmup = ["--warmup", str(folder / "warmup.jsonl")]
    for options, message in (
        (["--examples", str(folder / "few.jsonl")], "19 examples; a validation needs at least 20"),
        (["--examples", "data.csv"], "data.csv: cannot be read"),
        (["--examples", "data.txt"], "--examples: data.txt: expected a file (.jsonl"),
        (["--examples", "{path: data.jsonl, sub: main}"], "--examples is not valid:"),
        (["--warmup", "builtin"], "--warmup: builtin: the built-in sets are seeds"),
        (["--chat-template-kwargs", "false"], "--chat-template-kwargs false: write a mapping"),
        (["--reference", str(folder / "seven.jsonl")], "holds 7 examples; a reference set needs at least 8"),
        (["--subset-size", "23"], "--subset-size 23: random subsets of 23 need more than 23 examples"),
        (["--leave-out", "24"], "--leave-out 24: there are only 23 examples"),
        (["--leave-out", "3"], "--leave-out 3: a correlation needs at least 8 groups"),
        (["--example-weight", "2"], "--example-weight: Input should be less than or equal to 1"),
        (["--learning-rate", "0"], "--learning-rate: Input should be greater than 0"),
        (["--warm-state", str(tiny_llama)], "no adamw.safetensors there"),
        ([*warmup, "--warm-state", str(tiny_llama)], "--warmup and --warm-state: give one of them"),
        (["--warmup", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--out", str(folder / "few.jsonl")], "few.jsonl: is a file; name a folder"),
        (["--device", "cpu", "--cluster", str(folder / "cluster.yaml")], "--cluster and --device: give one of them"),
        ([*warmup, "--cluster", str(folder / "cluster.yaml")], "--batch-size 8: must be a multiple of the 3 processes"),
        ([*warmup, "--cluster", str(folder / "gpus.yaml")], "a job needs 99 GPUs, but this machine has"),
    ):
        code, output = invoke(*arguments(folder, tiny_llama, *options), cwd=ROOT)
        assert code == 1, output
        assert message in " ".join(output.split())
        assert "Traceback" not in output
        assert not (folder / "validation").exists()

"""`montessori influence`, `select`, `train` and `evaluate` in sequence, on the tiny Llama."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.training import training_experiment
from montessori_core.config import DataSource
from montessori_core.data.sources import read_tasks
from montessori_core.data.tables import EXAMPLES as EXAMPLE_TABLE
from montessori_core.data.tables import INFLUENCE, read_table, write_table
from montessori_core.errors import ConfigError
from montessori_core.files import read_json
from montessori_core.influence.table import read_influence_metadata_of, schema_with_metadata
from montessori_core.layout import COUNTS_FILE, LOG_FILE, MOMENTS_FILE
from montessori_core.models.examples import encode_task
from montessori_core.models.fingerprints import hash_model
from montessori_core.models.load import load_merged, load_model, load_tokenizer
from montessori_core.selection.pools import FilesPool
from support import ROOT
from support.runs import call, invoke

EXAMPLES = [
    {"id": f"x{i}", "instruction": f"Describe object {i}.", "output": f"Object {i} is " + "round " * (1 + i % 4)}
    for i in range(20)
]
RECIPE = ["training.batch_size=2", "training.learning_rate=1e-3", "training.epochs=2", "student.max_length=128"]
SETTINGS = [part for setting in (*RECIPE, "zero.stage=0", "cluster.poll_seconds=0.1") for part in ("--set", setting)]


def train(student: Path, data: Path, output: Path, *options: str) -> tuple[int, str]:
    code, text = invoke("train", str(student), str(data), "--output", str(output), *SETTINGS, *options, cwd=ROOT)
    return code, " ".join(text.split())


def test_commands_run_in_sequence(tiny_llama: Path, finished_run: Path, tmp_path: Path) -> None:
    data, table, best, student = (tmp_path / name for name in ("data.jsonl", "scored.parquet", "best.jsonl", "student"))
    data.write_text("\n".join(map(json.dumps, EXAMPLES)))
    files = ["--examples", str(data), "--reference", str(data), "--out", str(table), "--estimator", "first_order"]
    code, output = invoke("influence", "--student", str(tiny_llama), *files, cwd=ROOT)
    assert code == 0, output
    code, output = invoke(
        "select", str(table), "--examples", str(data), "--share", "0.3", "--output", str(best), cwd=ROOT
    )
    assert code == 0, output
    assert len(list(FilesPool(best).rows())) == 6

    code, output = train(tiny_llama, best, student, "--save-moments")
    assert code == 0, output
    assert "examples 6" in output
    counts = read_json(student / COUNTS_FILE)
    assert (counts["examples"], counts["truncated"], counts["left_out"]) == (6, 0, 0)
    log = read_json(student / LOG_FILE)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"]
    assert (student / MOMENTS_FILE).exists()
    card = (student / "README.md").read_text()
    for text in (
        "library_name: transformers",
        "trained on best.jsonl",
        "learning_rate: 0.001",
        "| examples | 6 |",
        "| licence of the data | not stated |",
    ):
        assert text in card
    assert str(tmp_path) not in card
    before = (student / "model.safetensors").stat().st_mtime_ns
    code, output = train(tiny_llama, best, student, "--save-moments")
    assert code == 0, output
    assert (student / "model.safetensors").stat().st_mtime_ns == before

    code, output = train(tiny_llama, data, student, "--save-moments")
    assert code == 1
    assert "has a student of another training; nothing is overwritten" in output
    code, output = invoke("resume", "student.parts", cwd=tmp_path)
    assert code == 1
    assert "student.parts holds a training, not a run; resume it with: " in output
    assert f"montessori train {tiny_llama} {best} --output {student}" in output

    limit = counts["response_tokens"] - 1
    code, output = train(tiny_llama, best, tmp_path / "shorter", "--set", f"training.response_tokens={limit}")
    assert code == 0, output
    shorter = read_json(tmp_path / "shorter" / COUNTS_FILE)
    assert (shorter["examples"], shorter["beyond_response_tokens"]) == (5, 1)
    assert shorter["response_tokens"] <= limit

    evaluation = [
        "evaluation={path: builtin, limit: 4}",
        "benchmarks.tasks=[]",
        "student.max_length=192",
        "cluster.poll_seconds=0.1",
    ]
    options = [part for setting in evaluation for part in ("--set", setting)]
    home = shutil.copytree(finished_run / "prefect", tmp_path / "prefect")  # a database takes seconds to make
    code, output = call("evaluate", str(student), *options, cwd=tmp_path, PREFECT_HOME=str(home))
    assert code == 0, output
    result = read_json(tmp_path / "runs" / "evaluation-student" / "evaluation.json")
    assert result["held_out_loss"]["mean"] > 0
    scored = (student / "README.md").read_text()
    assert f"| held-out loss, nats per token | {result['held_out_loss']['mean']:.4f} |" in scored
    body = card.partition("\n---\n")[2]
    assert body in scored
    (student / "README.md").chmod(0o444)
    code, output = call("evaluate", str(student), *options, cwd=tmp_path, PREFECT_HOME=str(home))
    assert code == 0, output
    assert (student / "README.md").read_text() == scored
    code, output = train(tiny_llama, best, student, "--save-moments")
    assert code == 0, output


def test_selection_needs_the_measured_examples(tiny_llama: Path, tmp_path: Path) -> None:
    """Rows without ids are joined by their place, so that other rows would fit."""
    rows = [{"instruction": f"Describe object {n}.", "output": f"Object {n}." + " Yes." * (n % 3)} for n in range(6)]
    edited = [*rows[:2], rows[2] | {"output": "Another answer."}, *rows[3:]]
    files = {"data": rows, "reversed": rows[::-1], "edited": edited, "longer": [*rows, EXAMPLES[0]]}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    for name in ("data", "reversed"):
        given = ["--examples", f"{name}.jsonl", "--reference", "data.jsonl", "--out", f"{name}.parquet"]
        code, output = invoke(
            "influence", "--student", str(tiny_llama), *given, "--estimator", "first_order", cwd=tmp_path
        )
        assert code == 0, output
    table = read_table(tmp_path / "data.parquet", INFLUENCE)
    write_table(table.slice(0, 3), tmp_path / "part.parquet", INFLUENCE)
    write_table(
        table.replace_schema_metadata(schema_with_metadata(read_influence_metadata_of(table)).metadata),
        tmp_path / "earlier.parquet",
        INFLUENCE,
    )
    other = "is not the data that was measured"
    for number, (tables, examples, refusal) in enumerate(
        [
            (["data"], "data", None),
            (["data"], "longer", None),
            (["part"], "data", None),
            (["earlier"], "edited", None),
            (["earlier", "data"], "data", None),
            (["data"], "reversed", f"data.parquet: --examples reversed.jsonl {other}"),
            (["data"], "edited", f"data.parquet: --examples edited.jsonl {other}"),
            (["part"], "edited", f"part.parquet: --examples edited.jsonl {other}"),
            (["data", "reversed"], "data", f"reversed.parquet: --examples data.jsonl {other}"),
            (["earlier", "data"], "edited", f"data.parquet: --examples edited.jsonl {other}"),
        ]
    ):
        pools = [f"{name}.parquet" for name in tables]
        options = ["--examples", f"{examples}.jsonl", "--k", "3", "--output", f"best-{number}.jsonl"]
        code, output = invoke("select", *pools, *options, cwd=tmp_path)
        assert code == (0 if refusal is None else 1), output
        assert (refusal or "3 of ") in " ".join(output.split())


def test_unfinished_responses_do_not_teach_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    """The same rows as an example table of a run, with `response_finished` of the rows."""
    weights = {}
    for name, flags in (("all", [True] * 4), ("some", [True, False] * 2)):
        data = tmp_path / f"{name}.jsonl"
        rows = [row | {"response_finished": flag} for row, flag in zip(EXAMPLES, flags, strict=False)]
        data.write_text("\n".join(map(json.dumps, rows)))
        code, output = train(tiny_llama, data, tmp_path / name)
        assert code == 0, output
        weights[name] = load_model(str(tmp_path / name), torch.float32).get_input_embeddings().weight
    assert not torch.equal(weights["all"], weights["some"])


@pytest.mark.parametrize("options", [[], ["--set", "student.lora={rank: 4}", "--merge"]], ids=["full", "merged"])
def test_folder_of_something_else_is_no_finished_student(options: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "student"
    data.write_text("\n".join(map(json.dumps, EXAMPLES[:4])))
    code, text = train(tiny_llama, data, output, *options)
    assert code == 0, text
    trained = output.rename(tmp_path / "trained")
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for _ in range(2):
        code, text = train(tiny_llama, data, output, *options)
        assert (code, "has a student of another training; nothing is overwritten" in text) == (1, True), text
        shutil.rmtree(output)
        shutil.copytree(tiny_llama, output)
    shutil.rmtree(output)
    code, text = train(tiny_llama, data, output, *options)
    assert code == 0, text
    assert hash_model(output) == hash_model(trained)
    (output / "README.md").write_text("# Edited")
    assert train(tiny_llama, data, output, *options)[0] == 0


def test_training_leaves_out_bad_lines(tiny_llama: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "student"
    lines = [json.dumps(row | {"response_finished": True}) for row in EXAMPLES]
    data.write_text("\n".join([*lines[:2], "{not JSON", *lines[2:], "7"]))
    source = f"{{path: {data}, drop_bad_rows: true, max_bad_rows: 0.1}}"
    code, text = invoke("train", str(tiny_llama), source, "--output", str(output), *SETTINGS, cwd=ROOT)
    assert code == 0, text
    assert read_json(output / COUNTS_FILE)["examples"] == 20
    (tmp_path / "clean.jsonl").write_text("\n".join(lines))
    code, text = train(tiny_llama, tmp_path / "clean.jsonl", output, "--set", "seed=1")
    assert (code, "has a student of another training" in text) == (1, True), text
    listed = map(json.loads, (tmp_path / "student.parts" / "bad_rows.jsonl").read_text().splitlines())
    assert [row["reason"] for row in listed] == ["not valid JSON", "no object with named fields"]
    code, text = train(tiny_llama, data, tmp_path / "other")
    assert code == 1
    assert "line 3, column 2: not valid JSON" in text
    assert "or set DATA '{path: ..., drop_bad_rows: true}' to leave such rows out" in text


def test_merged_student_is_a_model_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    data, lora = tmp_path / "data.jsonl", ["--set", "student.lora={rank: 4}"]
    data.write_text("\n".join(map(json.dumps, EXAMPLES)))
    code, text = train(tiny_llama, data, tmp_path / "out", *lora, "--merge")
    assert code == 0, text
    merged, before = (load_model(str(folder), torch.float32).state_dict() for folder in (tmp_path / "out", tiny_llama))
    expected = load_merged(str(tmp_path / "out.parts" / "training" / "part-00000"), torch.float32).state_dict()
    assert merged.keys() == before.keys()
    assert all(torch.equal(weights, expected[name]) for name, weights in merged.items())
    assert not all(torch.equal(weights, before[name]) for name, weights in merged.items())
    assert "of a LoRA adapter, merged into it," in (tmp_path / "out" / "README.md").read_text()
    assert train(tiny_llama, data, tmp_path / "out", *lora, "--merge")[0] == 0  # nothing to do
    code, text = train(tiny_llama, data, tmp_path / "out", *lora)
    assert code == 1
    assert "nothing is overwritten" in text


def test_finished_adapter_is_not_trained_again(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT writes a card with an adapter, ours replaces it: the copy that resumes the training is as it was."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, EXAMPLES)))
    for _ in range(2):
        code, text = train(tiny_llama, data, tmp_path / "out", "--set", "student.lora={rank: 4}")
        assert code == 0, text
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    assert "Montessori" not in (tmp_path / "out.parts" / "training" / "part-00000" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "student.lora={rank: 0}"], "student.lora.rank"),
        (["--merge"], "the student has no adapter; leave it out, or set student.lora"),
        (["--set", "training.batch_size=3"], "must be a multiple of micro_batch_size"),
        (["--chat-template", "absent.jinja"], "absent.jinja cannot be read"),
        (["--set", "student.max_length=100000"], "max_length"),
    ],
)
def test_bad_options_are_refused(tiny_llama: Path, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    code, output = train(tiny_llama, tmp_path / "data.jsonl", tmp_path / "out", *options)
    assert code == 1
    assert message in output
    assert not (tmp_path / "out").exists()


def test_training_checks_what_it_uses_alone() -> None:
    """Warm-up, teacher update and synthesis are of no use to a training, whatever the processes of its jobs."""
    content = {
        "teacher": {"model": "absent/teacher"},
        "student": {"max_length": 96},
        "synthesis": {"filters": [{"filter": "judge"}]},
        "warmup": {"batch_size": 3},
        "teacher_update": {"batch_size": 1},
        "training": {"batch_size": 12, "micro_batch_size": 3},
        "cluster": {"resources": {"training": {"processes_per_node": 4}, "teacher_update": {"processes_per_node": 9}}},
    }
    experiment = training_experiment(content, "student", "file")
    assert (experiment.training.batch_size, experiment.student.max_length) == (12, 96)
    assert experiment.cluster.resources.training.processes_per_node == 4
    for section, value, message in (
        ("training", {"batch_size": 6, "micro_batch_size": 3}, r"training.batch_size \(6\) .* x 4 processes"),
        ("training", {"batch_size": 6, "micro_batch_size": 4}, r"training: batch_size \(6\) must be a multiple of"),
        ("cluster", {"resources": {"training": {"processes": 4}}}, "cluster.resources.training.processes"),
        ("cluster", 1, "cluster: "),
        ("trainings", {}, "trainings"),
    ):
        with pytest.raises(ConfigError, match=message) as refusal:
            training_experiment(content | {section: value}, "student", "file")
        assert "warmup" not in str(refusal.value)


def test_absent_data_and_present_output_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    code, output = train(tiny_llama, tmp_path / "absent.jsonl", tmp_path / "out")
    assert code == 1
    assert "absent.jsonl: cannot be read" in output
    write_table(EXAMPLE_TABLE.empty_table(), tmp_path / "empty.parquet", EXAMPLE_TABLE)
    code, output = train(tiny_llama, tmp_path / "empty.parquet", tmp_path / "out")
    assert code == 1
    assert "empty.parquet has no rows; give examples to train on" in output
    (tmp_path / "out").mkdir()
    code, output = train(tiny_llama, tmp_path / "data.jsonl", tmp_path / "out")
    assert code == 1
    assert "nothing is overwritten" in output


CHATS: list[dict[str, Any]] = [
    {
        "id": f"c{i}",
        "messages": [
            *([{"role": "system", "content": "Be short."}] if i % 2 else []),
            {"role": "user", "content": f"Describe object {i}."},
            {"role": "assistant", "content": f"Object {i} is round.", "weight": i % 3 and 1},
            {"role": "user", "content": f"Describe object {i + 50}, too."},
            {"role": "assistant", "content": f"Object {i + 50} is " + "flat " * (1 + i % 4)},
        ],
    }
    for i in range(12)
]


@pytest.mark.slow
def test_conversations_are_scored_selected_trained_and_evaluated(tiny_llama: Path, tmp_path: Path) -> None:
    data, table, best, student = (
        tmp_path / name for name in ("chats.jsonl", "scored.parquet", "best.jsonl", "student")
    )
    data.write_text("\n".join(map(json.dumps, [*CHATS, {"messages": CHATS[0]["messages"][:2]}])))
    files = ["--examples", str(data), "--reference", str(data), "--out", str(table), "--estimator", "first_order"]
    code, output = invoke("influence", "--student", str(tiny_llama), *files, cwd=ROOT)
    assert code == 1
    assert "chats.jsonl, line 13: field 'messages.1.content': the last answer has weight 0" in " ".join(output.split())
    data.write_text("\n".join(map(json.dumps, CHATS)))
    code, output = invoke("influence", "--student", str(tiny_llama), *files, cwd=ROOT)
    assert code == 0, output
    tokenizer = load_tokenizer(str(tiny_llama))
    tasks = {task.example_id: task for task in read_tasks(DataSource(path=str(data)), "examples", with_response=True)}
    encoded = {name: encode_task(tokenizer, task, 1024) for name, task in tasks.items()}
    measured = read_table(table, INFLUENCE).to_pylist()
    assert {row["example_id"]: row["response_tokens"] for row in measured} == {
        name: example.response_tokens for name, example in encoded.items()
    }

    choice = ["--share", "0.5", "--max-rouge-l", "0.999", "--output", str(best)]
    code, output = invoke("select", str(table), "--examples", str(data), *choice, cwd=ROOT)
    assert code == 0, output
    chosen = read_tasks(DataSource(path=str(best)), "data", with_response=True)
    assert len(chosen) == 6
    assert {task.example_id: encode_task(tokenizer, task, 1024) for task in chosen}.items() <= encoded.items()

    code, output = train(tiny_llama, best, student)
    assert code == 0, output
    counts = read_json(student / COUNTS_FILE)
    assert (counts["examples"], counts["truncated"], counts["left_out"]) == (6, 0, 0)
    losses = {}
    for loss in ("all", "last"):
        evaluation = f"evaluation={{path: {data}, train_on: {loss}}}"
        settings = [
            evaluation,
            f"name={loss}",
            "benchmarks.tasks=[]",
            "student.max_length=192",
            "cluster.poll_seconds=0.1",
        ]
        options = [part for setting in settings for part in ("--set", setting)]
        code, output = call("evaluate", str(student), *options, cwd=tmp_path)
        assert code == 0, output
        (result,) = (tmp_path / "runs").glob("*/evaluation.json")
        losses[loss] = read_json(result)["held_out_loss"]["mean"]
        shutil.rmtree(tmp_path / "runs")
    assert losses["all"] != losses["last"]

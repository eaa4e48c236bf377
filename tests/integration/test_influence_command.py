"""`montessori influence`: any data and any student, outside a run."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from cluster.lock import only_driver
from cluster.records import Description, read_record
from flows.cli.influence import local_cluster
from montessori_core import layout
from montessori_core.config import Optimization
from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.models.load import load_model
from montessori_core.training.moments import Moments, cold_moments, save_moments
from support import ROOT
from support.runs import call, invoke

EXAMPLES = [
    {"instruction": f"Describe object {i}.", "input": "", "output": f"Object {i} is " + "round " * (1 + i % 4)}
    for i in range(20)
]


def arguments(folder: Path, model: Path, *options: str) -> list[str]:
    files = {"--examples": "data.jsonl", "--reference": "reference.jsonl", "--out": "influence.parquet"}
    given = [text for option, name in files.items() for text in (option, str(folder / name))]
    return ["influence", "--student", str(model), *given, *options]


def influence(folder: Path, model: Path, *options: str) -> tuple[int, str]:
    """Run the command in this process and in one folder, so that one warm process starts the jobs of all tests."""
    return invoke(*arguments(folder, model, *options), cwd=ROOT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    (tmp_path / "reference.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES[:3])))
    return tmp_path


def test_any_data_is_measured_once(tiny_llama: Path, folder: Path) -> None:
    code, output = influence(folder, tiny_llama, "--learning-rate", "1e-4")
    assert code == 0, output
    for text in ("20 of 20", "share that helps", "noise floor", "influence.parquet"):
        assert text in output
    table = read_table(folder / "influence.parquet", INFLUENCE)
    assert table.num_rows == 20
    # A step on a reference example lowers its loss.
    assert all(value > 0 for value in table["influence_student"].to_pylist()[:3])
    before = {path: path.stat().st_mtime_ns for path in (folder / "influence.parquet.parts").glob("part-*")}
    content = (folder / "influence.parquet").read_bytes()
    code, output = influence(folder, tiny_llama, "--learning-rate", "1e-4")
    assert code == 0, output
    assert {path: path.stat().st_mtime_ns for path in (folder / "influence.parquet.parts").glob("part-*")} == before
    assert (folder / "influence.parquet").read_bytes() == content
    code, output = invoke("status", "influence.parquet.parts", cwd=folder)
    assert (code, "screen" in output, "done" in output, "Resume" in output) == (0, True, True, False), output
    (folder / "influence.parquet").unlink()
    expected = f"cd {ROOT} && montessori influence --student {tiny_llama} --examples {folder}/data.jsonl"
    for command, text in (
        ("status", "Resume with: "),
        ("resume", "holds a measurement of influence, not a run; resume"),
    ):
        _, output = invoke(command, "influence.parquet.parts", cwd=folder)
        assert text in output
        assert expected in output


@pytest.mark.parametrize("estimator", ["first_order", "screened", "linear"])
def test_several_reference_sets_get_a_table_each(tiny_llama: Path, folder: Path, estimator: str) -> None:
    """To the last bit as if it were measured alone; to first order, in one pass over the examples."""
    (folder / "others").mkdir()
    (folder / "others" / "reference.json").write_text(json.dumps(EXAMPLES[10:15]))
    options = ["--learning-rate", "1e-4", "--estimator", estimator, "--audit-examples", "40"]
    code, output = influence(folder, tiny_llama, *options, "--reference", str(folder / "others" / "reference.json"))
    assert code == 0, output
    assert not (folder / "influence.parquet").exists()
    parts = folder / "influence.parquet.parts"
    joint = read_record(parts / "targets" / "stage.json", Description)
    assert (joint is None) == (estimator == "linear")
    for name, reference in (("reference", "reference.jsonl"), ("reference-2", "others/reference.json")):
        assert f"influence-{name}.parquet" in output
        together = read_table(folder / f"influence-{name}.parquet", INFLUENCE)
        alone = folder / f"alone-{name}.parquet"
        given = ("--student", str(tiny_llama), "--examples", str(folder / "data.jsonl"), "--out", str(alone))
        code, output_alone = invoke("influence", *given, *options, "--reference", str(folder / reference), cwd=ROOT)
        assert code == 0, output_alone
        expected = read_table(alone, INFLUENCE)
        assert together.equals(expected, check_metadata=True)
    before = {path: path.stat().st_mtime_ns for path in parts.rglob("part-*")}
    code, output = influence(folder, tiny_llama, *options, "--reference", str(folder / "others" / "reference.json"))
    assert code == 0, output
    assert {path: path.stat().st_mtime_ns for path in parts.rglob("part-*")} == before


def test_status_of_other_reference_sets_names_earlier_stages(tiny_llama: Path, folder: Path) -> None:
    (folder / "other.json").write_text(json.dumps(EXAMPLES[10:15]))
    options = ["--audit-examples", "40"]
    for others, shown, hidden in (
        ([], ["screen", "audit"], []),
        (["other.json"], ["on-reference/", "on-other/", "targets"], ["screen"]),
        ([], ["screen"], ["on-reference/", "on-other/", "targets"]),
    ):
        given = [word for name in others for word in ("--reference", str(folder / name))]
        code, output = influence(folder, tiny_llama, *options, *given)
        assert code == 0, output
        code, output = invoke("status", "influence.parquet.parts", cwd=folder)
        assert code == 0, output
        table, _, earlier = output.partition("of earlier settings")
        assert all(name in table for name in shown), output
        assert not any(name in table for name in hidden), output
        assert all(name in earlier for name in hidden), output


def test_reference_sets_that_exclude_each_other_are_refused(tiny_llama: Path, folder: Path) -> None:
    code, output = influence(folder, tiny_llama, "--weight-per", "token", "--reference", "builtin")
    assert code == 1
    assert "--weight-per token depends on the responses of the reference set" in output
    code, output = influence(folder, tiny_llama, "--reference", str(folder / "reference.jsonl"))
    assert code == 1
    assert f"--reference {folder / 'reference.jsonl'}: given twice" in output


def test_cut_responses_are_measured_without_their_end(tiny_llama: Path, folder: Path) -> None:
    """As examples and as references."""
    tables = []
    for cut in ("data", "reference", "none"):
        for name, rows in (("data", EXAMPLES), ("reference", EXAMPLES[:3])):
            finished = [row | {"response_finished": cut != name} for row in rows[:3]]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, finished)))
        code, output = influence(folder, tiny_llama, "--estimator", "first_order")
        assert code == 0, output
        tables.append(read_table(folder / "influence.parquet", INFLUENCE))
    tokens, influences = (
        [table[name].to_pylist() for table in tables] for name in ("response_tokens", "influence_student")
    )
    assert [count + 1 for count in tokens[0]] == tokens[1] == tokens[2]
    assert influences[1] != influences[2]


def test_example_weight_enters_the_step_and_its_key(tiny_llama: Path, folder: Path) -> None:
    """Without moments every coordinate with a gradient is dominated, at any weight; the command warns."""
    options = ["--learning-rate", "1e-4", "--estimator", "first_order"]
    tables = []
    for weight in ("1", "1e-6"):
        code, output = influence(folder, tiny_llama, *options, "--example-weight", weight)
        assert code == 0, output
        assert "own gradient decides AdamW's denominator" in output
        tables.append(read_table(folder / "influence.parquet", INFLUENCE).to_pylist())
    for one, other in zip(*tables, strict=True):
        assert one["gradient_norm"] == other["gradient_norm"] > 0
        assert one["influence_student"] != other["influence_student"]
        assert one["dominated_share"] > 0.5


def test_options_have_the_words_of_a_configuration(tiny_llama: Path, folder: Path, tmp_path: Path) -> None:
    """A chat template and its variables; a subset of a data set folder."""
    own = (tiny_llama / "chat_template.jinja").read_text()
    (tmp_path / "mine.jinja").write_text("{{ mood }}" + own)
    calm = Path(shutil.copytree(tiny_llama, tmp_path / "calm"))
    (calm / "chat_template.jinja").write_text("calm" + own)
    for subset in ("train", "other"):
        (tmp_path / "set" / subset).mkdir(parents=True)
        shutil.copy(folder / "data.jsonl", tmp_path / "set" / subset / "rows.jsonl")
    names = [f"{{config_name: {name}, data_files: {name}/rows.jsonl}}" for name in ("train", "other")]
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs: [{', '.join(names)}]\n---\n")
    template = ["--chat-template", str(tmp_path / "mine.jinja"), "--chat-template-kwargs", "{mood: calm}"]
    examples = ["--examples", f"{{path: {tmp_path / 'set'}, subset: other, limit: 4}}"]
    shared = ["--learning-rate", "1e-4", "--estimator", "exact", *examples]
    tables = []
    for name, model, options in (("a", tiny_llama, template), ("b", calm, []), ("c", tiny_llama, [])):
        out = folder / f"{name}.parquet"
        code, output = influence(folder, model, *shared, *options, "--out", str(out))
        assert code == 0, output
        tables.append(read_table(out, INFLUENCE)["influence_student"].to_pylist())
    assert len(tables[0]) == 4
    assert tables[0] == tables[1] != tables[2]


@pytest.mark.parametrize("screen", ["first_order", pytest.param("linear", marks=pytest.mark.slow)])
def test_screened_table_names_exact_rows(screen: str, tiny_llama: Path, folder: Path) -> None:
    """Exact rows equal those of an exact run. First order passes the audit, so that some rows stay estimates; a linear step
    of a student without moments does not."""
    many = [
        {"instruction": f"Name {i} things.", "output": "thing " * (1 + i % 7) + str(i), "id": f"x{i}"}
        for i in range(60)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, many)))
    options = ["--learning-rate", "1e-4", "--audit-examples", "40", "--baseline", "median"]
    code, output = influence(folder, tiny_llama, *options, "--screen", screen)
    assert code == 0, output
    for text in (
        f"{screen.replace('_', ' ')} against exact",
        "40 to audit",
        "Spearman",
        "95 % interval",
        "baseline: median",
        "distribution",
    ):
        assert text in output
    rows = read_table(folder / "influence.parquet", INFLUENCE).to_pylist()
    exact = [row for row in rows if row["estimator"] == "exact"]
    failed = "linear failed the audit: every example was measured exactly" in output
    assert failed == (screen == "linear")
    assert len(exact) == 60 if failed else 40 <= len(exact) < 60
    assert {row["estimator"] for row in rows} <= {"exact", screen}
    assert sum(row["audited"] for row in rows) == 40
    code, output = influence(
        folder, tiny_llama, *options, "--estimator", "exact", "--out", str(folder / "exact.parquet")
    )
    assert code == 0, output
    oracle = {row["example_id"]: row for row in read_table(folder / "exact.parquet", INFLUENCE).to_pylist()}
    for row in exact:
        assert row["influence_student"] == oracle[row["example_id"]]["influence_student"]
    both = [(row["first_order_null_step"], row["influence_null_step"]) for row in exact]
    assert spearmanr(both).statistic > (0.7 if failed else 0.9)
    assert all(row["reference_tokens"] == 0 for row in rows if row["estimator"] == screen)


@pytest.mark.slow
def test_sequential_reports_savings_and_mixed_precision_runs(tiny_llama: Path, folder: Path) -> None:
    references = [{"instruction": f"Say {i}.", "output": "yes " * (1 + i % 5)} for i in range(40)]
    (folder / "reference.jsonl").write_text("\n".join(map(json.dumps, references)))
    options = ["--learning-rate", "1e-3", "--estimator", "exact", "--sequential", "0.2", "--dtype", "mixed"]
    code, output = call(*arguments(folder, tiny_llama, *options, "--device", "cpu"), cwd=folder)
    assert code == 0, output
    assert "reference tokens saved" in output


def test_unmeasurable_examples_are_listed(tiny_llama: Path, folder: Path) -> None:
    """If the prompt fills the context, the row is excluded and named; the others are measured."""
    long = {"id": "long-one", "instruction": "word " * 200, "output": "cut off"}
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [*EXAMPLES[:4], long])))
    code, output = influence(folder, tiny_llama, "--max-length", "64")
    assert code == 0, output
    assert "4 of 5" in output
    assert "left out: no response tokens" in output
    assert "long-one" in output
    (row,) = [r for r in read_table(folder / "influence.parquet", INFLUENCE).to_pylist() if r["status"] != "ok"]
    assert row["truncated"]
    assert row["influence_student"] is None
    exact = ("--estimator", "exact", "--out", str(folder / "exact.parquet"))
    code, output = influence(folder, tiny_llama, "--max-length", "64", *exact)
    assert code == 0, output
    assert "reference tokens saved" not in output  # only --sequential saves them


def test_cut_examples_are_shown_of_each_reference_set(tiny_llama: Path, folder: Path) -> None:
    long = {"instruction": "Count.", "output": "word " * 300}
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [*EXAMPLES[:4], long])))
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, [long, *EXAMPLES[:2], long])))
    short = ("--max-length", "150", "--estimator", "first_order")
    sets = ("--reference", str(folder / "long.jsonl"))
    code, output = influence(folder, tiny_llama, *short, *sets)
    assert code == 0, output
    words = " ".join(output.split())
    for cut in ("", " and of 2 reference examples"):
        assert f"the end of 1 of 5 examples{cut} is cut" in words
    store = ("--store", str(folder / "store"), "--out", str(folder / "stored.parquet"))
    (folder / "long.jsonl").replace(folder / "reference.jsonl")
    code, output = influence(folder, tiny_llama, *short, *store)
    assert code == 0, output
    assert "and of 2 reference examples is cut" in " ".join(output.split())


def test_student_with_renamed_weights_is_refused_before_jobs(tiny_llama: Path, folder: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, folder / "other"))
    weights = {f"module.{name}": tensor for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, output = influence(folder, other)
    assert code == 1
    assert "20 of 20 weights have names that DDP gives them" in " ".join(output.split())
    assert not (folder / "influence.parquet.parts").exists()


def test_foreign_tokenizer_and_moments_are_refused(tiny_llama: Path, folder: Path) -> None:
    other = folder / "other"
    shutil.copytree(tiny_llama, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000].contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, output = influence(folder, other)
    assert code == 1
    assert "the tokenizer has 4096 tokens, but the model has 1000" in " ".join(output.split())
    moments = cold_moments(load_model(str(tiny_llama), torch.float32))
    save_moments(Moments({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, moments.step + 1), folder)
    code, output = influence(folder, tiny_llama, "--warm-state", str(folder))
    assert code == 1
    assert "the AdamW moments belong to another model" in " ".join(output.split())


def test_step_uses_the_adamw_of_the_moments(tiny_llama: Path, folder: Path) -> None:
    weights = dict(load_model(str(tiny_llama), torch.float32).named_parameters())
    first, second = ({name: torch.full_like(weight, 1e-3) for name, weight in weights.items()} for _ in range(2))
    recipe = Optimization(beta1=0.5, beta2=0.9, epsilon=1e-3, weight_decay=0.1)
    save_moments(Moments(first, second, 3), folder, recipe)
    options = ("--warm-state", str(folder), "--estimator", "exact")
    code, output = influence(folder, tiny_llama, *options)
    assert code == 0, output
    description = read_record(folder / "influence.parquet.parts" / "exact" / "stage.json", Description)
    assert description is not None
    step = description.settings["step"]
    assert {name: step[name] for name in ("beta1", "beta2", "epsilon", "weight_decay")} == recipe.model_dump(
        include={"beta1", "beta2", "epsilon", "weight_decay"}
    )
    (folder / "influence.parquet.parts" / layout.DRIVER_LOCK).unlink()  # as advised where a file system has no locks
    code, output = influence(folder, tiny_llama, *options)
    assert code == 0, output


@pytest.mark.parametrize(("device", "visible", "gpus"), [("auto", "3", 1), ("auto", "", 0), ("cpu", "3", 0)])
def test_device_decides_gpus_of_jobs(device: str, visible: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    resources = local_cluster(device).resources
    assert resources.influence.gpus_per_node == resources.training.gpus_per_node == gpus


def test_second_measurement_of_a_table_is_refused(tiny_llama: Path, folder: Path) -> None:
    """It leaves the inputs of the first, which jobs read."""
    parts = folder / "influence.parquet.parts"
    parts.mkdir()
    (parts / "reference.jsonl").write_text("of the first")
    with only_driver(parts):
        code, output = influence(folder, tiny_llama)
    assert (code, "already has a driver" in output) == (1, True), output
    assert not (folder / "influence.parquet").exists()
    assert (parts / "reference.jsonl").read_text() == "of the first"
    assert [path.name for path in parts.iterdir() if path.name != "driver.lock"] == ["reference.jsonl"]


def test_other_files_are_not_overwritten(tiny_llama: Path, folder: Path) -> None:
    pool = folder / "influence.parquet"
    pq.write_table(pa.Table.from_pylist(EXAMPLES), pool)
    content = pool.read_bytes()
    code, output = influence(folder, tiny_llama, "--examples", str(pool))
    assert code == 1
    assert "exists, and is no influence table; nothing is overwritten" in " ".join(output.split())
    pool.write_bytes(b"no table")
    assert influence(folder, tiny_llama)[0] == 1
    assert pool.read_bytes() == b"no table" != content
    assert not (folder / "influence.parquet.parts").exists()
    reference = (folder / "reference.jsonl").read_bytes()
    for names in ((), (layout.DRIVER_LOCK, layout.CONFIG)):  # a user's folder, a run's
        for name in names:
            (folder / name).touch()
        code, output = invoke("validate", *arguments(folder, tiny_llama, "--out", str(folder))[1:], cwd=ROOT)
        assert code == 1
        assert "the folder holds something else; nothing is overwritten" in " ".join(output.split())
    assert (folder / "reference.jsonl").read_bytes() == reference


def test_bad_options_are_refused_in_one_sentence(tiny_llama: Path, folder: Path) -> None:
    (folder / "gpus.yaml").write_text("resources: {influence: {gpus_per_node: 99}}")
    for options, message in (
        (["--estimator", "magic"], "--estimator: Input should be 'exact', 'first_order', 'linear' or 'screened'"),
        (["--estimator", "linear", "--example-weight", "0.5"], "error: --estimator=linear with --example-weight=0.5: "),
        (
            ["--screen", "linear", "--example-weight", "0.5"],
            "error: --screen=linear with --example-weight=0.5: ",
        ),
        (["--screen", "exact"], "--screen: Input should be 'first_order' or 'linear'"),
        (["--warm-state", str(tiny_llama)], "no adamw.safetensors there"),
        (["--baseline", "zero"], "--baseline: Input should be 'student', 'null_step', 'median' or 'prompt'"),
        (["--baseline", "prompt"], "these examples have no prompts in common"),
        (["--device", "tpu"], "--device: 'tpu' is not one of auto, cpu, cuda, cuda:N"),
        (["--device", "cpu", "--cluster", "cluster.yaml"], "--cluster and --device: give one of them"),
        (["--cluster", "absent.yaml"], "absent.yaml"),
        (["--cluster", str(folder / "gpus.yaml")], "a job needs 99 GPUs, but this machine has"),
        (["--device", "cuda:x"], "--device: 'cuda:x' is not one of auto, cpu, cuda, cuda:N"),
        (["--sequential", "0.1"], "--sequential belongs to --estimator=exact"),
        (["--example-weight", "2"], "--example-weight: Input should be less than or equal to 1"),
        (["--audit-examples", "3"], "--audit-examples: Input should be greater than or equal to 40"),
        (["--reference", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--reference", "{path: builtin, limt: 3}"], "limt: unknown key; remove it or correct its spelling"),
        (["--chat-template", "absent.jinja"], "--chat-template: absent.jinja cannot be read"),
        (["--chat-template-kwargs", "{mood: calm}"], "the chat template has no variable 'mood'"),
    ):
        code, output = influence(folder, tiny_llama, *options)
        assert code == 1
        assert message in " ".join(output.split())
        assert "Traceback" not in output
        assert not (folder / "influence.parquet.parts").exists()

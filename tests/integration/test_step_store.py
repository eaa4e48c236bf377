"""`montessori influence --store`: steps are kept, and estimate influence on another reference set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from cluster.lock import only_driver
from montessori_core.config import Cluster
from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.models.load import load_model
from montessori_core.training.moments import Moments, save_moments
from support import ROOT
from support.runs import invoke
from tasks.resume import record_command

WORDS = ("round", "flat", "heavy", "green", "new")
EXAMPLES = [
    {"instruction": f"Describe object {i}.", "output": f"Object {i} is {WORDS[i % 5]} " + "and old " * (1 + i % 4)}
    for i in range(60)
]
EVERYTHING = ["--store-numbers", str(10**9)]


@pytest.fixture(scope="module")
def moments(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments as after some steps of training."""
    torch.manual_seed(0)
    weights = dict(load_model(str(tiny_llama), torch.float32).named_parameters())
    sizes = {name: 1e-3 * torch.rand_like(weight) for name, weight in weights.items()}
    first = {name: 0.3 * torch.randn_like(size) * size for name, size in sizes.items()}
    folder = tmp_path_factory.mktemp("moments")
    save_moments(Moments(first, {name: size**2 for name, size in sizes.items()}, 20), folder)
    return folder


class Measuring:
    """The command, with its files in a folder."""

    def __init__(self, folder: Path, student: Path, moments: Path) -> None:
        self.folder = folder
        self.write("data", EXAMPLES)
        self.write("one", EXAMPLES[:8])
        self.write("other", [{"instruction": f"Name {i}.", "output": f"thing {i} " * 3} for i in range(8)])
        self._student = ["--student", str(student), "--warm-state", str(moments), "--learning-rate", "1e-4"]

    def write(self, name: str, rows: list[dict[str, str]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def __call__(self, reference: str, *options: str, store: str = "store") -> tuple[int, str]:
        files = {"--examples": "data.jsonl", "--reference": f"{reference}.jsonl", "--out": f"{reference}.parquet"}
        files |= {"--store": store} if store else {}
        given = [text for option, name in files.items() for text in (option, str(self.folder / name))]
        code, output = invoke("influence", *self._student, *given, *options, cwd=ROOT)
        return code, " ".join(output.split())

    def influence(self, reference: str) -> np.ndarray:
        return read_table(self.folder / f"{reference}.parquet", INFLUENCE)["influence_student"].to_numpy()


@pytest.fixture
def measure(tmp_path: Path, tiny_llama: Path, moments: Path) -> Measuring:
    return Measuring(tmp_path, tiny_llama, moments)


def test_kept_steps_estimate_influence_on_any_reference_set(measure: Measuring) -> None:
    """With as many numbers as the student has parameters, the estimate is that of first order."""
    first_order = ["--estimator", "first_order"]
    written = []
    for reference in ("one", "other"):
        code, output = measure(reference, *first_order, store="")
        assert code == 0, output
        expected = measure.influence(reference)
        code, output = measure(reference, *first_order, *EVERYTHING, "--out", str(measure.folder / "kept.parquet"))
        assert code == 0, output
        kept = measure.influence("kept")
        assert np.abs(kept - expected).max() < 0.01 * expected.std()
        written.append({part: part.stat().st_mtime_ns for part in (measure.folder / "store").glob("part-*")})
    assert written[0] == written[1]  # the second command read the steps of the first
    rows = read_table(measure.folder / "kept.parquet", INFLUENCE).to_pylist()
    assert {row["estimator"] for row in rows} == {"stored_steps"}
    assert all(row["standard_error"] > 0 and row["gradient_norm"] > 0 for row in rows)
    assert np.corrcoef(measure.influence("one"), measure.influence("other"))[0, 1] < 0.9  # two sets ask two questions


def test_audit_says_how_good_kept_steps_are(measure: Measuring) -> None:
    code, output = measure("one", "--audit-examples", "40", "--baseline", "median", "--store-numbers", "4096")
    assert code == 0, output
    for text in ("stored steps against exact", "40 to audit", "Spearman"):
        assert text in output
    rows = read_table(measure.folder / "one.parquet", INFLUENCE).to_pylist()
    both = [(row["first_order_null_step"], row["influence_null_step"]) for row in rows if row["estimator"] == "exact"]
    assert len(both) >= 40
    assert spearmanr(both).statistic > 0.5


def test_store_of_something_else_is_refused(measure: Measuring, tiny_llama: Path) -> None:
    """Nothing in it changes, and the table of the last command is kept."""
    options = ["--estimator", "first_order", "--store-numbers", "256"]
    assert measure("one", *options)[0] == 0
    files = [measure.folder / "one.parquet", *(measure.folder / "store").glob("*.*")]
    content = {path: path.read_bytes() for path in files}
    for other, difference in (
        (["--learning-rate", "1e-3"], "the steps of learning_rate 0.0001, not 0.001; give another folder"),
        (["--example-weight", "0.5"], "example_weight 0.03125, not 0.5"),
        (["--store-numbers", "512"], "numbers 256, not 512"),
        (["--warm-state", str(measure.folder)], "another moments"),
    ):
        if "--warm-state" in other:
            save_moments(Moments({}, {}, 3), measure.folder)
        code, output = measure("one", *options, *other)
        assert (code, difference in output) == (1, True), output
    measure.write("data", EXAMPLES[:-1])
    code, output = measure("one", *options)
    assert (code, "the steps of other examples; give another folder" in output) == (1, True), output
    assert {path: path.read_bytes() for path in content} == content
    code, output = measure("one", *options, store=".")
    assert (code, "the folder holds something else" in output) == (1, True), output


def test_interrupted_start_leaves_a_store_that_continues(measure: Measuring) -> None:
    """A run, a study and other work have a lock, too: they are no store."""
    store = measure.folder / "store"
    store.mkdir()
    with only_driver(store):
        pass
    assert [path.name for path in store.iterdir()] == ["driver.lock"]
    for other in ("config.yaml", "study.yaml", "command.json"):
        if other == "command.json":
            record_command(store, ["train"], "model", store / "result", Cluster())
        else:
            (store / other).touch()
        code, output = measure("one", "--estimator", "first_order", "--store-numbers", "256")
        assert (code, "the folder holds something else" in output) == (1, True), output
        (store / other).unlink()
    code, output = measure("one", "--estimator", "first_order", "--store-numbers", "256")
    assert code == 0, output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--screen", "linear"], "--store keeps AdamW's own steps, which --screen linear does not take"),
        (["--estimator", "exact"], "--store keeps AdamW's own steps, which --estimator exact does not take"),
        (["--weight-per", "token"], "use --weight-per example"),
        (["--store-numbers", "3"], "--store-numbers"),
    ],
)
def test_store_refuses_what_it_cannot_keep(measure: Measuring, options: list[str], message: str) -> None:
    code, output = measure("one", *options)
    assert code != 0
    assert message in output
    assert not (measure.folder / "store").exists()

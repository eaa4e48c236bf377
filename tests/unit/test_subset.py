"""Training sets chosen from a probing set: select, random, length_matched; and seeds from the reference set."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.methods import random_draw, subset
from flows.methods.length_matched import match_lengths
from flows.methods.method import Round
from flows.methods.select import most_influential
from flows.methods.tailoring import ProbingSet
from flows.study import open_study
from montessori_core.config import Study, parse_experiment
from montessori_core.data.tables import EXAMPLES, INFLUENCE, read_table, table_from_rows, write_table
from montessori_core.errors import UserError
from tasks import synthesis
from tasks.run import Model, Run
from tasks.stage import Step
from tasks.synthesis import SynthesisResult


def measured(lengths: list[int], influences: list[float] | None = None, status: str = "ok") -> pa.Table:
    """Return an influence table with an example for each number of response tokens."""
    values: list[float] = influences or [0.0] * len(lengths)
    return table_from_rows(
        [
            {"example_id": f"e{n}", "prompt_id": "p", "status": status, "tokens": 50, "response_tokens": length}
            | {"truncated": False, "reference_tokens": 9, "estimator": "exact", "audited": False}
            | {"influence_student": value if status == "ok" else None}
            for n, (length, value) in enumerate(zip(lengths, values, strict=True))
        ],
        INFLUENCE,
    )


def test_select_takes_highest_influence() -> None:
    table = measured([1] * 5, [-0.1, 0.3, 0.2, 0.3, -0.5])
    assert most_influential(table, 3) == ["e1", "e3", "e2"]


def test_random_draw_depends_only_on_seed() -> None:
    ids = [f"e{n}" for n in range(50)]
    drawn = random_draw.draw(ids, 20, seed=1)
    assert drawn == random_draw.draw(ids, 20, seed=1) != random_draw.draw(ids, 20, seed=2)
    assert len(set(drawn)) == 20
    assert set(drawn) < set(ids)


def test_matched_examples_have_the_selected_lengths() -> None:
    table = measured([100, 20, 60, 98, 21, 63, 5, 300])
    matched = match_lengths(table, ["e0", "e1", "e2"], seed=0)
    assert matched == ["e3", "e5", "e4"]
    shared = measured([30] * 40)
    draws = {tuple(match_lengths(shared, ["e0", "e1"], seed)) for seed in range(5)}
    assert len(draws) > 1  # equally near ones are drawn


@given(st.data())
def test_matched_examples_differ_from_selected_ones(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=2, max_size=40))
    count = data.draw(st.integers(1, len(lengths) - 1))
    selected = [f"e{n}" for n in data.draw(st.permutations(range(len(lengths))))[:count]]
    matched = match_lengths(measured(lengths), selected, seed=data.draw(st.integers(0, 99)))
    assert len(set(matched)) == count
    # Every other example is taken before a selected one.
    assert len(set(matched) & set(selected)) == max(0, 2 * count - len(lengths))


def examples(folder: Path, count: int) -> Path:
    """Write an example table."""
    text = dict.fromkeys(("prompt_id", "prompt", "raw_output", "instruction", "response"), "x")
    rows: list[dict[str, object]] = [{"example_id": f"e{n}", "response_finished": True, **text} for n in range(count)]
    write_table(table_from_rows(rows, EXAMPLES), folder / "probing.parquet", EXAMPLES)
    return folder / "probing.parquet"


def round_of(folder: Path, monkeypatch: pytest.MonkeyPatch, training: int) -> Round:
    """Return the round of a method whose probing set is `probing.parquet` in a folder."""
    monkeypatch.setattr(Run, "initial_teacher", lambda _: Model("t", "0"))
    monkeypatch.setattr(subset, "write_examples", synthesis.write_examples.fn)
    content = {"teacher": {"model": "t"}, "student": {"model": "s"}, "training": {"examples": training}}
    content |= {"warmup": {"examples": 2}, "influence": {"probing_examples": 8}}
    return Round(Step(Run(folder, parse_experiment(content, "test")), folder / "method", "method"), 1, 1, None)


def test_random_proposes_shuffled_probing_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = SynthesisResult(tmp_path, examples(tmp_path, 10))
    monkeypatch.setattr(random_draw, "write_probing_set", lambda *_: written)
    monkeypatch.setattr(subset, "measure", lambda *_: pytest.fail("influence was measured"))
    now = round_of(tmp_path, monkeypatch, training=7)
    names = read_table(random_draw.RANDOM.propose(now).examples, EXAMPLES)["example_id"].to_pylist()
    assert len(set(names)) == 7
    assert set(names) < {f"e{n}" for n in range(2, 10)}  # the first two are of the warm-up
    assert names != sorted(names)


def test_unmeasured_examples_are_never_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = ProbingSet(SynthesisResult(tmp_path, examples(tmp_path, 8)), Model("s", "0"), 0, 8)
    table = pa.concat_tables([measured([5, 5, 5], [0.1, 0.2, 0.3]), measured([0] * 5, status="no_response_tokens")])
    write_table(table.combine_chunks(), tmp_path / "influence.parquet", INFLUENCE)
    monkeypatch.setattr(subset, "probe", lambda *_: probed)
    monkeypatch.setattr(subset, "measure", lambda *_: tmp_path / "influence.parquet")
    path, rows = subset.measure_candidates(round_of(tmp_path, monkeypatch, training=3))
    assert (path, rows["example_id"].to_pylist()) == (probed.synthesized.examples, ["e0", "e1", "e2"])
    with pytest.raises(UserError, match="method: 3 of 8 probing examples have an influence, but students train on 4"):
        subset.measure_candidates(round_of(tmp_path, monkeypatch, training=4))


@pytest.mark.parametrize("method", ["select", "random", "length_matched"])
def test_choice_from_few_examples_is_refused(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    refusal = "influence.probing_examples: 30 leaves no choice.*raise it to 300, 10 times training.examples"
    sizes = {"training": {"examples": 30}, "influence": {"probing_examples": 30}}
    with pytest.raises(UserError, match=refusal):
        open_study(study(tiny_llama, method, **sizes), tmp_path / "refused")
    open_study(study(tiny_llama, method, **sizes | {"training": {"examples": 28}}), tmp_path / "fits")


def test_target_without_enough_demonstrations_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"reference": {"path": "builtin", "limit": 7}}
    with pytest.raises(
        UserError, match="target_seeds: reference: 7 tasks to show, but a prompt of the first iteration takes 8"
    ):
        open_study(study(tiny_llama, "target_seeds", **few), tmp_path / "refused")
    open_study(study(tiny_llama, "target_seeds", **few, synthesis={"seed_demonstrations": 5}), tmp_path / "fits")


def study(model: Path, method: str, **sections: Any) -> Study:
    """Return a study of one method."""
    experiment = {"teacher": {"model": str(model)}, "student": {"model": str(model)}, **sections}
    return Study.model_validate({"experiment": experiment, "methods": [method], "baseline": method, "seeds": [0]})

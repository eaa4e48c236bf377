"""`montessori select` for several targets, which take turns."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv

from montessori_core.config import DataSource
from montessori_core.data.tables import INFLUENCE, read_table, write_table
from montessori_core.errors import DataError
from montessori_core.selection.choose import Choice, choose
from montessori_core.selection.pools import FilesPool
from montessori_core.selection.targets import open_pools
from support.pools import ListPool
from support.reports import write_run
from support.runs import invoke

TWO_SCORES = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), st.integers(0, 9)), st.sampled_from("xy")))


@given(TWO_SCORES, st.integers(1, 40), st.booleans(), st.booleans())
def test_targets_take_turns(
    rows: list[tuple[int, int | None, str]], limit: int, by_tokens: bool, with_sources: bool
) -> None:
    """The best row of each is chosen that no other has chosen, until the rows or the tokens are used up."""
    pool = ListPool([{"a": a, "b": b, "source": source, "response_tokens": 1 + a} for a, b, source in rows])
    queues = []
    for source in "xy" if with_sources else [None]:
        for target in (0, 1):
            mine = [i for i, row in enumerate(rows) if row[target] is not None and source in (None, row[2])]
            queues.append(sorted(mine, key=lambda i: -(rows[i][target] or 0)))
    expected: list[int] = []
    while any(queues):
        for place, queue in enumerate(queues):
            queues[place] = [i for i in queue if i not in expected]
            expected += queues[place][:1]
    used, kept = 0, []
    for i in expected:
        used += 1 + rows[i][0] if by_tokens else 1
        if used > limit:
            break
        kept.append(i)
    choice = Choice(("a", "b"), **{"tokens" if by_tokens else "rows": limit}, per="source" if with_sources else None)
    assert choose(pool, choice) == kept


def test_controls_of_targets_are_different_rows() -> None:
    scores = [{"a": i, "b": (i * 7) % 50, "response_tokens": 1 + i % 5} for i in range(50)]
    pool, choice = ListPool([*scores, {"a": None, "b": None, "response_tokens": 1}]), Choice(("a", "b"), rows=20)
    best = choose(pool, choice)
    for control in ("random", "length_matched"):
        chosen = choose(pool, choice, control, 1)
        assert len(set(chosen)) == 20
        assert set(chosen) != set(best)
        assert 50 not in chosen
    assert not set(choose(pool, choice, "length_matched")) & set(best)


def test_command_selects_for_several_targets(tmp_path: Path) -> None:
    scores = [(9, 1, 0), (8, 9, None), (7, 8, float("nan")), (1, 7, 5)]
    rows = [{"text": str(i), "code": a, "maths": b, "facts": c} for i, (a, b, c) in enumerate(scores)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    targets = ("--by", "code", "--by", "maths", "--by", "facts")
    code, output = invoke("select", "pool.jsonl", "--k", "3", *targets, "--output", "best.jsonl", cwd=tmp_path)
    assert code == 0, output
    best = {row["text"]: row["rank"] for row in FilesPool(tmp_path / "best.jsonl").rows()}
    assert best == {"0": 1, "1": 2, "3": 3}
    assert "3 of 4 scored rows, code 1 to 9, maths 1 to 9, facts 0 to 5" in " ".join(output.split())
    for options, message in (
        (("--by", "code", "--by", "code"), "--by code: given twice"),
        (("--by", "code", "--by", "art"), "no column 'art' (found: text, code, maths, facts)"),
    ):
        code, output = invoke("select", "pool.jsonl", "--k", "3", *options, "--output", "other.jsonl", cwd=tmp_path)
        assert code == 1
        assert message in " ".join(output.split())


def test_source_of_near_duplicates_keeps_its_turn() -> None:
    """Another source has enough rows; the first has to look further for one that is unlike those chosen."""
    words = ["apple", "river", "night", "stone", "cloud", "lemon", "candle", "window"]
    other = [{"instruction": " ".join(f"{word}{n}" for n in range(6)), "source": "b"} for word in words]
    alike = [{"instruction": f"count the birds in tree number {n}", "source": "a"} for n in range(40)]
    rows = [*alike, {"instruction": "sort a list of words by length", "source": "a"}, *other]
    pool = ListPool([row | {"s": -i} for i, row in enumerate(rows)])
    assert choose(pool, Choice(("s",), rows=4, per="source", max_rouge_l=0.6)) == [0, 41, 40, 42]


def write_targets(folder: Path) -> list[str]:
    """Write influence tables coding.parquet and maths.parquet and their examples pool.jsonl; return the examples' ids."""
    table = read_table(write_run(folder / "run") / "iteration-1" / "influence.parquet", INFLUENCE)
    ids = table["example_id"].to_pylist()
    for name, scores in (("coding", range(40)), ("maths", [n * 7 % 40 if n != 17 else None for n in range(40)])):
        column = table.schema.get_field_index("influence_student")
        scored = table.set_column(column, INFLUENCE.field(column), [[n and float(n) for n in scores]])
        write_table(scored, folder / f"{name}.parquet", INFLUENCE)
    examples = [
        {"id": id, "instruction": f"Do {id}.", "output": "Done.", "source": "ab"[n % 2]} for n, id in enumerate(ids)
    ]
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return ids


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_influence_tables_are_targets(suffix: str, tmp_path: Path) -> None:
    ids = write_targets(tmp_path)
    select = ("select", "coding.parquet", "maths.parquet", "--examples", "pool.jsonl", "--k", "4", "--output")
    code, output = invoke(*select, f"best{suffix}", cwd=tmp_path)
    assert code == 0, output
    rows = sorted(FilesPool(tmp_path / f"best{suffix}").rows(), key=lambda row: row["rank"])
    maths = sorted(set(range(40)) - {17}, key=lambda n: -(n * 7 % 40))
    assert [row["id"] for row in rows] == [ids[n] for n in (39, maths[0], 38, maths[1])]
    assert [row["influence_maths"] for row in rows[1::2]] == [38, 37]
    assert [row["influence_coding"] for row in rows[::2]] == [39, 38]
    assert rows[0]["instruction"] == f"Do {ids[39]}."
    assert not {"influence", "influence_null_step", "standard_error"} & rows[0].keys()
    assert "influence_coding" in output
    code, output = invoke(*select, f"one{suffix}", "--by", "influence_maths", "--per", "source", cwd=tmp_path)
    assert code == 0, output
    rows = sorted(FilesPool(tmp_path / f"one{suffix}").rows(), key=lambda row: row["rank"])
    assert [row["source"] for row in rows] == ["a", "b", "a", "b"]
    assert [row["influence_maths"] for row in rows] == [38, 37, 36, 35]


def test_remedy_for_lost_metadata_is_the_table(tmp_path: Path) -> None:
    """Without metadata nothing says which examples were measured; a glob of tables reads their rows alone."""
    write_targets(tmp_path)
    table = read_table(tmp_path / "maths.parquet", INFLUENCE)
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "pandas.parquet")
    csv.write_csv(table, tmp_path / "maths.csv")
    (tmp_path / "tables").mkdir()
    for name in ("coding", "maths"):
        shutil.copy(tmp_path / f"{name}.parquet", tmp_path / "tables")
    options = ("--k", "4", "--examples", "pool.jsonl", "--output", "best.jsonl")
    message = "the columns of an influence table, but is not one as montessori influence wrote it; give that file"
    for pools in (
        ["pandas.parquet"],
        ["maths.csv"],
        ["tables"],
        ["tables/*.parquet"],
        ["coding.parquet", "pandas.parquet"],
    ):
        for form in ([], ["--to", "messages"]):
            code, output = invoke("select", *pools, *options, *form, cwd=tmp_path)
            assert (code, f"{pools[-1]}: has {message}" in " ".join(output.split())) == (1, True), output
    code, output = invoke("select", "tables/coding.parquet", "tables/maths.parquet", *options, cwd=tmp_path)
    assert code == 0, output


def test_tables_of_other_examples_are_refused(tmp_path: Path) -> None:
    ids = write_targets(tmp_path)
    table = read_table(tmp_path / "maths.parquet", INFLUENCE)
    (tmp_path / "other").mkdir()
    write_table(table, tmp_path / "other" / "coding.parquet", INFLUENCE)
    write_table(table.slice(0, 39), tmp_path / "short.parquet", INFLUENCE)
    write_table(table.take([1, 0, *range(2, 40)]), tmp_path / "moved.parquet", INFLUENCE)
    source = DataSource(path=str(tmp_path / "pool.jsonl"))
    for name, message in (
        ("other/coding.parquet", "several tables have the same file name"),
        ("short.parquet", rf"short.parquet, row 40: example '\(none\)', but .*coding.parquet has '{ids[39]}' there"),
        ("moved.parquet", f"moved.parquet, row 1: example '{ids[1]}'"),
        ("pool.jsonl", "no table of montessori influence"),
    ):
        with pytest.raises(DataError, match=message):
            open_pools([tmp_path / "coding.parquet", tmp_path / name], source)
    pool, targets = open_pools([tmp_path / "coding.parquet", tmp_path / "maths.parquet"], source)
    assert targets == ["influence_coding", "influence_maths"]
    with pytest.raises(DataError, match="no column 'influence' "):
        choose(pool, Choice(("influence",), rows=1))

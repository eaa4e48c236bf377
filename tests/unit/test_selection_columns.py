"""Columns of the pools of `montessori select`."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.errors import DataError
from montessori_core.selection.choose import Choice, choose, scored_positions
from montessori_core.selection.columns import schema_of_rows
from montessori_core.selection.pools import FilesPool, ParquetPool, open_pool
from support.pools import ListPool
from support.reports import write_run
from support.runs import invoke


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_of_examples_are_passed_on(suffix: str, tmp_path: Path) -> None:
    """Those that hold no texts, in any order of the examples; sources take turns by them."""
    table = write_run(tmp_path / "run") / "iteration-1" / "influence.parquet"
    ids = read_table(table, INFLUENCE)["example_id"].to_pylist()
    examples = [
        {
            "id": id,
            "question": f"Do {id}.",
            "output": "Done.",
            "source": "ab"[n < 3],
            "n": n,
            "tokens": -1,
            "input": "x",
        }
        | ({"licence": {"name": "mit"}} if n % 2 else {})
        for n, id in enumerate(ids)
    ]
    for order, data in (("same", examples), ("reversed", examples[::-1])):
        (tmp_path / f"pool-{order}.jsonl").write_text("\n".join(map(json.dumps, data)))
        source = f"{{path: pool-{order}.jsonl, instruction_field: question, input_field: none}}"
        options = ["--examples", source, "--k", "6", "--per", "source", "--output", f"{order}{suffix}"]
        code, output = invoke("select", str(table), *options, cwd=tmp_path)
        assert code == 0, output
        rows = list((FilesPool if suffix == ".jsonl" else ParquetPool)(tmp_path / f"{order}{suffix}").rows())
        assert Counter(row["source"] for row in rows) == {"a": 3, "b": 3}
        for row in rows:
            given = examples[row["n"]]
            assert (row["id"], row["instruction"], row["source"]) == (given["id"], given["question"], given["source"])
            assert row["licence"] == given.get("licence")
            assert row["tokens"] > 0
            assert not {"question", "input"} & row.keys()
    assert (tmp_path / f"same{suffix}").read_bytes() == (tmp_path / f"reversed{suffix}").read_bytes()


def test_schema_of_rows_holds_their_values() -> None:
    rows: list[dict[str, Any]] = [
        {"a": n, "b": str(n), "c": None, "d": n, "e": {"x": 1}, "f": [{}]} for n in range(1500)
    ]
    rows += [{"a": 0.5, "c": [1], "d": "text"}, {"e": {"y": "z"}}]
    schema = schema_of_rows(iter(rows))
    expected = {"a": pa.float64(), "b": pa.string(), "c": pa.list_(pa.int64())}
    assert {name: schema.field(name).type for name in expected} == expected
    assert set(schema.names) == {"a", "b", "c", "e"}  # no type holds the others, or Parquet has none
    table = pa.Table.from_pylist(rows, schema)
    assert table.column("e")[-1].as_py() == {"x": None, "y": "z"}


def test_pool_is_any_data_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": f"Do {n}.", "output": str(n), "s": n / 4, "t": n + 1} for n in range(8)
    ]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.csv").write_text(
        "instruction,output,s,t\n" + "".join(f"Do {n}.,{n},{n / 4},{n + 1}\n" for n in range(8))
    )
    (tmp_path / "shards").mkdir()
    for part in range(2):
        (tmp_path / "shards" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows[4 * part : 4 * part + 4])))
    for number, pool in enumerate(("a.json", "a.jsonl.gz", "a.csv", "shards", "shards/*.jsonl")):
        for options, chosen in (
            (["--k", "2"], {"6", "7"}),
            (["--tokens", "21", "--token-column", "t"], {"5", "6", "7"}),
        ):
            out = f"{number}-{len(chosen)}.jsonl"
            code, output = invoke("select", pool, "--by", "s", *options, "--output", out, cwd=tmp_path)
            assert code == 0, output
            assert {row["output"] for row in FilesPool(tmp_path / out).rows()} == chosen
            assert ", s 1." in output


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_row_without_score_key_is_never_chosen(tmp_path: Path) -> None:
    """As a row whose score is null. A column that no row has is refused."""
    rows = [{"text": str(n), "a": n, "b": -n, "source": "x"} for n in range(5)]
    del rows[4]["a"], rows[0]["b"]
    pool = FilesPool(write_rows(tmp_path / "pool.jsonl", rows))
    assert scored_positions(pool, ["a"]).tolist() == [0, 1, 2, 3]
    assert choose(pool, Choice(("a",), rows=2)) == [3, 2]
    select = ("select", "pool.jsonl", "--by", "a", "--by", "b", "--share", "1")
    code, output = invoke(*select, "--output", "best.jsonl", cwd=tmp_path)
    assert code == 0, output
    assert "5 of 5 scored rows, a 0 to 3, b -4 to -1" in output
    assert [row | {"rank": None} for row in FilesPool(tmp_path / "best.jsonl").rows()] == [
        row | {"rank": None} for row in rows
    ]
    for options, absent in ((("--by", "c"), "c"), (("--per", "d"), "d"), (("--max-rouge-l", "0.5"), "instruction")):
        code, output = invoke(*select, *options, "--output", "other.jsonl", cwd=tmp_path)
        assert code == 1
        assert f"pool.jsonl: no column '{absent}' (found: text, a, source, b)" in " ".join(output.split())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tokens_may_be_whole_floats(suffix: str, tmp_path: Path) -> None:
    """As pandas writes a column of integers that once had a null."""
    rows = [{"s": -n, "response_tokens": float(n + 1)} for n in range(4)]
    if suffix == ".csv":
        lines = [f"{row['s']},{row['response_tokens']}" for row in rows]
        (tmp_path / "pool.csv").write_text("\n".join(["s,response_tokens", *lines]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    pool = open_pool(tmp_path / f"pool{suffix}")
    assert choose(pool, Choice(("s",), tokens=6)) == [0, 1, 2]
    for value in (1.5, 0.0, float("nan"), float("inf"), None, "two"):
        with pytest.raises(DataError, match="is no number of tokens"):
            choose(ListPool([{"s": 1, "response_tokens": value}]), Choice(("s",), tokens=6))


def test_command_warns_of_replaced_columns(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Do {n}.", "s": n, "rank": "mine", "cluster": "mine"} for n in range(3)]
    write_rows(tmp_path / "pool.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    for pool in ("pool.jsonl", "pool.parquet"):
        select = ("select", pool, "--k", "1", "--by", "s", "--output")
        code, output = invoke(*select, f"{pool}.best.jsonl", cwd=tmp_path)
        assert code == 0, output
        assert output.count("warning") == 1
        assert "warning: the pool's column 'rank' is replaced" in output
        assert list(FilesPool(tmp_path / f"{pool}.best.jsonl").rows()) == [rows[2] | {"rank": 1}]
    code, output = invoke(*select, "c.jsonl", "--embedding-model", str(tiny_llama), "--clusters", "2", cwd=tmp_path)
    assert code == 0, output
    assert "warning: the pool's column 'cluster' is replaced" in output


def test_compared_rows_need_a_text(tmp_path: Path) -> None:
    pool = FilesPool(write_rows(tmp_path / "pool.jsonl", [{"instruction": "Add.", "s": 2}, {"s": 1}]))
    with pytest.raises(DataError, match=r"pool.jsonl, row 2: no 'instruction'"):
        choose(pool, Choice(("s",), rows=2, max_rouge_l=0.5))


def test_parquet_output_has_columns_of_later_rows(tmp_path: Path) -> None:
    """Also a column that the first chosen row lacks."""
    rows = [{"text": "a", "s": 2}, {"text": "b", "s": 1, "licence": "mit"}]
    write_rows(tmp_path / "pool.jsonl", rows)
    code, output = invoke("select", "pool.jsonl", "--k", "2", "--by", "s", "--output", "best.parquet", cwd=tmp_path)
    assert code == 0, output
    chosen = list(ParquetPool(tmp_path / "best.parquet").rows())
    assert chosen == [rows[0] | {"licence": None, "rank": 1}, rows[1] | {"rank": 2}]

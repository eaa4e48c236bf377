"""`montessori select`: the best rows, turns, near-duplicates."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import DataSource
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.sources import read_tasks
from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.errors import DataError
from montessori_core.selection import choose as choosing
from montessori_core.selection.choose import Choice, choose, scored_positions
from montessori_core.selection.embeddings import CLUSTER, Vectors, cluster_pool
from montessori_core.selection.pools import FilesPool, ParquetPool, open_pool
from montessori_core.selection.texts import texts_of
from support.pools import ListPool
from support.reports import write_run
from support.rouge import accept_all
from support.runs import invoke

NO_SCORES = [None, float("nan"), float("inf"), -float("inf")]
SCORES = st.lists(st.one_of(st.sampled_from(NO_SCORES), st.integers(-3, 3)), min_size=1, max_size=30)


@given(SCORES, st.integers(1, 12))
def test_best_rows_are_those_of_a_stable_sort(scores: list[float | None], count: int) -> None:
    pool = ListPool([{"s": score} for score in scores])
    valid = [i for i, score in enumerate(scores) if score is not None and math.isfinite(score)]
    assert scored_positions(pool, ["s"]).tolist() == valid
    assert choose(pool, Choice(("s",), rows=count)) == sorted(valid, key=lambda i: -(scores[i] or 0))[:count]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=25), st.integers(1, 40))
def test_token_budget_ends_at_first_exceeding_row(rows: list[tuple[int, int]], budget: int) -> None:
    pool = ListPool([{"s": score, "response_tokens": tokens} for score, tokens in rows])
    expected, used = [], 0
    for i in sorted(range(len(rows)), key=lambda i: -rows[i][0]):
        used += rows[i][1]
        if used > budget:
            break
        expected.append(i)
    assert choose(pool, Choice(("s",), tokens=budget)) == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), max_size=25), st.integers(1, 12))
def test_sources_take_turns(rows: list[tuple[int, str]], count: int) -> None:
    pool = ListPool([{"s": score, "source": source} for score, source in rows])
    queues = [sorted((i for i, row in enumerate(rows) if row[1] == name), key=lambda i: -rows[i][0]) for name in "abc"]
    expected: list[int] = []
    while any(queues):
        expected += [queue.pop(0) for queue in queues if queue]
    assert choose(pool, Choice(("s",), rows=count, per="source")) == expected[:count]


@pytest.mark.parametrize("per", [None, "source"])
def test_near_duplicates_are_skipped(per: str | None) -> None:
    """Also if all candidates of the first pass are alike."""
    draw = random.Random(0)
    alike = [f"count the birds in tree number {draw.randint(0, 9)}" for _ in range(60)]
    words = ["apple", "river", "night", "stone", "cloud", "lemon"]
    others = [" ".join([word, *(f"{word}{n}" for n in range(5))]) for word in words]
    pool = ListPool([{"s": -i, "instruction": text, "source": "ab"[i % 2]} for i, text in enumerate([*alike, *others])])
    chosen = choose(pool, Choice(("s",), rows=4, per=per, max_rouge_l=0.6))
    assert chosen[0] == 0
    assert len(chosen) == 4
    assert set(chosen[1:]) <= set(range(60, 66))
    assert pool.passes > 2
    greedy = RougeIndex([], max_rouge_l=0.6)
    everything = choose(pool, Choice(("s",), rows=50, max_rouge_l=0.6))
    assert everything == [i for i, row in enumerate(pool.rows()) if accept_all(greedy, [row["instruction"]])[0]]


def embed_words(texts: list[str]) -> np.ndarray:
    """Embed texts by the letters of their first word."""
    counts = np.array([[text.split()[0].count(letter) for letter in "abcdefgh"] for text in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


WORDS = st.text("abcdefgh", min_size=1, max_size=4)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=40), st.integers(1, 6), st.booleans())
def test_rows_alike_in_meaning_or_words_are_skipped(texts: list[tuple[str, str]], count: int, both: bool) -> None:
    """As if each row were compared with all rows before it. A row that one rule rejects counts for no other."""
    pool = ListPool([{"s": -place, "instruction": " ".join(words)} for place, words in enumerate(texts)])
    with TemporaryFile() as file:
        vectors = Vectors(pool, file, embed_words, batch=3)
        choice = Choice(("s",), rows=count, max_rouge_l=0.4 if both else None, max_similarity=0.8)
        chosen = choose(pool, choice, vectors=vectors)
    embeddings = embed_words([" ".join(words) for words in texts])
    expected: list[int] = []
    for place, words in enumerate(texts):
        near = bool(expected) and (embeddings[expected] @ embeddings[place]).max() > 0.8
        written = RougeIndex([" ".join(texts[other]) for other in expected], max_rouge_l=0.4)
        if not near and not (both and written.nearest(" ".join(words)) is not None):
            expected.append(place)
    assert chosen == expected[:count]


def test_slack_is_for_near_duplicates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    class Heap(choosing._Heap):
        def __init__(self, limit: int) -> None:
            limits.append(limit)
            super().__init__(limit)

    monkeypatch.setattr(choosing, "_Heap", Heap)
    pool = ListPool([{"s": place, "instruction": "abc"[place]} for place in range(3)])
    with TemporaryFile() as file:
        vectors = Vectors(pool, file, embed_words)
        for similarity in (None, 0.8):
            choose(pool, Choice(("s",), rows=2, max_similarity=similarity), vectors=vectors)
    assert limits == [2, 8]


def test_clusters_are_those_of_meaning_and_take_turns() -> None:
    draw = random.Random(0)
    words = ["aab", "ccd", "eef"]
    kinds = [draw.randrange(3) for _ in range(300)]
    rows = [{"s": -place, "instruction": f"{words[kind]} {place}"} for place, kind in enumerate(kinds)]
    pool = ListPool([*rows, {"s": None, "instruction": "hh"}])
    with TemporaryFile() as file:
        clustered = cluster_pool(pool, Vectors(pool, file, embed_words), scored_positions(pool, ["s"]), 3)
    clusters = [row[CLUSTER] for row in clustered.rows()]
    assert clusters[-1] is None
    assert len(set(zip(kinds, clusters, strict=False))) == 3
    chosen = choose(clustered, Choice(("s",), rows=9, per=CLUSTER))
    assert Counter(kinds[place] for place in chosen) == {0: 3, 1: 3, 2: 3}
    taken = {place: row[CLUSTER] for place, row in clustered.take(set(chosen))}
    assert taken == {place: clusters[place] for place in chosen}


def test_command_groups_and_compares_by_embeddings(tiny_llama: Path, tmp_path: Path) -> None:
    texts = ["Add two numbers.", "Add two numbers.", "Name a river.", "Name a river in Peru.", "Sort a list of words."]
    rows = [{"instruction": text, "influence": -place} for place, text in enumerate(texts)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = ("--embedding-model", str(tiny_llama))
    select = ("select", "pool.jsonl", "--k", "4", "--output")
    code, output = invoke(*select, "best.jsonl", *model, "--max-similarity", "0.9999", "--clusters", "2", cwd=tmp_path)
    assert code == 0, output
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert sorted(row["influence"] for row in best) == [-4, -3, -2, 0]
    assert {row["cluster"] for row in best} == {0, 1}
    for options, message in (
        (("--clusters", "2"), "give --embedding-model with them"),
        (model, "give --embedding-model with them, and only then"),
        ((*model, "--clusters", "2", "--per", "influence"), "give one of --per and --clusters"),
    ):
        code, output = invoke(*select, "other.jsonl", *options, cwd=tmp_path)
        assert code == 1
        assert message in " ".join(output.split())


ROWS = [{"text": f"row {i}", "score": (i * 7) % 10, "source": "ab"[i % 2], "n": None} for i in range(10)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_command_writes_all_columns_and_ranks(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pool.parquet")
    for pool in ("pool.jsonl", "pool.parquet"):
        out = tmp_path / f"from-{pool}{suffix}"
        code, output = invoke("select", pool, "--share", "0.3", "--by", "score", "--output", out.name, cwd=tmp_path)
        assert code == 0, output
        assert "3 of 10 scored rows, score 7 to 9" in output
        rows = list((ParquetPool if suffix == ".parquet" else FilesPool)(out).rows())
        assert rows == [ROWS[1] | {"rank": 3}, ROWS[4] | {"rank": 2}, ROWS[7] | {"rank": 1}]
        code, output = invoke("select", pool, "--k", "1", "--by", "score", "--output", out.name, cwd=tmp_path)
        assert code == 1
        assert "nothing is overwritten" in output


def test_command_selects_from_a_run_and_its_exports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial")
    invoke("export", "trial", "--what", "scored", "--to", "parquet", "--output", "out", cwd=tmp_path)
    for name, pool in (("a", "trial"), ("b", "out")):
        code, output = invoke("select", pool, "--k", "5", "--output", f"{name}.jsonl", cwd=tmp_path)
        assert code == 0, output
    rows = list(FilesPool(tmp_path / "a.jsonl").rows())
    assert rows == list(FilesPool(tmp_path / "b.jsonl").rows())
    influence = read_table(run / "iteration-1" / "influence.parquet", INFLUENCE)["influence_student"].to_pylist()
    assert sorted(row["influence"] for row in rows) == sorted(filter(None, influence))[-5:]
    read = read_tasks(DataSource(path=str(tmp_path / "a.jsonl")), "data", with_response=True)
    assert [task.unfinished for task in read] == [not row["response_finished"] for row in rows]
    read = read_tasks(DataSource(path=str(tmp_path / "out")), "data", with_response=True)
    assert sum(task.unfinished for task in read) == 14


def test_influence_table_needs_its_examples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "trial")
    table = run / "iteration-1" / "influence.parquet"
    with pytest.raises(DataError, match="has no texts; give the data that was measured with --examples"):
        open_pool(table)
    examples = [{"id": f"i1-probing-{i}", "instruction": f"Do {i}.", "output": f"Done {i}."} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))
    select = ["select", str(table), "--k", "3", "--output", "best.parquet", "--examples"]
    code, output = invoke(*select, "data.jsonl", cwd=tmp_path)
    assert code == 0, output
    for row in ParquetPool(tmp_path / "best.parquet").rows():
        assert row["instruction"] == f"Do {row['id'].removeprefix('i1-probing-')}."
        assert row["status"] == "ok"
    (tmp_path / "other.jsonl").write_text(json.dumps(examples[0]))
    code, output = invoke(*select[:-2], "other.parquet", "--examples", "other.jsonl", cwd=tmp_path)
    assert code == 1
    assert "is not in --examples" in output


def test_bad_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pool.parquet")
    (tmp_path / "bad.jsonl").write_text('{"score": "high"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "huge.jsonl").write_text(f'{{"score": 1{"0" * 400}}}\n')
    by = ["--by", "score"]
    for pool, options, message in (
        ("pool.jsonl", by, "give one of --k, --share and --tokens"),
        ("pool.jsonl", [*by, "--k", "1", "--share", "0.5"], "give one of --k, --share and --tokens"),
        ("pool.jsonl", ["--k", "1"], "no column 'influence' (found: text, score, source, n)"),
        ("pool.jsonl", ["--by", "n", "--k", "1"], "no row has a score in 'n'"),
        ("pool.jsonl", [*by, "--k", "1", "--control", "best"], "give one of random, length_matched"),
        ("pool.jsonl", [*by, "--tokens", "9"], "no column 'response_tokens'"),
        (
            "pool.jsonl",
            [*by, "--k", "1", "--examples", "list.jsonl"],
            "pool.jsonl: has its own texts; leave out --examples",
        ),
        ("pool.jsonl", [*by, "--k", "1", "--max-rouge-l", "0.5"], "no column 'instruction'"),
        ("pool.parquet", [*by, "--k", "1", "--max-rouge-l", "0.5"], "no column 'instruction'"),
        ("pool.jsonl", [*by, "--tokens", "9", "--token-column", "source"], "is no number of tokens"),
        ("bad.jsonl", [*by, "--k", "1"], "row 1: 'score' is 'high'; a score is a number"),
        ("huge.jsonl", [*by, "--k", "1"], "a score is a number"),
        (
            "pool.jsonl",
            [*by, "--k", "1", "--output", "pool.jsonl/x.jsonl"],
            "pool.jsonl: a file is in the place of a folder",
        ),
        ("pool.jsonl", [*by, "--k", "1", "--output", "x" * 300 + ".jsonl"], "File name too long; correct the path"),
        ("list.jsonl", [*by, "--k", "1"], "expected an object with named fields"),
        ("pool.csv", [*by, "--k", "1"], "pool.csv: cannot be read"),
        ("absent.parquet", [*by, "--k", "1"], "absent.parquet: cannot be read"),
    ):
        code, output = invoke("select", pool, "--output", "out.jsonl", *options, cwd=tmp_path)
        assert code == 1, output
        assert message in " ".join(output.split())
        assert not (tmp_path / "out.jsonl").exists()
    code, output = invoke("select", "pool.jsonl", *by, "--k", "99", "--output", "all.jsonl", cwd=tmp_path)
    assert code == 0
    assert "10 rows instead of 99" in output


def test_influence_table_texts_keep_its_order(tmp_path: Path) -> None:
    """Whatever the order of the examples is; numbers alone do not read them."""
    table = write_run(tmp_path / "run") / "iteration-1" / "influence.parquet"
    ids = read_table(table, INFLUENCE)["example_id"].to_pylist()
    examples = [
        {"id": id, "instruction": f"Do {id}.", "output": f"Done {id}.", "response_finished": id != ids[7]}
        for id in [*ids[::-1], "another"]
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))
    pool = open_pool(table, DataSource(path=str(tmp_path / "data.jsonl")))
    rows = list(pool.rows(["id", "instruction", "influence", "response_finished"]))
    assert [(row["id"], row["instruction"]) for row in rows] == [(id, f"Do {id}.") for id in ids]
    assert [row["id"] for row in rows if not row["response_finished"]] == [ids[7]]
    taken = dict(pool.take({5, 2, 7}))
    assert list(taken) == [2, 5, 7]
    assert {position: row["output"] for position, row in taken.items()} == {n: f"Done {ids[n]}." for n in (2, 5, 7)}
    assert [row["influence"] for row in taken.values()] == [rows[n]["influence"] for n in (2, 5, 7)]
    (tmp_path / "data.jsonl").unlink()
    assert len(scored_positions(pool, ["influence"])) > 0
    assert [row for _, row in pool.take({5}, ["influence"])] == [{"influence": rows[5]["influence"]}]


def test_exported_prompts_are_compared(tmp_path: Path) -> None:
    """Of TRL's prompt and completion, all turns of the prompt count."""
    write_run(tmp_path / "trial")
    invoke("export", "trial", "--what", "scored", "--to", "trl", "--output", "out", cwd=tmp_path)
    invoke("export", "trial", "--what", "scored", "--to", "parquet", "--output", "flat", cwd=tmp_path)
    texts = [dict(texts_of(open_pool(tmp_path / name), set(range(40)))) for name in ("out", "flat")]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 40

"""Built-in data sets, and invalid files."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_core.config import DataSource, Experiment, Student, Teacher
from montessori_core.data.hub import hub_rows
from montessori_core.data.jsonl import jsonl_rows
from montessori_core.data.rouge import RougeIndex
from montessori_core.data.rows import EarlierTurn
from montessori_core.data.sources import Sources, Task, check_sources, load_tasks, read_sources, read_tasks, write_tasks
from montessori_core.data.tables import GENERATION, open_parquet, read_table, table_from_rows, write_table
from montessori_core.errors import DataError
from montessori_core.evaluation.alpaca_eval import read_difficulties, read_outputs
from montessori_core.judging.mt_bench import read_dialogues
from support.rouge import accept_all

EXPERIMENT = Experiment(teacher=Teacher(model="t"), student=Student(model="s"))
TARGETS = ("coding", "facts", "maths")


def rows(name: str) -> list[dict[str, str]]:
    text = (files("montessori_core") / "data" / "builtin" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "count"), [("seed_pool", 240), ("short_seed_pool", 96), ("reference", 96), ("evaluation", 64)]
)
def test_builtin_set_is_large_and_balanced(name: str, count: int) -> None:
    found = rows(name)
    assert len(found) == len({row["id"] for row in found}) == count
    categories = Counter(row["category"] for row in found)
    assert len(categories) == 8
    assert set(categories.values()) == {count // 8}


@pytest.mark.parametrize("kind", ["coding", "maths"])
def test_half_pool_has_half_target_tasks(kind: str) -> None:
    pools = {row["id"]: row for name in ("seed_pool", "short_seed_pool") for row in rows(name)}
    tasks = [pools[task.example_id] for task in read_tasks(DataSource(path=f"builtin/half-{kind}"), "seed_pool", False)]
    assert rows(f"half_{kind}_seed_pool") == tasks
    assert Counter(task["category"] == kind for task in tasks) == {True: 40, False: 40}


@pytest.mark.parametrize(("kind", "field"), list(product(TARGETS, ("reference", "evaluation"))))
def test_target_has_64_examples_of_one_kind(kind: str, field: str) -> None:
    found = rows(f"targets/{kind}/{field}")
    assert len(found) == len({row["id"] for row in found}) == 64
    assert {row["category"] for row in found} == {kind}
    assert [task.example_id for task in read_tasks(DataSource(path=f"builtin/{kind}"), field, True)] == [
        r["id"] for r in found
    ]


@pytest.mark.parametrize(
    ("path", "field", "message"),
    [
        (
            "builtin/cooking",
            "reference",
            "reference.path: builtin/cooking: .* builtin/coding, builtin/facts, builtin/maths",
        ),
        (
            "builtin/maths",
            "seed_pool",
            "seed_pool.path: builtin/maths is a target: .* no seeds.* builtin, builtin/half-coding, ",
        ),
        ("builtin/short", "evaluation", "evaluation.path: builtin/short: no such built-in set; give one of builtin, "),
    ],
)
def test_unknown_target_or_target_as_seeds_is_refused(path: str, field: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tasks(DataSource(path=path), field, with_response=False)


def test_fewer_than_eight_references_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    lines = [json.dumps({"instruction": f"Name river number {number}.", "output": "Rhine."}) for number in range(8)]
    path.write_text("\n".join(lines[:7]))
    experiment = EXPERIMENT.model_copy(update={"reference": DataSource(path=str(path))})
    with pytest.raises(DataError, match=r"reference.path: .*few.jsonl holds 7 examples; .* at least 8"):
        read_sources(experiment)
    path.write_text("\n".join(lines))
    assert len(read_sources(experiment).reference) == 8
    limited = EXPERIMENT.model_copy(update={"reference": DataSource(path=str(path), limit=4)})
    assert len(read_sources(limited).reference) == 4


def test_builtin_sets_are_disjoint_by_rouge_l() -> None:
    tasks = [task for name in Sources.__annotations__ for task in getattr(read_sources(EXPERIMENT), name)]
    for kind, field in product(TARGETS, ("reference", "evaluation")):
        tasks += read_tasks(DataSource(path=f"builtin/{kind}"), field, with_response=True)
    tasks += read_tasks(DataSource(path="builtin/short"), "seed_pool", with_response=False)
    assert len(tasks) == 240 + 96 + 64 + 3 * 128 + 96
    accepted = accept_all(RougeIndex(max_rouge_l=0.5 - 1e-9), [task.instruction for task in tasks])
    assert [task.example_id for task, new in zip(tasks, accepted, strict=True) if not new] == []


def test_builtin_sets_raise_no_warning() -> None:
    assert check_sources(read_sources(EXPERIMENT), EXPERIMENT) == []


@pytest.mark.guarantee("broken rows or wrong fields")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a"}\n{"instruction": \n', "line 2, column 17: not valid JSON"),
        ('{"instruction": "a"}\n["b"]\n', "line 2: expected an object with named fields, found list"),
        (
            '{"task": "a"}\n',
            "line 1: field 'instruction' is missing (found: task); name the column that holds it with "
            "seed_pool.instruction_field",
        ),
        ('{"instruction": 7}\n', "line 1: field 'instruction' is int, expected text"),
        ('{"instruction": "  "}\n', "line 1: field 'instruction' is empty"),
        ("\n\n", "has no examples"),
        ('{"id": 1, "instruction": "a"}\n{"id": 1, "instruction": "b"}\n', "id '1' occurs twice"),
        ('{"instruction": "a"}\n{"instruction": "\\ud800"}\n', "line 2: a text holds half of a surrogate pair"),
        ('{"instruction": "a", "more": ' + "[" * 100_000, "line 1: nested too deeply"),
        ('{"instruction": "a", "more": ' + "9" * 5000 + "}\n", "line 1: a number has too many digits"),
    ],
)
def test_malformed_jsonl_is_refused_with_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as refusal:
        read_tasks(DataSource(path=str(path)), "seed_pool", with_response=False)
    assert message in str(refusal.value)
    assert "seeds.jsonl" in str(refusal.value)


def test_data_set_id_may_have_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data set 'teknium/OpenHermes-2.5' \(split 'train'\) cannot be loaded"):
        read_tasks(DataSource(path="teknium/OpenHermes-2.5"), "seed_pool", with_response=False)


def test_invalid_utf8_is_refused_with_line(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    rows = [json.dumps({"instruction": f"Name {number} rivers."}).encode() for number in range(5000)]
    rows[4321] = '{"instruction": "Wie heißt der längste Fluss?"}'.encode("latin-1")
    path.write_bytes(b"\n".join(rows))
    with pytest.raises(DataError, match="seeds.jsonl, line 4322: not UTF-8 text"):
        read_tasks(DataSource(path=str(path)), "seed_pool", with_response=False)


def test_missing_files_and_odd_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    for name, message in (
        ("no.jsonl", "cannot be read"),
        ("no.parquet", "cannot be read"),
        ("no.txt", "no.txt: no such file or folder; correct the path"),
        ("a.txt", "expected a file \\(.jsonl, .ndjson, .json, "),
    ):
        with pytest.raises(DataError, match=message):
            read_tasks(DataSource(path=str(tmp_path / name)), "reference", with_response=True)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_tasks(DataSource(path=str(broken)), "reference", with_response=True)


def test_full_disk_is_not_a_damaged_table(tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"a": [1]}), table)
    with pytest.raises(OSError, match="No space left on device"), open_parquet(table):
        Path("/dev/full").write_text("x")


def test_jsonl_parquet_and_data_set_agree(tmp_path: Path) -> None:
    content = [{"q": "Name a colour.", "extra": "", "a": "Red."}, {"q": "Add:", "extra": "1 and 2", "a": "3"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, content)))
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "d.parquet")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(map(json.dumps, content)))
    fields = {"instruction_field": "q", "input_field": "extra", "output_field": "a"}
    tasks = [
        read_tasks(DataSource(path=str(tmp_path / name), **fields), "reference", with_response=True)
        for name in ("d.jsonl", "d.parquet", "hub")
    ]
    assert tasks[0] == tasks[1] == tasks[2]
    assert [(task.instruction, task.response) for task in tasks[0]] == [
        ("Name a colour.", "Red."),
        ("Add: 1 and 2", "3"),
    ]


def test_hub_data_set_is_read_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests have no hub: a local folder with the hub's layout, at the relative path of the id, replaces it.
    folder = tmp_path / "group" / "tasks"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"instruction": "Name a colour.", "output": "Red."}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    found = list(hub_rows(DataSource(path="group/tasks"), "reference"))
    assert found[0][1]["instruction"] == "Name a colour."
    with pytest.raises(DataError, match="cannot be loaded.*check the id and the network"):
        list(hub_rows(DataSource(path="group/absent"), "reference"))


SUBSETS = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]
- config_name: socratic
  data_files: socratic/train.jsonl
---
"""


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with two subsets and without a default one, as openai/gsm8k."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "sums"
    for name in ("main/train", "main/test", "socratic/train"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"instruction": f"{name} {number}", "output": "4"}) for number in range(2)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "README.md").write_text(SUBSETS)
    return folder


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"subset": "main"}, "main/train 0"),
        ({"subset": "main", "split": "test[1:]"}, "main/test 1"),
        ({"subset": "socratic"}, "socratic/train 0"),
    ],
)
def test_subset_and_split_are_read(data_set: Path, fields: dict[str, str], first: str) -> None:
    tasks = read_tasks(DataSource(path=str(data_set), **fields), "reference", with_response=True)
    assert tasks[0].instruction == first


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has several subsets; set reference.subset to one of main, socratic"),
        ({"subset": "more"}, "has no subset 'more'; set reference.subset to one of main, socratic"),
        ({"subset": "socratic", "split": "test"}, r"\(subset 'socratic', split 'test'\) cannot be loaded: .*train"),
        ({"subset": "main", "output_field": "answer"}, r"sums \(main, train\), row 1: field 'answer' is missing"),
    ],
)
def test_missing_subset_or_split_is_named(data_set: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tasks(DataSource(path=str(data_set), **fields), "reference", with_response=True)


@pytest.mark.parametrize("name", ["builtin", "builtin/maths"])
def test_builtin_sets_are_not_scored(name: str) -> None:
    with pytest.raises(DataError, match=f"examples.path: {name}: the built-in sets are seeds"):
        read_tasks(DataSource(path=name), "examples", with_response=True)


def test_overlapping_sets_are_refused_or_warned_about() -> None:
    seeds = [Task(f"s{i}", f"seed task number {i} about topic {i}") for i in range(8)]
    shared = Task("r1", "List three rivers of France and their lengths.", "...")
    other = Task("e1", "Which metal melts at the lowest temperature of all?", "...")
    copy = Task("e2", "List three rivers of France and their lengths!", "...")
    with pytest.raises(DataError, match=r"1 of 1 examples are also in the evaluation set, e.g. e2 and r1"):
        check_sources(Sources(seeds, [shared], [other, copy]), EXPERIMENT)
    warnings = check_sources(Sources([*seeds, Task("s9", copy.instruction)], [shared], [other]), EXPERIMENT)
    assert len(warnings) == 1
    assert "s9 and r1" in warnings[0]
    warnings = check_sources(Sources([*seeds, Task("s9", other.instruction)], [shared], [other]), EXPERIMENT)
    assert len(warnings) == 1
    assert "1 of 1 evaluation examples are also in the seed pool, e.g. s9 and e1" in warnings[0]
    with pytest.raises(
        DataError, match=r"has 7 tasks, but .* takes 8 of them; add tasks, or lower synthesis.seed_demonstrations"
    ):
        check_sources(Sources(seeds[:7], [shared], [other]), EXPERIMENT)


def test_shared_system_turn_is_no_overlap() -> None:
    seeds = [Task(f"s{i}", f"seed task number {i} about topic {i}") for i in range(8)]
    system = EarlierTurn(role="system", content=" ".join(f"rule{number}" for number in range(120)), weight=0)
    river, metal = "List three rivers of France.", "Which metal melts first?"
    reference = Task("r1", river, "...", (system,))
    assert check_sources(Sources(seeds, [reference], [Task("e1", metal, "...", (system,))]), EXPERIMENT) == []
    with pytest.raises(DataError, match="e.g. e2 and r1"):
        check_sources(Sources(seeds, [reference], [Task("e2", river, "...")]), EXPERIMENT)


def test_overlap_is_seen_in_other_scripts() -> None:
    seeds = [Task(f"s{i}", f"seed task number {i} about topic {i}") for i in range(8)]
    for text in ("Назови три реки во Франции.", "请说出法国的三条河流。"):
        with pytest.raises(DataError, match="1 of 1 examples are also in the evaluation set, e.g. e1 and r1"):
            check_sources(Sources(seeds, [Task("r1", text, "...")], [Task("e1", text, "...")]), EXPERIMENT)


def refusal_of(read: Callable[[], object]) -> str | None:
    """Return the error of a reader; None if the file is valid."""
    try:
        read()
    except DataError as refusal:
        return str(refusal)
    return None


ANY_TEXT = st.text(
    st.characters(exclude_categories=[]), max_size=20
)  # including lone surrogates and control characters
PIECES = st.sampled_from(
    [
        *(
            b'{"instruction": "a", "output": "b"}',
            b'{"instruction": "\\ud800", "output": "\\u2028"}',
            b'{"\\udc00": 1}',
        ),
        *(
            b'{"id": null, "instruction": "c", "output": "d"}',
            b'{"instruction": ["e"], "output": {}}',
            b"[[1]]",
            b"[" * 9999,
        ),
        *(
            b'{"question_id": 1, "category": "math", "turns": ["f", "g"]}',
            b'{"question_id": 1, "choices": [{"turns": [1]}]}',
        ),
        *(b"\n", b"\r\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"NaN", b"1e999", b"9" * 5000),
        *(b"0,0.5\n", b"1,nan\n", b"x,y\n", b'"', b",", b"{", b"[", b"]", b" "),
    ]
)


@pytest.mark.guarantee("broken rows or wrong fields")
@given(st.lists(PIECES | st.binary(max_size=4), max_size=6).map(b"".join), st.sampled_from(["any.jsonl", "any.json"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    source = DataSource(path=str(path))
    for read in (
        lambda: read_tasks(source, "seed_pool", with_response=False),
        lambda: read_tasks(source, "reference", with_response=True),
        lambda: read_outputs(path),
        lambda: read_dialogues(path, path),
        lambda: read_difficulties(path),
    ):
        refusal = refusal_of(read)
        assert refusal is None or name.encode() in refusal.encode()


@pytest.mark.guarantee("broken rows or wrong fields")
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=3))
def test_text_is_refused_or_survives_round_trip(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "texts.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"x{a}", "output": f"y{b}"}) + "\n" for a, b in texts))
    source = DataSource(path=str(path))
    broken = [number for number, pair in enumerate(texts, 1) if re.search("[\ud800-\udfff]", "".join(pair))]
    if broken:
        with pytest.raises(DataError, match=f"texts.jsonl, line {broken[0]}: a text holds half of a surrogate pair"):
            read_tasks(source, "reference", with_response=True)
        return
    tasks = read_tasks(source, "reference", with_response=True)
    assert [(task.instruction, task.response) for task in tasks] == [(f"x{a}".strip(), f"y{b}") for a, b in texts]
    write_tasks(tasks, path)
    assert load_tasks(path) == tasks
    rows: list[dict[str, object]] = [
        {
            "example_id": task.example_id,
            "prompt": task.instruction,
            "raw_output": task.response,
            "thinking": None,
            "finish_reason": "stop",
            "tokens": 1,
        }
        | {"output_ids": [3, 5], "vocabulary": "v"}
        for task in tasks
    ]
    write_table(table_from_rows(rows, GENERATION), path, GENERATION)
    assert read_table(path, GENERATION).to_pylist() == rows


ROWS: list[dict[str, object]] = [
    {
        "example_id": f"r{n}",
        "prompt": "näm" * n,
        "raw_output": "",
        "thinking": None,
        "finish_reason": "stop",
        "tokens": n,
    }
    | {"output_ids": None, "vocabulary": None}
    for n in range(40)
]


@pytest.mark.guarantee("damaged results")
@given(st.data())
def test_damaged_table_is_refused_or_unchanged(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    write_table(table_from_rows(ROWS, GENERATION), path, GENERATION)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    refusal = refusal_of(lambda: read_table(path, GENERATION))
    assert "damaged.parquet" in refusal if refusal else read_table(path, GENERATION).to_pylist() == ROWS
    source = DataSource(path=str(path), instruction_field="prompt")
    refusal = refusal_of(lambda: read_tasks(source, "seed_pool", with_response=False))
    assert refusal is None or "damaged.parquet" in refusal


@pytest.mark.parametrize(
    "name", ["", "a\0.jsonl", "~nobody-here/a.jsonl", "x" * 5000, "x" * 5000 + ".parquet", ".", "folder.jsonl"]
)
def test_odd_paths_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        read_tasks(DataSource(path=name), "seed_pool", with_response=False)


def test_pipe_is_refused(tmp_path: Path) -> None:
    for name, read in (("a.jsonl", read_outputs), ("a.json", read_outputs), ("a.csv", read_difficulties)):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="not a file"):
            read(tmp_path / name)
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not a file"):
        read_tasks(DataSource(path=str(tmp_path / "a.parquet")), "seed_pool", with_response=False)


@pytest.mark.parametrize("line", ['{"instruction": "Add.", "output": "4", "output": "5"}', '[{"a": {"b": 1, "b": 1}}]'])
def test_duplicate_field_is_refused(line: str, tmp_path: Path) -> None:
    """Python's parser would keep the last value, as PyYAML does."""
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"data.jsonl, line 1: field '(output|b)' occurs twice"):
        list(jsonl_rows(tmp_path / "data.jsonl"))


def test_changed_data_set_folder_is_read_again(tmp_path: Path) -> None:
    """Archives made reproducibly, and copies that keep times, have files of one time and other content."""
    found = []
    for text in ("one", "two"):
        (tmp_path / "train.jsonl").write_text(json.dumps({"instruction": text, "output": text}) + "\n")
        os.utime(tmp_path / "train.jsonl", (0, 0))
        [task] = read_tasks(DataSource(path=str(tmp_path)), "reference", with_response=True)
        found.append(task.instruction)
    assert found == ["one", "two"]

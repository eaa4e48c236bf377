"""Benchmarks: items are independent, judged over HTTP, and paid for once."""

import functools
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from montessori_core.config import parse_experiment
from montessori_core.data.tables import ITEM_SCORES, ITEMS, MT_BENCH, PAIRWISE, read_table, table_from_rows
from montessori_core.errors import ConfigError, DataError
from montessori_core.evaluation import harness
from montessori_core.evaluation.harness import open_harness, open_items
from montessori_core.evaluation.scores import item_scores, mean_over_seeds, score
from montessori_core.files import read_json, write_json
from montessori_core.models.control_tokens import encode_rendered
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.rendering import render_prompt, text_beginning
from montessori_core.program import Row
from montessori_core.programs import Harness, NoSettings
from support import ROOT
from support.judges import KEY, QUESTIONS, Judge, judged
from support.reports import Page
from support.row_programs import Interrupted, as_compute, interrupt_at
from support.runs import call, configuration, invoke
from support.studies import environment_of


@pytest.fixture
def judge() -> Iterator[Judge]:
    server = Judge()
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def one_manager(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make the harness read its thousands of task files once for all tests; without `--all`, only a test's own tasks."""
    from lm_eval.tasks import TaskManager

    own = functools.partial(TaskManager, include_defaults=request.config.getoption("--all"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", own)
        patch.setattr(harness, "_open_manager", functools.cache(harness._open_manager))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Custom tasks with local data: sums to generate, with demonstrations, and capitals to choose; two have no scores."""
    folder = tmp_path_factory.mktemp("tasks")
    sums = [{"question": f"{a} plus {a + 1}", "answer": str(2 * a + 1)} for a in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    capitals = [
        {"question": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0},
        {"question": "The capital of Italy is", "choices": ["Paris", "Rome"], "answer": 1},
    ]
    (folder / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in capitals))
    shared = {"dataset_path": "json", "test_split": "train", "metadata": {"version": 1}}
    written = {
        "task": "own_sums",
        "dataset_kwargs": {"data_files": "sums.jsonl"},
        "fewshot_split": "train",
        "num_fewshot": 3,
        "output_type": "generate_until",
        "doc_to_text": "{{question}} is",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = {
        "task": "own_capitals",
        "dataset_kwargs": {"data_files": "capitals.jsonl"},
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    prose = {
        "task": "own_prose",
        "dataset_kwargs": {"data_files": "sums.jsonl"},
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for task in (written, chosen, prose):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    (folder / "own.py").write_text("def lengths(item, results):\n    return {'bleu': (item['answer'], results[0])}\n")
    unscored = yaml.safe_dump(shared | written | {"task": "own_lengths", "metric_list": [{"metric": "bleu"}]})
    (folder / "own_lengths.yaml").write_text(f"{unscored}process_results: !function own.lengths\n")
    return folder


def items_of(tasks: Path, folder: Path, *names: str) -> list[Row]:
    done: list[float] = []
    as_compute(open_items(NoSettings(), {"tasks": tasks}))(
        [{"benchmark": name, "limit": None, "shots": None} for name in names], folder / "items.parquet", done.append
    )
    assert done == list(range(len(names) + 1))
    return read_table(folder / "items.parquet", ITEMS).to_pylist()


@pytest.mark.slow
def test_answers_do_not_depend_on_other_items(tasks: Path, smollm2: Path, tmp_path: Path) -> None:
    items = items_of(tasks, tmp_path, "own_sums", "own_capitals")
    assert [item["text"] for item in items][-1] == "The capital of Italy is\nRome"
    rows: list[Row] = [{key: item[key] for key in ("benchmark", "task", "item")} | {"shots": None} for item in items]
    settings = Harness(batch_size=1, chat_template=False)  # padded batches differ in the last bits

    def scores(name: str, some: list[Row]) -> list[Row]:
        as_compute(open_harness(settings, {"model": smollm2, "tasks": tasks}))(some, tmp_path / name, print)
        return read_table(tmp_path / name, ITEM_SCORES).to_pylist()

    whole = scores("whole", rows)
    assert [(row["task"], row["item"]) for row in whole] == [(row["task"], row["item"]) for row in rows]
    assert len({row["answer"] for row in whole if row["task"] == "own_sums"}) > 1
    assert scores("last", rows[5:]) + scores("first", rows[:5]) == whole[5:] + whole[:5]


@pytest.mark.guarantee("any number of interruptions")
def test_scores_do_not_depend_on_interruptions(tasks: Path, tiny_llama: Path, tmp_path: Path) -> None:
    items = items_of(tasks, tmp_path, "own_sums", "own_capitals")
    rows: list[Row] = [{key: item[key] for key in ("benchmark", "task", "item")} | {"shots": None} for item in items]
    program = open_harness(Harness(batch_size=3, chat_template=False), {"model": tiny_llama, "tasks": tasks})
    compute = as_compute(program)
    compute(rows, tmp_path / "calm.parquet", lambda done: None)
    with pytest.raises(Interrupted):
        compute(rows, tmp_path / "stormy.parquet", interrupt_at(3))
    compute(rows, tmp_path / "stormy.parquet", lambda done: None)
    assert (tmp_path / "stormy.parquet").read_bytes() == (tmp_path / "calm.parquet").read_bytes()


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}DATE"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[int]]]:
    """Token ids that models read, by the name of the model's folder."""
    inputs: dict[str, list[list[int]]] = defaultdict(list)

    def load(path: str, dtype: Any) -> Any:
        model = load_model(path, dtype)
        model.register_forward_pre_hook(
            lambda _, args, kw: inputs[Path(path).name].append([*args, kw.get("input_ids")][0][0].tolist()),
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr("montessori_core.evaluation.harness.load_model", load)
    return inputs


def test_prompts_have_configured_demonstrations(
    tasks: Path, tiny_llama: Path, tmp_path: Path, read: dict[str, list[list[int]]]
) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    for shots in (0, 1, 8):
        row = {"benchmark": "own_sums", "task": "own_sums", "item": 5, "shots": shots}
        program = open_harness(Harness(batch_size=1, chat_template=False), {"model": tiny_llama, "tasks": tasks})
        read.clear()
        as_compute(program)([row], tmp_path / f"{shots}.parquet", print)
        prompt = tokenizer.decode(read[tiny_llama.name][0])
        assert len(re.findall(r"\d plus \d+ is \d", prompt)) == shots
        assert prompt.endswith("5 plus 6 is")


def test_demonstrations_of_fixed_prompt_are_refused(tasks: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    [file] = folder.glob("own_sums.y*ml")
    file.write_text(file.read_text().replace("num_fewshot: 3", "num_fewshot: 0"))
    row = {"benchmark": "own_sums", "task": "own_sums", "item": 5, "shots": 2}
    program = open_harness(Harness(batch_size=1, chat_template=False), {"model": tiny_llama, "tasks": folder})
    with pytest.raises(DataError, match="'own_sums' has a fixed prompt .* shots: 2 would change nothing"):
        as_compute(program)([row], tmp_path / "scores.parquet", print)
    as_compute(program)([row | {"shots": None}], tmp_path / "scores.parquet", print)


def test_useless_shots_are_refused_before_training(tasks: Path, tmp_path: Path) -> None:
    """Items are listed first, scored last."""
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    fixed = (folder / "own_sums.yaml").read_text().replace("num_fewshot: 3", "num_fewshot: 0")
    (folder / "fixed.yaml").write_text(fixed.replace("own_sums", "own_fixed"))
    group = {"group": "own_group", "task": ["own_fixed", "own_sums"]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    listing = as_compute(open_items(NoSettings(), {"tasks": folder}))
    for benchmark, shots, message in (
        (
            "own_fixed",
            2,
            "'own_fixed' has a fixed prompt .* shots: 2 would change nothing; leave shots out, also .* started",
        ),
        ("own_sums", 500, "own_sums cannot have shots: 500 .*; give fewer"),
    ):
        with pytest.raises(DataError, match=message):
            listing([{"benchmark": benchmark, "limit": None, "shots": shots}], tmp_path / "items.parquet", print)
    allowed = [("own_fixed", 0), ("own_fixed", None), ("own_sums", 2), ("own_group", 2)]
    rows = [{"benchmark": name, "limit": None, "shots": shots} for name, shots in allowed]
    listing(rows, tmp_path / "items.parquet", print)


def test_chat_prompts_have_text_and_fixed_date(
    tasks: Path, tiny_llama: Path, tmp_path: Path, read: dict[str, list[list[int]]]
) -> None:
    """A template that takes parts and shows the date gives the prompts of one without either."""
    rows: list[Row] = [{"benchmark": "own_sums", "task": "own_sums", "item": n, "shots": 0} for n in range(3)]
    templates = {
        "plain": CHAT.replace("{{ CONTENT }}", "{{ m['content'] }}").replace("DATE", "26 Jul 2024"),
        "parts": CHAT.replace("{{ CONTENT }}", PARTS).replace("DATE", "{{ strftime_now('%d %b %Y') }}"),
    }
    for name, template in templates.items():
        model = Path(shutil.copytree(tiny_llama, tmp_path / name))
        (model / "chat_template.jinja").write_text(template)
        settings = Harness(batch_size=1, chat_template=True)
        as_compute(open_harness(settings, {"model": model, "tasks": tasks}))(rows, tmp_path / f"{name}.parquet", print)
    assert read["plain"] == read["parts"]
    prompt = load_tokenizer(str(tiny_llama)).decode(read["parts"][0])
    assert re.search(
        r"<\|im_start\|>user\n.*\d.*<\|im_end\|>\n26 Jul 2024<\|im_start\|>assistant\n$", prompt, re.DOTALL
    )


def test_chat_prompts_begin_as_in_training(
    tasks: Path, tiny_llama: Path, tmp_path: Path, read: dict[str, list[list[int]]]
) -> None:
    """A begin token that the chat template does not write is not added, though the tokenizer adds it to plain text."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tokenizer: Any = load_tokenizer(str(model))
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(model)
    assert text_beginning(load_tokenizer(str(model))) == "<|endoftext|>"
    for benchmark in ("own_sums", "own_capitals"):
        row = {"benchmark": benchmark, "task": benchmark, "item": 1, "shots": 0}
        program = open_harness(Harness(batch_size=1, chat_template=True), {"model": model, "tasks": tasks})
        as_compute(program)([row], tmp_path / f"{benchmark}.parquet", print)
        question = {"own_sums": "1 plus 2 is", "own_capitals": "The capital of Italy is"}[benchmark]
        expected, _ = encode_rendered(tokenizer, render_prompt(tokenizer, question).rstrip())
        prompts = [ids for ids in read[model.name] if len(ids) > 1]  # one token at a time is the answer's
        assert prompts
        assert all(ids[: len(expected)] == expected for ids in prompts)
        read.clear()


@pytest.mark.parametrize(
    ("check", "begins"),
    [
        ("", ["system", "user"]),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}", ["user"]),
    ],
    ids=["system turn", "no system turn"],
)
def test_chat_prompts_have_demonstrations_as_turns(
    check: str, begins: list[str], tasks: Path, tiny_llama: Path, tmp_path: Path, read: dict[str, list[list[int]]]
) -> None:
    """After the task's description, which a template without a system turn has before the first question."""
    shutil.copytree(tasks, tmp_path / "tasks")
    described = yaml.safe_load((tasks / "own_sums.yaml").read_text()) | {"description": "Add the numbers."}
    (tmp_path / "tasks" / "own_sums.yaml").write_text(yaml.safe_dump(described))
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    template = CHAT.replace("{{ CONTENT }}", "{{ m['content'] }}").replace("DATE", "")
    (model / "chat_template.jinja").write_text(check + template)
    row = {"benchmark": "own_sums", "task": "own_sums", "item": 5, "shots": 2}
    program = open_harness(Harness(batch_size=1, chat_template=True), {"model": model, "tasks": tmp_path / "tasks"})
    as_compute(program)([row], tmp_path / "scores.parquet", print)
    prompt = load_tokenizer(str(tiny_llama)).decode(read["model"][0])
    roles = re.findall(r"<\|im_start\|>(\w+)", prompt)
    assert roles == [*begins, "assistant", "user", "assistant", "user", "assistant"]
    assert prompt.count("Add the numbers.") == 1
    assert prompt.index("Add the numbers.") < prompt.index(" plus ")


@pytest.mark.parametrize(
    ("written", "answer"),
    [("<think>7\nor 8?</think>\n9\n10", "9"), ("<think>7\nor 8?", ""), ("9\n10", "9")],
    ids=["finished thinking", "cut thinking", "no thinking"],
)
def test_thinking_is_not_scored(
    written: str, answer: str, tasks: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop strings do not end thinking, and thinking without an end has no answer."""
    shutil.copytree(tasks, tmp_path / "tasks")
    settings = yaml.safe_load((tasks / "own_sums.yaml").read_text())
    settings["generation_kwargs"]["max_gen_toks"] = 40
    (tmp_path / "tasks" / "own_sums.yaml").write_text(yaml.safe_dump(settings))
    tokenizer = load_tokenizer(str(tiny_llama))
    script = [*tokenizer(written, add_special_tokens=False)["input_ids"], *[tokenizer.eos_token_id] * 40]
    begun: list[int] = []

    def load(path: str, dtype: Any) -> Any:
        model = load_model(path, dtype)

        def write(module: Any, arguments: Any, options: Any, output: Any) -> None:
            begun.append(options["input_ids"].shape[1])
            step = len(begun) - 1 - max(index for index, length in enumerate(begun) if length > 1)
            output.logits[:, -1, script[step]] = 1e9

        model.register_forward_hook(write, with_kwargs=True)
        return model

    monkeypatch.setattr("montessori_core.evaluation.harness.load_model", load)
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    template = CHAT.replace("{{ CONTENT }}", "{{ m['content'] }}").replace("DATE", "{% if x %}</think>{% endif %}")
    (model / "chat_template.jinja").write_text(template)
    rows: list[Row] = [{"benchmark": "own_sums", "task": "own_sums", "item": n, "shots": 0} for n in range(2)]
    program = open_harness(Harness(batch_size=2, chat_template=True), {"model": model, "tasks": tmp_path / "tasks"})
    as_compute(program)(rows, tmp_path / "scores.parquet", print)
    assert read_table(tmp_path / "scores.parquet", ITEM_SCORES)["answer"].to_pylist() == [answer] * 2


@pytest.mark.skipif(
    "MONTESSORI_SHARED_DATA" not in os.environ, reason="needs GSM8K's questions in MONTESSORI_SHARED_DATA"
)
def test_documented_task_asks_gsm8k(smollm2: Path, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```yaml\n(task: gsm8k_local\n.*?)```", guide, re.DOTALL)
    (tmp_path / "gsm8k_local.yaml").write_text(written)
    shutil.copy(Path(os.environ["MONTESSORI_SHARED_DATA"]) / "gsm8k_train_1000.jsonl", tmp_path / "questions.jsonl")
    items = items_of(tmp_path, tmp_path, "gsm8k_local")
    assert len(items) == 1000
    row = {"benchmark": "gsm8k_local", "task": "gsm8k_local", "item": 0, "shots": 2}
    settings = Harness(batch_size=1, chat_template=False)
    as_compute(open_harness(settings, {"model": smollm2, "tasks": tmp_path}))([row], tmp_path / "scores.parquet", print)
    (found,) = read_table(tmp_path / "scores.parquet", ITEM_SCORES).to_pylist()
    assert (found["metric"], found["target"][-2:]) == ("exact_match, last-number", "72")


@pytest.mark.parametrize("mean", ["mean", "!function own.numpy_mean", "!function own.fmean"])
def test_metric_without_mean_over_items_is_left_out(mean: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Of perplexity, items have log-likelihoods, whose mean is another number, and better if higher."""
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "The capital of France is", "word": "Paris"}) + "\n")
    (tmp_path / "own.py").write_text("from statistics import fmean\nfrom numpy import mean as numpy_mean\n")
    metrics = [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", "aggregation": "MEAN"}]
    written = {
        "task": "own_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": "words.jsonl"},
        "test_split": "train",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{word}}",
        "metric_list": metrics,
    }
    (tmp_path / "own_words.yaml").write_text(yaml.safe_dump(written).replace("MEAN", mean))
    assert len(items_of(tmp_path, tmp_path, "own_words")) == 1
    row = {"benchmark": "own_words", "task": "own_words", "item": 0, "shots": None}
    program = open_harness(Harness(batch_size=1, chat_template=False), {"model": tiny_llama, "tasks": tmp_path})
    as_compute(program)([row], tmp_path / "scores.parquet", print)
    assert read_table(tmp_path / "scores.parquet", ITEM_SCORES)["metric"].to_pylist() == ["acc"]


def test_task_without_mean_over_items_is_refused(tasks: Path, tmp_path: Path) -> None:
    """When its items are listed, before a model is scored; a function may have other metrics."""
    with pytest.raises(
        DataError, match=r"'own_prose' has no metric that is a mean over its items .word_perplexity are"
    ):
        items_of(tasks, tmp_path, "own_prose")
    assert len(items_of(tasks, tmp_path, "own_lengths")) == 12


def test_unavailable_tasks_are_named(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no task 'arc_chalenge'.*benchmarks.task_folder"):
        items_of(tasks, tmp_path, "arc_chalenge")


def test_group_score_is_mean_over_all_items() -> None:
    def row(task: str, item: int, metric: str, value: float) -> dict[str, object]:
        place = {"benchmark": "group", "task": task, "item": item, "metric": metric}
        return place | {"score": value, "higher_is_better": True, "answer": "", "target": ""}

    rows = [row("small", 0, "acc", 1.0), *(row("large", item, "acc", 0.0) for item in range(3))]
    (found,) = item_scores(table_from_rows(rows, ITEM_SCORES))
    assert found == score("group", "acc", 0.25, 0.25, 4)
    (single,) = item_scores(table_from_rows(rows[:1], ITEM_SCORES))
    assert (single["mean"], single["standard_error"]) == (1.0, None)


def test_seed_scores_are_averaged_in_order() -> None:
    seeds = [
        [score("a", "acc", mean, error, 9, unparsed=unparsed), score("b", "acc", None, None, 0)]
        for mean, error, unparsed in ((0.25, 3, 0), (0.35, 4, 2))
    ]
    seeds[0].append(score("c", "acc", 0.5, 1.0, 9))  # that of the other seed was not finite
    first, second = mean_over_seeds(seeds)
    assert first == pytest.approx(score("a", "acc", 0.3, math.sqrt(12.5 + 0.05**2), 9, unparsed=2))
    assert second["mean"] is None


def test_seeds_with_equal_answers_share_their_error() -> None:
    """All seeds answer the same items: more seeds are not more items."""
    seed = [score("a", "acc", 0.25, 0.02, 500)]
    [averaged] = mean_over_seeds([seed] * 5)
    assert averaged["standard_error"] == pytest.approx(0.02)


def test_error_over_seeds_has_their_spread() -> None:
    seeds = [[score("a", "acc", mean, 0.02, 500)] for mean in (0.40, 0.50, 0.60)]
    [averaged] = mean_over_seeds(seeds)
    assert averaged["standard_error"] == pytest.approx(math.hypot(0.1 / math.sqrt(3), 0.02))
    assert mean_over_seeds(seeds[:1])[0]["standard_error"] == pytest.approx(0.02)


COPYING = """
from flows.methods.method import Method, Proposal
from montessori_core.data.tables import EXAMPLES, table_from_rows, write_table

def propose(now):
    row = {"prompt_id": "p", "prompt": "p", "raw_output": "r", "response_finished": True}
    row |= {"instruction": "So the capital of France is what?", "response": "Paris."}
    now.step.folder.mkdir(parents=True, exist_ok=True)
    path = now.step.folder / "examples.parquet"
    write_table(table_from_rows([row | {"example_id": str(n)} for n in range(6)], EXAMPLES), path, EXAMPLES)
    return Proposal(path, now.run.initial_teacher())

COPYING = Method("copying", "Writes a question of a benchmark.", propose)
"""


@pytest.mark.slow
def test_study_shows_scores_of_every_student(tasks: Path, talking_llama: Path, tmp_path: Path) -> None:
    experiment = yaml.safe_load(configuration(tmp_path, talking_llama).read_text())
    experiment["benchmarks"] = {
        "task_folder": str(tasks),
        "tasks": [{"name": "own_capitals"}],
        "contamination_words": 4,
    }
    (tmp_path / "reference.jsonl").write_text('{"instruction": "What is the capital of France?", "output": "Paris."}\n')
    experiment["reference"] = {"path": str(tmp_path / "reference.jsonl"), "limit": 1}
    (tmp_path / "copying.py").write_text(COPYING)
    content = {"experiment": experiment, "methods": ["self_instruct", "copying:COPYING"], "seeds": [0]}
    content["transfer"] = [experiment["student"], experiment["student"] | {"max_length": 512}]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    code, output = call("compare", "study.yaml", cwd=tmp_path, **environment_of(tmp_path))
    assert code == 0, output
    result = read_json(tmp_path / "runs" / "study" / "comparison.json")
    scores = [result["untrained_scores"], *(part["methods"][0]["scores"] for part in [result, *result["transfer"]])]
    assert [[row["benchmark"] for row in of_student] for of_student in scores] == [["own_capitals"]] * 4
    model, length = experiment["student"]["model"], experiment["student"]["max_length"]
    labels = [other["student"] for other in result["transfer"]]
    assert labels == [f"{model} (max_length: {length}, transfer.0)", f"{model} (max_length: 512)"]
    assert output.count("own_capitals: acc") == 3
    assert "1 of 2 items of own_capitals of benchmarks.tasks share 4 words in a row with reference examples" in output
    copies = {
        row["method"]: [(entry["benchmark"], entry["overlapping"], entry["items"]) for entry in row["contamination"]]
        for row in result["methods"]
    }
    assert copies == {
        name: [("held-out", 0, 4), ("own_capitals", n, 2)] for n, name in enumerate(("self_instruct", "copying"))
    }
    assert re.search(r"own_capitals\s+│ 0 of 2\s+│ 1 of 2", output)
    text = Page((tmp_path / "runs" / "study" / "comparison.html").read_text()).text
    assert text.count("Benchmarks of ") == 3
    assert "self_instruct0 of 40 of 2\ncopying0 of 41 of 2" in text


@pytest.mark.slow
def test_evaluated_model_is_not_paid_for_twice(judge: Judge, tasks: Path, talking_llama: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(configuration(tmp_path, talking_llama).read_text())
    own = {"task_folder": str(tasks), "tasks": [{"name": "own_sums"}, {"name": "own_lengths"}], "items_per_shard": 5}
    config = tmp_path / "evaluation.yaml"
    config.write_text(yaml.safe_dump(content | {"benchmarks": own}))
    command = ("evaluate", str(talking_llama), "--config", str(config), "--name", "mine")
    secrets = {
        "OPENAI_API_KEY": KEY,
        "MONTESSORI_CACHE": str(tmp_path / "cache"),
        "PREFECT_HOME": str(tmp_path / "home"),
    }
    code, output = call(*command, cwd=tmp_path, **secrets)
    assert code == 0, output
    assert "none of their metrics is a number per item: own_lengths" in " ".join(output.split())
    folder = tmp_path / "runs" / "mine"
    done = {path: path.read_bytes() for path in folder.rglob("*.manifest.json")}

    sections = judged(judge, tmp_path)  # added later; nothing else is recomputed
    config.write_text(yaml.safe_dump(content | sections | {"benchmarks": own | sections["benchmarks"]}))
    code, output = call(*command, cwd=tmp_path, **secrets)
    assert code == 0, output
    assert {path: path.read_bytes() for path in done} == done
    result = read_json(folder / "evaluation.json")
    scores = {(one["benchmark"], one["metric"]): one for one in result["scores"]}
    assert scores["own_sums", "exact_match"]["examples"] == 12
    pairs = read_table(folder / "evaluation-benchmarks" / "alpaca-eval.parquet", PAIRWISE).to_pylist()
    answers = [one["output"] for one in read_json(folder / "evaluation-benchmarks" / "alpaca-eval-outputs.json")]
    assert [pair["characters"] for pair in pairs] == [len(answer) for answer in answers]
    assert [pair["outcome"] for pair in pairs] == ["win" if answer else "tie" for answer in answers]
    assert scores["alpaca_eval", "win_rate"]["mean"] == sum(pair["preference"] for pair in pairs) / len(QUESTIONS)
    graded = read_table(folder / "evaluation-benchmarks" / "mt-bench.parquet", MT_BENCH).to_pylist()
    assert [(row["question_id"], row["turn"], row["score"]) for row in graded] == [
        ("1", 1, 7.0),
        ("1", 2, 4.0),
        ("2", 1, 7.0),
        ("2", 2, 4.0),
    ]
    assert scores["mt_bench", "score"]["mean"] == 5.5
    later = [question for question in judge.asked if "second of two answers" in question]
    assert sorted("It is prime." in question for question in later) == [False, True]
    assert judge.keys == {f"Bearer {KEY}"}
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert "alpaca_eval" in output
    assert "95 % interval" in output

    asked = len(judge.asked)
    code, output = call(*command, cwd=tmp_path, **secrets)
    assert (code, len(judge.asked)) == (0, asked), output
    assert read_json(folder / "evaluation.json") == result

    code, output = call(*command, "--set", "benchmarks.judge_prompts=published", cwd=tmp_path, **secrets)
    assert code == 0, output
    scores = {(one["benchmark"], one["metric"]): one["mean"] for one in read_json(folder / "evaluation.json")["scores"]}
    assert scores["alpaca_eval_published", "win_rate"] == 0.5  # each order prefers its first answer
    assert scores["mt_bench_published", "score"] == 6.0
    assert not {"alpaca_eval", "mt_bench"} & {benchmark for benchmark, _ in scores}


@pytest.mark.slow
def test_second_turn_without_room_has_an_empty_answer(judge: Judge, tiny_llama: Path, tmp_path: Path) -> None:
    """The model does not end its first answers, which so fill its positions."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    settings = read_json(model / "config.json")
    write_json(settings | {"max_position_embeddings": 200}, model / "config.json")
    content = yaml.safe_load(configuration(tmp_path, model).read_text())
    sections = judged(judge, tmp_path)
    sections["benchmarks"] |= {"answers": {"max_tokens": 400, "presence_penalty": 0.0}, "alpaca_eval": None}
    config = tmp_path / "evaluation.yaml"
    config.write_text(yaml.safe_dump(content | sections | {"student": content["student"] | {"max_length": 200}}))
    code, output = call(
        *("evaluate", str(model), "--config", str(config), "--name", "mine"),
        cwd=tmp_path,
        OPENAI_API_KEY=KEY,
        MONTESSORI_CACHE=str(tmp_path / "cache"),
        PREFECT_HOME=str(tmp_path / "home"),
    )
    assert code == 0, output
    assert "turn 2: 1 of 1 outputs are empty, because their prompts fill the model's positions" in " ".join(
        output.split()
    )
    graded = read_table(tmp_path / "runs" / "mine" / "evaluation-benchmarks" / "mt-bench.parquet", MT_BENCH)
    assert graded["score"].to_pylist() == [7.0, 4.0] * 2


def test_unusable_options_are_refused_before_computing(judge: Judge, talking_llama: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(configuration(tmp_path, talking_llama).read_text())
    sections = judged(judge, tmp_path)
    with pytest.raises(ConfigError, match=r"benchmarks.mt_bench need a judge: set judge.model"):
        parse_experiment(content | {"benchmarks": sections["benchmarks"]}, "test")
    config = tmp_path / "evaluation.yaml"

    def refusal(command: Callable[..., tuple[int, str]] = invoke, **benchmarks: object) -> str:
        config.write_text(yaml.safe_dump(content | sections | {"benchmarks": sections["benchmarks"] | benchmarks}))
        code, output = command("evaluate", str(talking_llama), "--config", str(config), "--name", "bad", cwd=tmp_path)
        assert code == 1
        assert not list((tmp_path / "runs").rglob("stage.json"))
        return output

    assert "benchmarks.task_folder: nowhere: not found" in refusal(call, task_folder="nowhere")
    assert "no reference answer for the questions 2" in refusal(mt_bench_references=None)
    (tmp_path / "difficulty.csv").write_text("index,difficulty\n0,0.5\n")
    output = refusal(alpaca_eval_difficulty=str(tmp_path / "difficulty.csv"))
    assert "does not match the 5 instructions" in output

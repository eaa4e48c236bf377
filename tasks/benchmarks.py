"""Benchmarks of students (Section 4, Evaluation Methods): lm-evaluation-harness, AlpacaEval 2.0, MT-Bench."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import programs
from montessori_core.config import Sampling
from montessori_core.data.contamination import TRAINING_SET, overlapping
from montessori_core.data.rows import BenchmarkRow, GenerationRow
from montessori_core.data.tables import EXAMPLES, ITEM_SCORES, ITEMS, MT_BENCH, PAIRWISE, read_table, write_table
from montessori_core.evaluation import alpaca_eval
from montessori_core.evaluation.scores import (
    item_scores,
    judged_benchmark,
    mt_bench_scores,
    tasks_without_scores,
    win_rate_scores,
)
from montessori_core.files import write_json
from montessori_core.judging import mt_bench
from montessori_core.models.thinking import is_cut_thinking
from montessori_core.program import Program, Row
from montessori_core.programs import Form
from montessori_core.seeding import seed_of
from tasks.generation import generate
from tasks.run import Model, Run
from tasks.stage import Step, warn


@dataclass(frozen=True)
class BenchmarkResult:
    """A student's benchmarks.

    Attributes:
        scores: rows of `montessori_core.evaluation.scores`.
        answers: file of the student's answers in AlpacaEval's format; None without AlpacaEval.
    """

    scores: list[Row]
    answers: Path | None


def list_items(run: Run) -> Path | None:
    """List the items of the harness's tasks in a table of schema `ITEMS`; return its path, or None without tasks.

    Call it before any other stage, so that an unknown task name or shots that it cannot have fail in the first minute.
    """
    benchmarks = run.experiment.benchmarks
    if not benchmarks.tasks:
        return None
    step = Step(run, _items(run).with_suffix(""), "benchmarks: items")
    rows: list[BenchmarkRow] = [
        {"benchmark": task.name, "limit": task.limit, "shots": task.shots} for task in benchmarks.tasks
    ]
    parts = step.execute(programs.BENCHMARK_ITEMS, programs.NoSettings(), rows, files=_task_folder(run))
    return _join("benchmarks: items, table", _items(run), parts, ITEMS)


def measure_benchmarks(step: Step, student: Model) -> BenchmarkResult:
    """Run all configured benchmarks on a student. Call `list_items` first."""
    benchmarks = step.experiment.benchmarks
    scores: list[Row] = []
    if benchmarks.tasks:
        scores += _score_items(step, student)
    answers = None
    if benchmarks.alpaca_eval is not None:
        answers = _answer_alpaca_eval(step, student)
        baseline = step.run.benchmark_file("alpaca_eval")
        rates = compare_answers(step.at("alpaca-eval", "AlpacaEval"), answers, baseline)
        scores += win_rate_scores(judged_benchmark("alpaca_eval", benchmarks.judge_prompts), rates)
    if benchmarks.mt_bench is not None:
        scores += _score_mt_bench(step.renamed(f"{step.label}: MT-Bench"), student)
    if scores:
        _publish(step.label, scores)
    return BenchmarkResult(scores, answers)


def compare_answers(step: Step, answers: Path, others: Path) -> alpaca_eval.WinRates:
    """Compare a student's answers to AlpacaEval's instructions with others; each pair is judged in both orders."""
    ours, theirs = (
        {output.instruction: output.output for output in alpaca_eval.read_outputs(path)} for path in (answers, others)
    )
    parts = _judge(step, programs.PAIRWISE_JUDGE, alpaca_eval.comparisons(ours, theirs), [answers, others])
    table = _join(f"{step.label}: table", step.folder.with_name(f"{step.folder.name}.parquet"), parts, PAIRWISE)
    difficulties = None
    if step.experiment.benchmarks.alpaca_eval_difficulty:
        difficulties = alpaca_eval.read_difficulties(step.run.benchmark_file("alpaca_eval_difficulty"))
    return alpaca_eval.summarize(read_table(table, PAIRWISE), difficulties)


def check_contamination(step: Step, examples: Path, data: str = TRAINING_SET) -> list[Row]:
    """Count the items of each evaluation set and benchmark that overlap the training examples, which are named `data`."""
    return _find_copies(step, examples, data) if step.experiment.benchmarks.contamination_words else []


def warn_of_references(run: Run) -> None:
    """Warn of items of the harness's tasks that the reference set has. Call `list_items` first.

    `tasks.benchmark_files.overlap_warnings` is for benchmarks whose files are there when a run is opened.
    """
    benchmarks, words = run.experiment.benchmarks, run.experiment.benchmarks.contamination_words
    if not benchmarks.tasks or not words:
        return
    references = [f"{task.request}\n{task.response}" for task in run.sources().reference]
    for name, items in _items_of_tasks(run).items():
        if count := _count_copies(items, references, words):
            warn(
                "benchmarks: items",
                f"{count} of {len(items)} items of {name} of benchmarks.tasks share {words} words in a row with reference "
                "examples: influence is measured on what students are tested on, so scores of this benchmark say nothing "
                "about other tasks",
            )


def _items(run: Run) -> Path:
    return run.folder / "benchmark-items.parquet"


def _score_items(step: Step, student: Model) -> list[Row]:
    benchmarks = step.experiment.benchmarks
    shots = {task.name: task.shots for task in benchmarks.tasks}
    items = read_table(_items(step.run), ITEMS, ["benchmark", "task", "item"])
    rows = [row | {"shots": shots[row["benchmark"]]} for row in items.to_pylist()]
    scoring = step.at("items", "benchmarks")
    parts = scoring.execute(
        programs.HARNESS,
        programs.Harness(batch_size=benchmarks.batch_size, chat_template=benchmarks.chat_template),
        rows,
        benchmarks.items_per_shard,
        models={"model": student},
        files=_task_folder(step.run),
    )
    table = _join(f"{scoring.label}, table", step.folder / "items.parquet", parts, ITEM_SCORES)
    scored = read_table(table, ITEM_SCORES)
    if unscored := tasks_without_scores(items, scored):
        warn(scoring.label, f"no score, because none of their metrics is a number per item: {', '.join(unscored)}")
    return item_scores(scored)


def _answer_alpaca_eval(step: Step, student: Model) -> Path:
    outputs = alpaca_eval.read_outputs(step.run.benchmark_file("alpaca_eval"))
    instructions = [output.instruction for output in outputs]
    name = f"{step.label}: AlpacaEval"
    answering = step.at("alpaca-eval-answers").renamed(f"{name}, answers")
    answers, parts = _answer(
        answering, student, [[text] for text in instructions], "request", step.experiment.benchmarks.answers
    )
    records = [
        {"instruction": instruction, "output": answer, "generator": name}
        for instruction, answer in zip(instructions, answers, strict=True)
    ]
    return _write_outputs(answering.label, step.folder / "alpaca-eval-outputs.json", records, parts)


def _score_mt_bench(step: Step, student: Model) -> list[Row]:
    benchmarks, dialogues = step.experiment.benchmarks, _dialogues(step.run)
    override = benchmarks.mt_bench_temperature
    answers: dict[str, tuple[str, str]] = {}
    parts: list[Path] = []
    for temperature in sorted({dialogue.temperature if override is None else override for dialogue in dialogues}):
        group = [dialogue for dialogue in dialogues if override is not None or dialogue.temperature == temperature]
        sampling = benchmarks.answers.model_copy(update={"temperature": temperature})
        turns = [
            step.at(f"mt-bench-{temperature:g}-turn-{turn}").renamed(
                f"{step.label} at temperature {temperature:g}, turn {turn}"
            )
            for turn in (1, 2)
        ]
        opening = [[dialogue.questions[0]] for dialogue in group]
        first, _ = _answer(turns[0], student, opening, "request", sampling)
        following = [
            [dialogue.questions[0], answer, dialogue.questions[1]]
            for dialogue, answer in zip(group, first, strict=True)
        ]
        second, second_parts = _answer(turns[1], student, following, "reply", sampling)
        parts += second_parts
        answers |= {dialogue.id: (opener, reply) for dialogue, opener, reply in zip(group, first, second, strict=True)}
    rows = mt_bench.judgements(dialogues, answers)
    judged = _judge(step.at("mt-bench"), programs.MT_BENCH_JUDGE, rows, parts)
    table = _join(f"{step.label}: table", step.folder / "mt-bench.parquet", judged, MT_BENCH)
    return mt_bench_scores(
        judged_benchmark("mt_bench", benchmarks.judge_prompts), mt_bench.summarize(read_table(table, MT_BENCH))
    )


def _dialogues(run: Run) -> list[mt_bench.Dialogue]:
    references = run.experiment.benchmarks.mt_bench_references
    return mt_bench.read_dialogues(
        run.benchmark_file("mt_bench"), run.benchmark_file("mt_bench_references") if references else None
    )


def _answer(
    step: Step, student: Model, asked: list[list[str]], form: Form, sampling: Sampling
) -> tuple[list[str], list[Path]]:
    """Generate an answer for the turns of each that is asked; return the answers and their part files."""
    seed = step.experiment.seed
    rows: list[GenerationRow] = [
        {
            "example_ids": [f"{index:05d}"],
            "turns": turns,
            "seeds": [seed_of(seed, "benchmark", step.folder.name, index)],
        }
        for index, turns in enumerate(asked)
    ]
    size = step.experiment.synthesis.instructions_per_shard
    generated, parts = generate(step, student, rows, size, sampling, form, [])
    if cut := sum(map(is_cut_thinking, generated)):
        warn(
            step.label,
            f"{cut} of {len(generated)} answers are empty, because thinking used up max_tokens={sampling.max_tokens}; raise "
            "benchmarks.answers.max_tokens, or switch thinking off with student.chat_template_kwargs",
        )
    return [row["raw_output"].strip() for row in generated], parts


def _judge(
    step: Step, program: Program[programs.BenchmarkJudging], rows: Sequence[Mapping[str, object]], upstream: list[Path]
) -> list[Path]:
    settings = {"prompts": step.experiment.benchmarks.judge_prompts}
    return step.renamed(f"{step.label}, judge").ask("judge", program, settings, rows, upstream)


def _task_folder(run: Run) -> dict[str, Path]:
    return {"tasks": run.benchmark_file("task_folder")} if run.experiment.benchmarks.task_folder else {}


def _items_by_benchmark(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Return the task and the text of each item of the evaluation set and of the benchmarks, by their name."""
    benchmarks = run.experiment.benchmarks
    items = {"held-out": [("", f"{task.request}\n{task.response}") for task in run.sources().evaluation]}
    if benchmarks.tasks:
        items |= _items_of_tasks(run)
    if benchmarks.alpaca_eval is not None:
        outputs = alpaca_eval.read_outputs(run.benchmark_file("alpaca_eval"))
        items["alpaca_eval"] = [("", output.instruction) for output in outputs]
    if benchmarks.mt_bench is not None:
        items["mt_bench"] = [("", "\n".join(dialogue.questions)) for dialogue in _dialogues(run)]
    return items


def _items_of_tasks(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Return the task and the text of each item of the harness's tasks, by the name of their benchmark."""
    items: dict[str, list[tuple[str, str]]] = {}
    for row in read_table(_items(run), ITEMS, ["benchmark", "task", "text"]).to_pylist():
        items.setdefault(row["benchmark"], []).append((row["task"], row["text"]))
    return items


def _count_copies(items: Sequence[tuple[str, str]], data: list[str], words: int) -> int:
    """Return the number of items, each a task and a text, that share `words` consecutive words with a text of the data."""
    return sum(overlapping([text for _, text in items], data, words, [task for task, _ in items]))


@task(task_run_name="{step.label}: copies", cache_policy=NO_CACHE, persist_result=False)
def _find_copies(step: Step, examples: Path, data: str) -> list[Row]:
    words = step.experiment.benchmarks.contamination_words
    rows = read_table(examples, EXAMPLES, ["instruction", "response"]).to_pylist()
    texts = [f"{row['instruction']}\n{row['response']}" for row in rows]
    counts: list[Row] = [
        {
            "benchmark": name,
            "data": data,
            "items": len(items),
            "overlapping": _count_copies(items, texts, words),
            "n": words,
        }
        for name, items in _items_by_benchmark(step.run).items()
    ]
    write_json(counts, step.folder / "contamination.json")
    create_table_artifact(counts, description=f"{step.label}: copies")
    return counts


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def _write_outputs(label: str, path: Path, outputs: list[Row], parts: list[Path]) -> Path:
    write_json(outputs, path)
    return path


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def _join(label: str, path: Path, parts: list[Path], schema: pa.Schema) -> Path:
    """Write the rows of all parts to one table."""
    write_table(read_table(parts, schema), path, schema)
    return path


@task(task_run_name="{label}: scores", cache_policy=NO_CACHE, persist_result=False)
def _publish(label: str, scores: list[Row]) -> None:
    create_table_artifact(scores, description=f"Benchmarks - {label}")

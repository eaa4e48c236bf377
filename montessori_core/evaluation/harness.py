"""Tasks of lm-evaluation-harness (Section 4, Evaluation Methods): list their items, and score a model on them.

The demonstrations of an item are drawn with a seed from the item, so its result does not depend on other items or on
sharding. (The harness draws for all items from one random stream.)
"""

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.data.rows import BenchmarkRow, ItemRow
from montessori_core.data.tables import ITEM_SCORES, ITEMS
from montessori_core.errors import DataError, UserError
from montessori_core.files import hash_json
from montessori_core.models.chat import without_system
from montessori_core.models.control_tokens import encode_plain, split_generated
from montessori_core.models.load import check_tokenizer, load_model, load_tokenizer
from montessori_core.models.rendering import dated_template, end_tokens, turn_content
from montessori_core.models.thinking import NAMES
from montessori_core.program import Recorder, Row, RowProgram

_MAX_CHARACTERS = 2000  # of answers and targets in the table


def open_items(settings: programs.NoSettings, inputs: Mapping[str, Path]) -> RowProgram[BenchmarkRow]:
    """Open the harness to list the items of its tasks.

    Inputs: `tasks`, an optional folder of task files. The result is a table of schema `ITEMS`.

    Raises:
        UserError: the harness is not installed.
    """
    manager = _open_manager(inputs.get("tasks"))

    def compute(rows: list[BenchmarkRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for position, row in enumerate(rows):
            records: list[Row] = []
            tasks = _load(manager, row["benchmark"], inputs.get("tasks"))
            _check_metrics(row["benchmark"], tasks)
            _set_shots(row["benchmark"], tasks, row["shots"])
            for task in tasks.values():
                for index, item in enumerate(task.eval_docs):
                    if row["limit"] is not None and index >= row["limit"]:
                        break
                    if index == 0:
                        _check_demonstrations(task, item)
                    records.append(
                        {
                            "benchmark": row["benchmark"],
                            "task": task.task_name,
                            "item": index,
                            "text": _text_of(task, item),
                        }
                    )
            recorder.finish(position, records)
            recorder.progress(position + 1)

    return RowProgram(ITEMS, compute)


def open_harness(settings: programs.Harness, inputs: Mapping[str, Path]) -> RowProgram[ItemRow]:
    """Load a model to score it on items.

    Inputs: `model`; `tasks`, an optional folder of task files. The result is a table of schema `ITEM_SCORES`.

    Raises:
        UserError: the harness is not installed.
    """
    manager = _open_manager(inputs.get("tasks"))
    model = _open_chat_model(str(inputs["model"]), settings)
    loaded: dict[tuple[str, int | None], dict[str, Any]] = {}

    def compute(rows: list[ItemRow], recorder: Recorder) -> None:
        recorder.progress(done := 0)
        for positions in _batches(rows, settings.batch_size):
            benchmark, shots = rows[positions[0]]["benchmark"], rows[positions[0]]["shots"]
            tasks = loaded.setdefault((benchmark, shots), {})
            if not tasks:
                tasks |= _load(manager, benchmark, inputs.get("tasks"))
                _set_shots(benchmark, tasks, shots)
                for task in tasks.values():
                    _draw_by_item(task)
            items = {(rows[position]["task"], rows[position]["item"]): position for position in positions}
            records: dict[int, list[Row]] = {position: [] for position in positions}
            for record in _score(model, tasks, sorted(items), benchmark, settings.chat_template):
                records[items[record["task"], record["item"]]].append(record)
            for position in positions:
                recorder.finish(position, records[position])
            done += len(positions)
            recorder.progress(done)

    return RowProgram(ITEM_SCORES, compute)


def _open_chat_model(path: str, settings: programs.Harness) -> Any:
    """Return the harness's view of a model, whose prompts are rendered as those of our other programs."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from montessori_core.models.device import compute_device

    class ChatModel(HFLM):  # type: ignore[misc]
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            turns = without_system(tokenizer, chat_history)  # the harness would drop its text
            turns = [turn | {"content": turn_content(tokenizer, turn["content"])} for turn in turns]
            return str(super().apply_chat_template(turns, add_generation_prompt))

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            if not any(name in tokenizer.chat_template for name in NAMES):
                return super()._model_generate(context, max_length, stop, **options)
            # Stop strings count in the answer alone: the harness cuts it at them afterwards.
            ends = [tokenizer.decode(self.eot_token_id)] if settings.chat_template else stop
            written = super()._model_generate(context, max_length, ends, **options)
            start = context.shape[1]
            for row in written:
                drawn = row[start:].tolist()
                text = tokenizer.decode(drawn, skip_special_tokens=True)
                _, answer = split_generated(tokenizer, text, drawn, tokenizer.decode(row[:start]))
                kept = encode_plain(tokenizer, answer)[: len(drawn)]
                row[start:] = torch.tensor(kept + [self.eot_token_id] * (len(drawn) - len(kept)))
            return written

    device = compute_device()
    tokenizer = load_tokenizer(path)
    model = load_model(path, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()
    check_tokenizer(tokenizer, model)
    model.generation_config.eos_token_id = sorted(end_tokens(tokenizer, model.generation_config))
    tokenizer.chat_template = dated_template(tokenizer)
    return ChatModel(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        device=str(device),
        add_bos_token=False if settings.chat_template else None,  # the template writes it
    )


def _open_manager(folder: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"benchmarks.tasks needs lm-evaluation-harness where the jobs run ({error}); pip install "
            "'montessori[benchmarks]', or set benchmarks.tasks to [] for the held-out loss alone"
        ) from error
    return TaskManager(include_path=str(folder) if folder else None)


def _load(manager: Any, benchmark: str, folder: Path | None) -> dict[str, Any]:
    """Load the tasks of a name. Paths of data files in custom tasks are relative to `folder`."""
    try:
        with contextlib.chdir(folder or Path.cwd()):
            tasks: dict[str, Any] = manager.load([benchmark])["tasks"]
    except KeyError as error:
        raise DataError(
            f"benchmarks.tasks: lm-evaluation-harness has no task {benchmark!r} ({error}); list its tasks with lm_eval ls "
            "tasks; a custom task is a YAML file in benchmarks.task_folder"
        ) from error
    except OSError as error:  # includes errors of datasets and of the hub
        raise DataError(
            f"benchmarks.tasks: the data of {benchmark!r} cannot be loaded ({error}); the nodes need access to the Hugging "
            "Face hub (and HF_TOKEN for gated data), or an HF_HOME with the downloaded data, or a custom task with local "
            "data in benchmarks.task_folder"
        ) from error
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise DataError(
            f"benchmarks.tasks: {', '.join(unsafe)} would execute code that the model writes, which is not allowed"
        )
    return tasks


def _check_metrics(benchmark: str, tasks: dict[str, Any]) -> None:
    """Check that a task may have a score per item, before a model is scored on it.

    Raises:
        DataError: none has one by its metrics. Of a task with a function in place of the usual metrics nothing is known.
    """
    if all(task.get_config("process_results") is None and not _means(task.aggregation()) for task in tasks.values()):
        names = sorted({metric for task in tasks.values() for metric in task.aggregation()})
        raise DataError(
            f"benchmarks.tasks: {benchmark!r} has no metric that is a mean over its items ({', '.join(names)} are over all "
            "items at once), so that it would have no score; leave it out, or give it such a metric, as acc, in a custom task"
        )


def _means(aggregations: dict[str, Any]) -> list[str]:
    """Return the metrics that are means over items; others, such as corpus BLEU or perplexity, have no score per item."""
    import numpy
    from lm_eval.api.metrics import mean, nanmean

    means = mean, nanmean, numpy.mean, numpy.nanmean, statistics.mean, statistics.fmean
    return [metric for metric, aggregation in aggregations.items() if aggregation in means]


def _set_shots(benchmark: str, tasks: dict[str, Any], shots: int | None) -> None:
    """Set the number of demonstrations, except of tasks whose file has 0: their prompt is fixed.

    Raises:
        DataError: all tasks of the benchmark are such, and shots are set.
    """
    defaults = {name: task.get_config("num_fewshot") for name, task in tasks.items()}
    if shots and all(default == 0 for default in defaults.values()):
        raise DataError(
            f"benchmarks.tasks: {benchmark!r} has a fixed prompt (num_fewshot: 0 in its file), so that shots: {shots} would "
            "change nothing; leave shots out, also in the config.yaml of a started run, which then scores the benchmark again"
        )
    for name, task in tasks.items():
        if defaults[name] is None or (shots is not None and defaults[name] != 0):
            task.set_config(key="num_fewshot", value=shots or 0)


def _check_demonstrations(task: Any, item: Any) -> None:
    """Check that an item's prompt can have the demonstrations of its task, before a model is scored on it.

    Raises:
        DataError: the task has too few of them, or takes none.
    """
    if not (shots := task.get_config("num_fewshot")):
        return
    try:
        task.fewshot_context(item, shots)
    except (AssertionError, ValueError) as error:
        raise DataError(
            f"benchmarks.tasks: {task.task_name} cannot have shots: {shots} ({error}); give fewer"
        ) from error


def _draw_by_item(task: Any) -> None:
    """Draw an item's demonstrations with a seed from the item."""
    context = task.fewshot_context

    def fewshot_context(doc: Any, *arguments: Any, **options: Any) -> Any:
        plain_data = json.loads(json.dumps(doc, default=str, sort_keys=True))
        task.set_fewshot_seed(int(hash_json(plain_data)[:8], 16))
        return context(doc, *arguments, **options)

    task.fewshot_context = fewshot_context


def _score(
    model: Any, tasks: dict[str, Any], items: list[tuple[str, int]], benchmark: str, chat_template: bool
) -> Iterator[Row]:
    from lm_eval.evaluator import evaluate

    items_by_task: dict[str, list[int]] = {}
    for name, item in items:
        items_by_task.setdefault(name, []).append(item)
    results = evaluate(
        model,
        {"tasks": {name: tasks[name] for name in tasks if name in items_by_task}, "groups": {}, "group_map": {}},
        samples=items_by_task,
        bootstrap_iters=0,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,  # as the harness's command line does
    )
    for name, samples in results["samples"].items():
        higher, aggregations = results["higher_is_better"][name], tasks[name].aggregation()
        means = _means(aggregations)
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if metric in aggregations and metric not in means:
                    continue
                if not isinstance(value, int | float) or not math.isfinite(value):
                    continue
                yield {
                    "benchmark": benchmark,
                    "task": name,
                    "item": sample["doc_id"],
                    "metric": metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}",
                    "score": float(value),
                    "higher_is_better": higher.get(metric) is not False,
                    "answer": "; ".join(map(str, sample["filtered_resps"]))[:_MAX_CHARACTERS],
                    "target": str(sample["target"])[:_MAX_CHARACTERS],
                }


def _text_of(task: Any, item: Any) -> str:
    """Return the question and the correct answer of an item, for the contamination check."""
    question, target = task.doc_to_text(item), task.doc_to_target(item)
    if isinstance(question, int):  # index of the correct question among several
        question = task.doc_to_choice(item)[question]
    if isinstance(target, int):
        choices = task.doc_to_choice(item) if task.config.doc_to_choice is not None else []
        target = choices[target] if 0 <= target < len(choices) else ""
    return f"{question}\n{target if isinstance(target, str) else ' '.join(map(str, target))}"


def _batches(rows: list[ItemRow], size: int) -> list[list[int]]:
    """Return the positions of the rows of each batch: the same, whichever batches were recorded before."""
    groups: dict[tuple[str, int | None], list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault((row["benchmark"], row["shots"]), []).append(position)
    return [
        positions[start : start + size] for positions in groups.values() for start in range(0, len(positions), size)
    ]

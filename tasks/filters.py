"""Filters with jobs: embeddings, a judge's scores, and code that runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from montessori_core import programs
from montessori_core.config import CodeRunsFilter, JudgeFilter, SemanticFilter
from montessori_core.data.rows import ExampleRow, TaskRow
from montessori_core.data.tables import CODE_RUNS, EMBEDDINGS, UTILITY, read_table
from montessori_core.program import Row
from montessori_core.synthesis.filtering import OpenFilter, OpenFilters
from montessori_core.synthesis.filters.filter import Candidate
from tasks.stage import Step


def embed_instructions(step: Step, filters: OpenFilters, instructions: Sequence[str], upstream: list[Path]) -> None:
    """Embed instructions, seeds and what must not be repeated, for each filter `semantic`; each text once.

    Args:
        step: that generated the instructions; embeddings are in folders beside its own.
        filters: they take the embeddings.
        instructions: of candidates.
        upstream: results that the instructions come from.
    """
    for number, opened in enumerate(filters.of_instructions):
        if not isinstance(opened.entry, SemanticFilter):
            continue
        texts = dict.fromkeys([*filters.seeds, *filters.accepted, *instructions])
        missing = [text for text in texts if (text, "") not in opened.measured]
        rows: list[TaskRow] = [
            {"example_id": f"t{place:06d}", "instruction": text, "response": ""} for place, text in enumerate(missing)
        ]
        if not rows:
            continue
        parts = step.beside(f"embeddings-{number}", ": embeddings").execute(
            programs.EMBEDDING,
            programs.Embedding(max_length=opened.entry.max_length),
            rows,
            step.experiment.synthesis.instructions_per_shard,
            models={"model": step.run.filter_model(opened.entry)},
            upstream=upstream,
        )
        vectors = read_table(parts, EMBEDDINGS)["vector"].to_pylist()
        opened.measured.update(
            ((text, ""), np.asarray(vector, np.float32)) for text, vector in zip(missing, vectors, strict=True)
        )


def filter_examples(
    step: Step, filters: OpenFilters, examples: Sequence[Row], upstream: list[Path]
) -> list[str | None]:
    """Return [examples] why each is rejected by the filters that read responses, in order; None if it passes.

    Args:
        step: that generated the responses; results of jobs are in folders beside its own.
        filters: the filters.
        examples: rows with `example_id`, `prompt_id`, `instruction` and `response`.
        upstream: results that the examples come from.
    """
    rejections: list[str | None] = [None] * len(examples)
    for number, opened in enumerate(filters.of_examples):
        places = [place for place, rejection in enumerate(rejections) if rejection is None]
        left = [examples[place] for place in places]
        if not left:
            break
        _measure(step.beside(f"{opened.filter.name}-{number}", f": {opened.filter.name}"), opened, left, upstream)
        for place, row in zip(places, left, strict=True):
            rejections[place] = opened.judge(Candidate(row["instruction"], response=row["response"]))
    return rejections


def _measure(step: Step, opened: OpenFilter, examples: Sequence[Row], upstream: list[Path]) -> None:
    """Run the jobs of a filter of examples, if it has any."""
    entry = opened.entry
    if isinstance(entry, JudgeFilter):
        judged: list[ExampleRow] = [
            {
                "example_id": row["example_id"],
                "prompt_id": row["prompt_id"],
                "instruction": row["instruction"],
                "response": row["response"],
                "response_finished": row["response_finished"],
            }
            for row in examples
        ]
        parts = step.ask("judge", programs.JUDGE, {"response_only": False}, judged, upstream)
        results = read_table(parts, UTILITY)["utility"].to_pylist()
    elif isinstance(entry, CodeRunsFilter):
        settings = programs.CodeRuns(
            seconds=entry.seconds, memory_mb=entry.memory_mb, need_isolation=entry.need_isolation
        )
        tasks: list[TaskRow] = [
            {"example_id": row["example_id"], "instruction": row["instruction"], "response": row["response"]}
            for row in examples
        ]
        size = step.experiment.synthesis.instructions_per_shard
        parts = step.execute(programs.CODE_RUNS, settings, tasks, size, upstream=upstream)
        results = read_table(parts, CODE_RUNS)["outcome"].to_pylist()
    else:
        return
    keys = [(row["instruction"], row["response"]) for row in examples]
    opened.measured.update(zip(keys, results, strict=True))

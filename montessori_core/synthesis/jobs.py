"""Generation on a node: the programs behind the two generation stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from montessori_core.api import Question, open_api
from montessori_core.chat import render_conversation, render_prompt
from montessori_core.config import Sampling
from montessori_core.models import load_tokenizer
from montessori_core.program import Compute, Report, Row
from montessori_core.schema import GENERATION, table_from_rows, write_table
from montessori_core.synthesis.generation import Form, Request, open_engine
from montessori_core.synthesis.prompts import CLOSE


def open_generation(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute:
    """Load the teacher once.

    Settings: `engine`, `sampling`, `form` (see `Form`). Inputs: `teacher`. Rows: `ids` (one per sample), `seeds`, and `text`;
    for a reply `turns` in its place: request, answer, and what the request's author says then.
    """
    sampling = Sampling.model_validate(settings["sampling"])
    model = str(inputs["teacher"])
    tokenizer = load_tokenizer(model)
    engine = open_engine(settings["engine"], model, tokenizer)
    form: Form = settings["form"]
    stop = CLOSE if form == "tagged" else None

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        texts = [_render(tokenizer, row, form) for row in rows]
        requests = [Request(text, tuple(row["seeds"])) for text, row in zip(texts, rows, strict=True)]
        continuations = engine.generate(requests, sampling, stop, report)
        records: list[Row] = [
            {
                "row_id": row_id,
                "prompt": request.prompt,
                "text": generated.text,
                "finish_reason": generated.finish_reason,
                "tokens": generated.tokens,
            }
            for row, request, samples in zip(rows, requests, continuations, strict=True)
            for row_id, generated in zip(row["ids"], samples, strict=True)
        ]
        write_table(table_from_rows(records, GENERATION), output, GENERATION)

    return compute


def _render(tokenizer: Any, row: Row, form: Form) -> str:
    if form == "reply":
        return render_conversation(tokenizer, *row["turns"])
    return render_prompt(tokenizer, row["text"]) if form == "request" else str(row["text"])


def open_api_generation(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Compute:
    """Open a teacher behind an API.

    Settings: `sampling` (without its repetition penalty, which the protocol does not have), and see `open_api`. Rows: as for
    `open_generation`, of which each seed is a draw.
    """
    sampling = Sampling.model_validate(settings["sampling"])
    api = open_api(settings, inputs)

    def compute(rows: list[Row], output: Path, report: Report) -> None:
        drawn = [(row, row_id, seed) for row in rows for row_id, seed in zip(row["ids"], row["seeds"], strict=True)]
        questions = [
            Question(
                row["text"], sampling.temperature, sampling.top_p, sampling.presence_penalty, sampling.max_tokens, seed
            )
            for row, _, seed in drawn
        ]
        answers = api.ask(questions, lambda done: report(done * len(rows) // len(drawn)))
        records: list[Row] = [
            {
                "row_id": row_id,
                "prompt": row["text"],
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": answer.output_tokens,
            }
            for (row, row_id, _), answer in zip(drawn, answers, strict=True)
        ]
        write_table(table_from_rows(records, GENERATION), output, GENERATION)

    return compute

"""Programs of the generation stages: local generation, and generation by an API."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.config import Vllm
from montessori_core.data.rows import GenerationRow
from montessori_core.data.tables import GENERATION
from montessori_core.judging.client import Question, open_client
from montessori_core.models.control_tokens import encode_rendered, hash_vocabulary, mark_control_tokens, split_generated
from montessori_core.models.load import load_tokenizer
from montessori_core.models.rendering import render_conversation, render_prompt, render_user_beginning, text_beginning
from montessori_core.program import Recorder, Row, RowProgram
from montessori_core.programs import Form
from montessori_core.synthesis.engine import Generated, Request, Step
from montessori_core.synthesis.generation import open_engine
from montessori_core.synthesis.nomad import ASSISTANT
from montessori_core.synthesis.prompts import CLOSE

_STOPS: dict[Form, str] = {"tagged": CLOSE, "user_line": ASSISTANT}
"""The text that ends what a teacher writes, besides its end tokens."""

_NO_ROOM = Generated("", 0, "length", [])
"""What a teacher writes if the prompt fills its positions."""


def open_generation(settings: programs.Generation, inputs: Mapping[str, Path]) -> RowProgram[GenerationRow]:
    """Load the teacher once.

    Inputs: `teacher`; `vllm`, a file with `config.Vllm`, optional.
    A row's draft has, for each sample, its token ids so far or its final text. A row whose prompt leaves no position for an
    output, as a conversation whose first answer did not end, has empty ones.
    """
    sampling, form = settings.sampling, settings.form
    model = str(inputs["teacher"])
    tokenizer = load_tokenizer(model)
    vocabulary = hash_vocabulary(tokenizer)
    gpus = Vllm.model_validate_json(inputs["vllm"].read_bytes()) if "vllm" in inputs else Vllm()
    engine = open_engine(settings.engine, model, tokenizer, gpus, settings.engine_options)
    stop = _STOPS.get(form)

    def compute(rows: list[GenerationRow], recorder: Recorder) -> None:
        prompts = [render_row(tokenizer, row, form) for row in rows]
        samples = [_resume(row, recorder.drafts.get(position)) for position, row in enumerate(rows)]

        def finish(position: int) -> None:
            prompt, texts = prompts[position], samples[position]
            outputs = [split_generated(tokenizer, text.text, text.token_ids or [], prompt) for text in texts]
            recorder.finish(position, _records(rows[position], prompt, texts, outputs, vocabulary))

        for position, prompt in enumerate(prompts):
            if engine.positions is not None and len(encode_rendered(tokenizer, prompt)[0]) >= engine.positions:
                samples[position] = [_NO_ROOM] * len(samples[position])
                finish(position)
        places = [
            (position, place)
            for position, row_samples in enumerate(samples)
            for place, sample in enumerate(row_samples)
            if not isinstance(sample, Generated)
        ]
        requests = [
            Request(prompts[position], rows[position]["seeds"][place], tuple(samples[position][place]))
            for position, place in places
        ]
        total = sum(map(len, samples))
        if not requests:
            recorder.progress(len(rows))

        def drafts(step: Step) -> dict[int, Any]:
            for index, tokens in step.drafts().items():
                position, place = places[index]
                samples[position][place] = tokens
            return {
                position: [asdict(sample) if isinstance(sample, Generated) else sample for sample in row_samples]
                for position, row_samples in enumerate(samples)
                if any(row_samples) and not _is_complete(row_samples)
            }

        for step in engine.generate(requests, sampling, stop):
            for index, generated in step.finished.items():
                position, place = places[index]
                samples[position][place] = generated
                if _is_complete(samples[position]):
                    finish(position)
            recorder.keep(partial(drafts, step))
            recorder.progress((total - len(requests) + step.done) * len(rows) / total)

    return RowProgram(GENERATION, compute)


def _resume(row: GenerationRow, draft: list[Any] | None) -> list[Any]:
    """Return [samples] the token ids so far, or the generated text, from a row's draft."""
    samples = draft or [[] for _ in row["seeds"]]
    return [Generated(**sample) if isinstance(sample, dict) else sample for sample in samples]


def _is_complete(samples: Sequence[Any]) -> bool:
    return all(isinstance(sample, Generated) for sample in samples)


def _records(
    row: GenerationRow,
    prompt: str,
    samples: Sequence[Generated],
    outputs: Sequence[tuple[str | None, str]],
    vocabulary: str | None = None,
) -> list[Row]:
    """Return a row's records; `outputs`: [samples] thinking and answer."""
    return [
        {
            "example_id": example_id,
            "prompt": prompt,
            "raw_output": answer,
            "thinking": thinking,
            "finish_reason": generated.finish_reason,
            "tokens": generated.tokens,
            "output_ids": generated.token_ids,
            "vocabulary": vocabulary,
        }
        for example_id, generated, (thinking, answer) in zip(row["example_ids"], samples, outputs, strict=True)
    ]


def render_row(tokenizer: Any, row: GenerationRow, form: Form) -> str:
    """Render the prompt of a row: of a chat, or a text to continue after the model's beginning token."""
    if form == "reply":
        return render_conversation(tokenizer, *row["turns"])
    [text] = row["turns"]
    if form == "user_turn":
        return render_user_beginning(tokenizer)
    if form == "request":
        return render_prompt(tokenizer, text)
    return text_beginning(tokenizer) + mark_control_tokens(tokenizer, text)


def open_api_generation(settings: programs.ApiGeneration, inputs: Mapping[str, Path]) -> RowProgram[GenerationRow]:
    """Open a teacher behind an API.

    The sampling's repetition penalty is ignored: the API has none. Inputs: see `open_client`. Each seed of a
    row is a draw. Rows need no drafts: the API's cache keeps every answer. A question that the server refuses has an empty
    output.
    """
    api = open_client(settings, inputs)

    def compute(rows: list[GenerationRow], recorder: Recorder) -> None:
        questions = [
            Question(row["turns"][0], draw=seed, **settings.sampling.model_dump(exclude={"repetition_penalty"}))
            for row in rows
            for seed in row["seeds"]
        ]
        answered = api.ask(
            questions,
            lambda done: recorder.progress(done * len(rows) / len(questions)),
            answered_before=recorder.finished_before * len(questions) // len(rows),
        )
        answers = iter(answered)
        for position, row in enumerate(rows):
            given = list(islice(answers, len(row["seeds"])))
            samples = [Generated(answer.text, answer.output_tokens, answer.finish_reason) for answer in given]
            outputs = [(answer.thinking, answer.text) for answer in given]
            recorder.finish(position, _records(row, row["turns"][0], samples, outputs))

    return RowProgram(GENERATION, compute)

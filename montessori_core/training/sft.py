"""Supervised fine-tuning of the student: warm-up and training (Section 4, Appendix A)."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.data.rows import TrainingRow
from montessori_core.errors import DataError
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.models.examples import encode_row
from montessori_core.models.load import check_tokenizer, load_model, load_tokenizer, with_lora
from montessori_core.models.positions import check_positions
from montessori_core.program import Compute, Report
from montessori_core.synthesis.nomad import encode_conversation
from montessori_core.training.checkpoints import CheckpointCallback, checkpoint_folder
from montessori_core.training.engine import (
    PlainAdamW,
    ProgressCallback,
    save_trained,
    start_processes,
    train,
    training_arguments,
)
from montessori_core.training.moments import gather_moments, save_moments
from montessori_core.training.padding import EvenSteps, padding_rows
from montessori_core.training.scoring import speed_up_scoring
from montessori_core.training.tracking import tracking_callbacks


def open_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute[TrainingRow]:
    """Train a student on the rows of its one shard; the result is a model folder, with AdamW's moments if requested.

    The input `student` has the initial weights.
    """
    recipe = settings.recipe

    def compute(rows: list[TrainingRow], output: Path, report: Report) -> None:
        start_processes()
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class StudentTrainer(PlainAdamW, EvenSteps, SFTTrainer):  # type: ignore[misc]
            pass

        StudentTrainer.recipe = recipe
        model_path = str(inputs["student"])
        checkpoints = checkpoint_folder(output, settings, model_path, rows)
        check_positions(Path(model_path), settings.max_length, "student.max_length")
        tokenizer = load_tokenizer(model_path)
        usable = _encode(tokenizer, rows, settings)
        examples = _within(settings.response_tokens, usable, recipe.batch_size)
        StudentTrainer.padding = padding_rows(len(examples), recipe)
        padded = examples + [_empty_example(tokenizer)] * StudentTrainer.padding
        data = Dataset.from_dict(
            {"input_ids": [example.input_ids for example in padded], "labels": [example.labels for example in padded]}
        )
        arguments = SFTConfig(  # before the model: ZeRO-3 partitions weights as they load
            **training_arguments(recipe, settings.zero, settings.seed, checkpoints),
            max_length=settings.max_length,
            packing=False,
        )
        progress = ProgressCallback(report, recipe)
        trainer = StudentTrainer(
            model=_load_student(model_path, tokenizer, settings),
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[progress, CheckpointCallback(), *tracking_callbacks(inputs, checkpoints)],
        )
        speed_up_scoring(trainer.model)
        train(trainer, Path(model_path), checkpoints)
        if settings.save_moments:
            moments = gather_moments(trainer.model_wrapped, trainer.state.global_step)
            if moments is not None:
                output.mkdir(parents=True, exist_ok=True)
                save_moments(moments, output, recipe)
            del moments  # twice the size of the weights, which are gathered next
        tokens = [example.response_tokens for example in examples]
        counts = {
            "examples": len(examples),
            "response_tokens": sum(tokens),
            "response_tokens_of_first_batch": sum(tokens[: recipe.batch_size]),
            "truncated": sum(example.truncated for example in examples),
            "left_out": len(rows) - len(usable),
            "beyond_response_tokens": len(usable) - len(examples),
        }
        save_trained(trainer, tokenizer, counts, checkpoints, output)

    return compute


def _encode(tokenizer: Any, rows: list[TrainingRow], settings: programs.Sft) -> list[Encoded]:
    """Tokenize the rows that have a response within the student's `max_length`."""

    def encode(number: int, row: TrainingRow) -> Encoded:
        if not settings.conversations:
            return encode_row(tokenizer, row, settings.max_length, f"training example {number}")
        texts = row["instruction"], row["response"]
        finished, masked = row["response_finished"], settings.mask_prompts
        return encode_conversation(tokenizer, *texts, settings.max_length, finished, masked)

    encoded = [encode(number, row) for number, row in enumerate(rows, 1)]
    usable = [example for example in encoded if example.response_tokens]
    if not usable:
        raise DataError("no training example has a response within student.max_length tokens; raise max_length")
    return usable


def _empty_example(tokenizer: Any) -> Encoded:
    """Return an example without loss, for padding.

    TRL drops rows without a label. The label of a first token carries no loss: no position predicts it.
    """
    end = tokenizer.eos_token_id
    return Encoded([end, end], [end, IGNORED], False)


def _within(response_tokens: int | None, examples: list[Encoded], batch_size: int) -> list[Encoded]:
    """Return the first examples within a number of response tokens; all if there is no limit."""
    if response_tokens is None:
        return examples
    totals = list(accumulate(example.response_tokens for example in examples))
    count, first_batch = bisect_right(totals, response_tokens), min(batch_size, len(examples))
    if count < first_batch:
        raise DataError(
            f"training.response_tokens is {response_tokens}, but the first batch of {first_batch} examples has "
            f"{totals[first_batch - 1]} response tokens; raise it"
        )
    return examples[:count]


def _load_student(model_path: str, tokenizer: Any, settings: programs.Sft) -> Any:
    import torch

    model = load_model(model_path, torch.float32)
    check_tokenizer(tokenizer, model)
    if settings.lora is None:
        return model
    torch.manual_seed(settings.seed)  # the adapter is initialised at random
    return with_lora(model, settings.lora)

"""The teacher update: direct preference optimization on the student's preferences (Section 3.3, Eq. 4)."""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.data.rows import PairRow
from montessori_core.errors import DataError
from montessori_core.models.adapters import is_adapter
from montessori_core.models.control_tokens import encode_plain, encode_rendered, hash_vocabulary
from montessori_core.models.load import load_model, load_tokenizer, lora_config
from montessori_core.models.rendering import end_of_turn
from montessori_core.program import Compute, Report
from montessori_core.training.checkpoints import CheckpointCallback, checkpoint_folder
from montessori_core.training.engine import (
    KeepCallback,
    PlainAdamW,
    ProgressCallback,
    save_trained,
    start_processes,
    train,
    training_arguments,
)
from montessori_core.training.padding import EvenPairs, padding_rows
from montessori_core.training.scoring import speed_up_scoring
from montessori_core.training.tracking import tracking_callbacks


def open_dpo(settings: programs.Dpo, inputs: Mapping[str, Path]) -> Compute[PairRow]:
    """Update a teacher on the preference pairs of its one shard; the result is a model folder.

    The input `teacher` has the initial weights, and is the reference. A new adapter is off for the reference; of an adapter
    that is trained further, TRL keeps a copy. Intermediate teachers are saved in the folder `kept` of the result.
    Prompt and outputs of a row are the exact texts of generation, so the likelihoods are those of generation.
    """
    recipe = settings.recipe

    def compute(rows: list[PairRow], output: Path, report: Report) -> None:
        start_processes()
        import torch
        from trl import DPOTrainer

        class TeacherTrainer(PlainAdamW, EvenPairs, DPOTrainer):  # type: ignore[misc]
            def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                return dataset  # tokenized below, as in generation: TRL would add special tokens

            def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                speed_up_scoring(self.model, pairs=True)
                return super()._precompute_ref_logps(dataset, *args, **kwargs)

            def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
                log_probabilities = super().compute_ref_log_probs(model, inputs)
                progress.on_read(len(log_probabilities[0]) * self.accelerator.num_processes)
                return log_probabilities

        TeacherTrainer.recipe = recipe
        model_path = str(inputs["teacher"])
        checkpoints = checkpoint_folder(output, settings, model_path, rows)
        tokenizer = load_tokenizer(model_path)
        pairs = _encode(tokenizer, rows, settings)
        TeacherTrainer.padding = padding_rows(len(pairs), recipe)
        pairs_and_padding = pairs + [_empty_pair(tokenizer)] * TeacherTrainer.padding
        progress = ProgressCallback(report, recipe, len(pairs_and_padding) if recipe.precomputes_reference else 0)
        arguments = _arguments(settings, checkpoints)  # before the model: ZeRO-3 partitions weights as they load
        teacher, adapter = load_model(model_path, torch.float32, recipe.quantization), None
        if recipe.lora is not None and not is_adapter(Path(model_path)):
            adapter = lora_config(teacher, recipe.lora, "teacher_update.lora")
        started = _adapter_weights(teacher)
        with shared_dataset(pairs_and_padding, output.parent) as data:
            trainer = TeacherTrainer(
                model=teacher,
                args=arguments,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[progress, CheckpointCallback(), *tracking_callbacks(inputs, checkpoints)],
                peft_config=adapter,
            )
            if recipe.quantization is not None:
                _restore_fp32(trainer.model, started)
            if not recipe.precomputes_reference:
                speed_up_scoring(trainer.model, pairs=True)
            trainer.add_callback(KeepCallback(trainer, tokenizer, settings.keep, checkpoints))
            train(trainer, Path(model_path), checkpoints)
        save_trained(trainer, tokenizer, {"pairs": len(pairs), "left_out": len(rows) - len(pairs)}, checkpoints, output)

    return compute


def _arguments(settings: programs.Dpo, checkpoints: Path) -> Any:
    """Return TRL's arguments of an update."""
    from trl import DPOConfig

    recipe = settings.recipe
    return DPOConfig(
        **training_arguments(recipe, settings.zero, settings.seed, checkpoints),
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
        max_length=recipe.max_length,
        precompute_ref_log_probs=recipe.precomputes_reference,  # no second teacher in memory
    )


def _adapter_weights(teacher: Any) -> dict[str, Any]:
    """Return copies of the weights of a teacher's adapter, by name; none if it has no adapter."""
    if not hasattr(teacher, "peft_config"):
        return {}
    return {name: weight.detach().clone() for name, weight in teacher.named_parameters() if weight.requires_grad}


def _restore_fp32(teacher: Any, weights: Mapping[str, Any]) -> None:
    """Make the adapter of a quantized teacher fp32 again, with these weights where it has them: TRL makes it bf16.

    A new adapter starts from random weights that bf16 has rounded.
    """
    for name, parameter in teacher.named_parameters():
        if parameter.requires_grad:
            parameter.data = weights.get(name, parameter.data).to(parameter.device).float()


def _encode(tokenizer: Any, rows: list[PairRow], settings: programs.Dpo) -> list[dict[str, list[int]]]:
    """Tokenize the pairs that fit into the teacher update's `max_length`."""
    limit = settings.recipe.max_length
    pairs = [encode_pair(tokenizer, row, settings.prompt_style) for row in rows]
    fitting = [pair for pair in pairs if pair_length(pair) <= limit]
    if not fitting:
        raise DataError(
            f"none of {len(pairs)} preference pairs fits into teacher_update.max_length={limit} tokens "
            f"(the shortest has {min(map(pair_length, pairs))}); raise it"
        )
    return fitting


def _empty_pair(tokenizer: Any) -> dict[str, list[int]]:
    """Return a pair without outputs, for padding."""
    end = tokenizer.eos_token_id
    return {"prompt_ids": [end, end], "chosen_ids": [], "rejected_ids": []}


@contextmanager
def shared_dataset(pairs: list[dict[str, list[int]]], folder: Path) -> Iterator[Any]:
    """Yield the pairs as a data set on the disk that all processes of the job share.

    TRL saves the reference log-probabilities next to the data set on rank 0; the other ranks read them there.
    """
    import torch.distributed
    from datasets import Dataset, load_from_disk

    # A unique name: a job that was reported as lost may still be running.
    name = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(name)
    path = folder / f".pairs-{name[0]}.tmp"
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        Dataset.from_list(pairs).save_to_disk(path)
    torch.distributed.barrier()
    try:
        yield load_from_disk(path)
    finally:
        if is_first:
            shutil.rmtree(path, ignore_errors=True)


def encode_pair(tokenizer: Any, row: Mapping[str, Any], style: str) -> dict[str, list[int]]:
    """Return the token ids of prompt, chosen and rejected output.

    The ids of an output are the generated ones (`chosen_output_ids`, `rejected_output_ids`) if they belong to this
    tokenizer's vocabulary. Otherwise its text is tokenized; in chat style the end of the turn is added, unless the output was
    truncated (`chosen_finished`, `rejected_finished`).
    """

    def ids_of(output: str) -> list[int]:
        if row.get(f"{output}_vocabulary") == hash_vocabulary(tokenizer):
            return list(row[f"{output}_output_ids"])
        ended = style == "chat" and row.get(f"{output}_finished", True)
        return encode_plain(tokenizer, row[output]) + ([end_of_turn(tokenizer)] if ended else [])

    return {
        "prompt_ids": encode_rendered(tokenizer, row["prompt"])[0],
        "chosen_ids": ids_of("chosen"),
        "rejected_ids": ids_of("rejected"),
    }


def pair_length(pair: Mapping[str, list[int]]) -> int:
    """Return the number of tokens of the longer sequence of an encoded pair."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))

"""Embed instructions for the filter `semantic`: the mean of a model's last hidden states, of norm 1."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from montessori_core import programs
from montessori_core.data.rows import TaskRow
from montessori_core.data.tables import EMBEDDINGS
from montessori_core.errors import UserError
from montessori_core.program import Recorder, RowProgram

_BATCH_TEXTS = 32
_UNUSED = ("pooler.", "position_ids")  # weights that the mean does not need, which files may lack


def open_embedding(settings: programs.Embedding, inputs: Mapping[str, Path]) -> RowProgram[TaskRow]:
    """Load the embedding model. Inputs: `model`. The result is a table of schema `EMBEDDINGS`.

    The mean over the tokens of a text, padding excluded, is that of sentence-transformers' mean pooling. A text is cut at
    `max_length` tokens, or at the tokenizer's limit if that is lower.

    Raises:
        UserError: the model cannot be loaded, or lacks weights.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from montessori_core.models.device import compute_device
    from montessori_core.models.load import describe_load_error

    folder, device = inputs["model"], compute_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # of a damaged file, and of a package that is not installed
        raise UserError(
            f"synthesis.filters: semantic: {folder} cannot be loaded ({describe_load_error(error)}); download the model "
            "again, or set another one"
        ) from error
    if missing := sorted(name for name in info["missing_keys"] if not any(part in name for part in _UNUSED)):
        raise UserError(
            f"synthesis.filters: semantic: {folder} lacks {len(missing)} weights, e.g. {missing[0]}; use a complete model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    model, max_length = model.to(device).eval(), min(settings.max_length, tokenizer.model_max_length)

    @torch.inference_mode()
    def embed(texts: list[str]) -> np.ndarray:
        """Return the [texts, features] embeddings."""
        batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt").to(device)
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        means = (states * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return np.asarray(torch.nn.functional.normalize(means, dim=1).cpu().numpy(), np.float32)

    def compute(rows: list[TaskRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for start in range(0, len(rows), _BATCH_TEXTS):
            batch = rows[start : start + _BATCH_TEXTS]
            # An empty text has no tokens; the mean would be zero over zero.
            vectors = embed([row["instruction"] or " " for row in batch])
            for position, (row, vector) in enumerate(zip(batch, vectors, strict=True), start):
                recorder.finish(position, [{"example_id": row["example_id"], "vector": vector.tolist()}])
            recorder.progress(start + len(batch))

    return RowProgram(EMBEDDINGS, compute)

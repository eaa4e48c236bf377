"""Embed instructions for the filter `semantic`."""

from collections.abc import Mapping
from pathlib import Path

from montessori_core import programs
from montessori_core.data.rows import TaskRow
from montessori_core.data.tables import EMBEDDINGS
from montessori_core.models.embeddings import Embedder
from montessori_core.program import Recorder, RowProgram


def open_embedding(settings: programs.Embedding, inputs: Mapping[str, Path]) -> RowProgram[TaskRow]:
    """Load the embedding model. Inputs: `model`. The result is a table of schema `EMBEDDINGS`.

    Raises:
        UserError: see `Embedder`.
    """
    model = Embedder(inputs["model"], settings.max_length, "synthesis.filters: semantic")

    def compute(rows: list[TaskRow], recorder: Recorder) -> None:
        recorder.progress(0)
        for start in range(0, len(rows), model.BATCH):
            batch = rows[start : start + model.BATCH]
            vectors = model.embed([row["instruction"] for row in batch])
            for position, (row, vector) in enumerate(zip(batch, vectors, strict=True), start):
                recorder.finish(position, [{"example_id": row["example_id"], "vector": vector.tolist()}])
            recorder.progress(start + len(batch))

    return RowProgram(EMBEDDINGS, compute)

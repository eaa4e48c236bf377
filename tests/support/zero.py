"""Trainings that check or disturb what DeepSpeed ZeRO does."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from montessori_core import programs
from montessori_core.program import Compute
from montessori_core.training import dpo, engine, scoring, sft


def _check_loading(module: Any) -> None:
    load = module.load_model

    def load_partitioned(*args: Any) -> Any:
        model = load(*args)
        assert all(hasattr(parameter, "ds_id") for parameter in model.parameters()), "weights are not partitioned"
        return model

    module.load_model = load_partitioned


def open_sft(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Train a student; fail if ZeRO-3 has not partitioned the weights when they are loaded."""
    _check_loading(sft)
    return sft.open_sft(settings, inputs)


def open_dpo(settings: programs.Dpo, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Update a teacher; fail if ZeRO-3 has not partitioned the weights when they are loaded."""
    _check_loading(dpo)
    return dpo.open_dpo(settings, inputs)


def open_sft_in_small_buckets(settings: programs.Sft, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Train a student most of whose gradients are larger than a bucket, as the embeddings of large models are."""
    engine.BUCKET = 1000
    return sft.open_sft(settings, inputs)


def open_dpo_with_failing_rank(settings: programs.Dpo, inputs: Mapping[str, Path]) -> Compute[Any]:
    """Update a teacher; the first pass over packed pairs fails in rank 1 alone, as where its GPU has too little memory."""
    score = scoring._score_packed

    def score_packed(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("rank 1 alone")
        return score(*args)

    scoring._score_packed = score_packed
    return dpo.open_dpo(settings, inputs)

"""Influence of any data on any student, without a run."""

import os
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from cluster.fanout import fan_out
from cluster.stage import Stage, cut_into_shards
from flows.cli.tables import print_influence
from montessori_core import programs
from montessori_core.atomic import hash_path
from montessori_core.config import Cluster, DataSource, Influence, Resources, Student, Warmup
from montessori_core.errors import ConfigError, DataError, UserError
from montessori_core.influence_table import join_influence
from montessori_core.models import fetch_model, fingerprint
from montessori_core.preferences import threshold_of
from montessori_core.program import Row
from montessori_core.schema import INFLUENCE, read_table, write_table
from montessori_core.screening import estimate_influence
from montessori_core.sources import read_tasks, write_tasks
from montessori_core.training.files import MOMENTS_FILE
from tasks.progress import ProgressBar

_SHARD = 16  # examples


def measure_influence(
    student: Student,
    warm_state: Path | None,
    examples: DataSource,
    reference: DataSource,
    influence: Influence,
    baseline: str,
    device: str,
    out: Path,
    console: Console,
) -> None:
    """Measure every example, write the table to `out`, and print a summary.

    Shards that were done before an interruption are kept in a folder beside `out`.

    Raises:
        UserError: an option, a file or the model cannot be used; the message names it.
    """
    choose_device(device)
    if influence.sequential is not None and baseline == "median":
        raise ConfigError(
            "--sequential decides signs one by one, but --baseline median has no threshold until all are known"
        )
    tasks = read_tasks(examples, "examples", with_response=True)
    if warm_state is not None and not (warm_state / MOMENTS_FILE).exists():
        raise DataError(f"--warm-state {warm_state}: no {MOMENTS_FILE} there; give the folder of a warmed-up student")
    model = fetch_model(student.model, student.revision)
    folder = out.with_name(out.name + ".parts").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    reference_file = folder / "reference.jsonl"
    write_tasks(read_tasks(reference, "reference", with_response=True), reference_file)

    inputs = {"reference": reference_file, "student": model}
    hashes = {"reference": hash_path(reference_file), "student": fingerprint(model)}
    if warm_state is not None:
        inputs["moments"], hashes["moments"] = warm_state.resolve(), hash_path(warm_state / MOMENTS_FILE)
    rows: list[Row] = [
        {"example_id": t.id, "prompt_id": t.id, "instruction": t.text, "response": t.response, "finished": True}
        for t in tasks
    ]

    def measure(name: str, estimator: str, some: list[Row]) -> pa.RecordBatchReader:
        settings = programs.measurement_settings(influence, Warmup(), student.max_length, estimator, baseline)
        stage = Stage.of(programs.INFLUENCE, settings, folder / name, inputs, hashes)
        with ProgressBar(f"influence, {name}") as bar:
            parts = fan_out(stage, cut_into_shards(some, _SHARD), Resources(), Cluster(), bar.show)
        return join_influence(parts)

    write_table(estimate_influence(rows, measure, influence, baseline), out, INFLUENCE)
    table = read_table(out, INFLUENCE)
    print_influence(table, threshold_of(table, baseline), baseline, console)
    console.print(f"table: {out}", soft_wrap=True)


def choose_device(device: str) -> None:
    """Let the jobs see the devices they may use, and no others."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and kind != "cuda"):
        raise ConfigError(f"--device: {device!r} is none of auto, cpu, cuda, cuda:N")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--device {device}: PyTorch sees no such GPU here; use --device cpu, or install its CUDA build"
            )
    if kind == "cpu" or number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number

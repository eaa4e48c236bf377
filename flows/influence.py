"""Influence of any data on any student, without a run: `montessori influence`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.fanout import fan_out
from cluster.stage import Stage, cut_into_shards
from montessori_core import programs
from montessori_core.atomic import hash_path
from montessori_core.config import Cluster, DataSource, Influence, Preferences, Resources, Student, Warmup
from montessori_core.errors import ConfigError, DataError, UserError
from montessori_core.influence_table import domination_warning, join_influence, summarize_influence
from montessori_core.models import fetch_model, fingerprint
from montessori_core.preferences import threshold_of
from montessori_core.program import Row
from montessori_core.schema import INFLUENCE, read_table, write_table
from montessori_core.screening import estimate_influence, screening_report
from montessori_core.sources import read_tasks, write_tasks
from montessori_core.training.files import MOMENTS_FILE
from tasks.progress import ProgressBar

_SHARD = 16  # examples
_BLOCKS = " ▁▂▃▄▅▆▇█"


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
    _choose_device(device)
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
    _summarize(table, threshold_of(table, baseline), baseline, console)
    console.print(f"table: {out}", soft_wrap=True)


def parse_options(options: dict[str, Any]) -> Influence:
    """The settings of a measurement from command-line options.

    Raises:
        ConfigError: an option does not fit; it is named.
    """
    try:
        return Influence.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        place = [str(part) for part in problem["loc"]]
        name = {"screening": place[-1:], "sequential": place[:1]}.get(place[0], place) if place else ["estimator"]
        raise ConfigError(f"--{name[0].replace('_', '-')}: {problem['msg']}") from error


def check_baseline(baseline: str) -> str:
    """The same baseline.

    Raises:
        ConfigError: there is none of that name, or each example would be compared with itself.
    """
    if baseline == "prompt":
        raise ConfigError("--baseline prompt: these examples have no prompts in common; take median")
    try:
        return Preferences.model_validate({"baseline": baseline}).baseline
    except ValidationError as error:
        raise ConfigError(f"--baseline: {error.errors()[0]['msg']}") from error


def _choose_device(device: str) -> None:
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


def _summarize(table: pa.Table, threshold: float, baseline: str, console: Console) -> None:
    summary = summarize_influence(table, threshold)
    values = table["influence_student"].drop_null().to_numpy()
    lines = Table(show_header=False)
    lines.add_row("examples measured", f"{summary['measured']} of {summary['examples']}")
    for status in ("no_response_tokens", "non_finite"):
        left_out = table["example_id"].filter(pc.equal(table["status"], status)).to_pylist()
        if left_out:
            more = ", ..." if len(left_out) > 3 else ""
            lines.add_row(f"left out: {status.replace('_', ' ')}", f"{len(left_out)} ({', '.join(left_out[:3])}{more})")
    truncated = pc.sum(table["truncated"]).as_py()
    if truncated:
        lines.add_row("cut at --max-length", str(truncated))
    lines.add_row("student's reference loss", f"{summary['student_loss']:.4f} nats/token")
    if len(values):
        low, median, high = np.percentile(values, [5, 50, 95])
        lines.add_row("influence, 5 % - median - 95 %", f"{low:.3g}  {median:.3g}  {high:.3g} nats/token")
        lines.add_row("distribution", _sparkline(values))
        lines.add_row(f"share that helps (baseline: {baseline})", f"{summary['share_positive']:.0%}")
    lines.add_row("influence of momentum alone", f"{summary['null_step_influence']:.3g} nats/token")
    lines.add_row("noise floor", f"{summary['noise_floor']:.3g} nats/token")
    lines.add_row("standard error over the reference examples", f"{summary['standard_error']:.3g} nats/token")
    lines.add_row("gradient norm, median", f"{summary['median_gradient_norm']:.3g}")
    lines.add_row(
        "dominated by the own gradient, median", f"{summary['median_dominated_share']:.0%} of the coordinates"
    )
    screening = screening_report(table)
    if screening is not None:
        lines.add_row("measured exactly", f"{screening.audited} to audit, {screening.confirmed} in doubt")
        lines.add_row("first order against exact", f"{screening.first_order}, Spearman {screening.spearman:.3f}")
        lines.add_row("common error, corrected", f"{screening.offset:.3g} nats/token")
        lines.add_row("after correction and confirmation", str(screening.screened))
        if screening.fell_back:
            lines.add_row("", "first order was unfit here: every example was measured exactly")
    read = pc.sum(table["reference_tokens"]).as_py()
    whole = summary["reference_tokens"] * pc.sum(pc.equal(table["estimator"], "exact")).as_py()
    if 0 < read < whole:
        lines.add_row("reference tokens saved", f"{1 - read / whole:.0%}")
    console.print(lines)
    warning = domination_warning(summary)
    if warning:
        console.print(f"[yellow]warning:[/yellow] {warning}", soft_wrap=True)


def _sparkline(values: Any) -> str:
    counts, edges = np.histogram(values, bins=24)
    bars = "".join(_BLOCKS[int(np.ceil(count / counts.max() * (len(_BLOCKS) - 1)))] for count in counts)
    return f"{edges[0]:.2g} {bars} {edges[-1]:.2g}"

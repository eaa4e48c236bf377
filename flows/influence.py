"""Influence of any data on any student, without a run: `montessori influence`."""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.fanout import fan_out
from cluster.stage import Stage
from montessori_core.atomic import hash_path
from montessori_core.config import Cluster, DataSource, Influence, Resources, Student, Warmup
from montessori_core.errors import ConfigError, DataError
from montessori_core.influence_table import join_influence, summarize_influence
from montessori_core.models import fingerprint, local_path
from montessori_core.program import Row
from montessori_core.schema import INFLUENCE, read_table, write_table
from montessori_core.sources import read_tasks, write_tasks
from montessori_core.training.files import MOMENTS_FILE
from tasks.progress import ProgressBar

_SHARD = 16  # examples: what an interruption can cost


def measure_influence(
    student: str,
    max_length: int,
    warm_state: Path | None,
    examples: Path,
    reference: str,
    settings: dict[str, Any],
    out: Path,
    console: Console,
) -> None:
    """Measure every example, write the table to `out`, and print a summary.

    Shards that were done before an interruption are kept in a folder beside `out`.

    Raises:
        UserError: an option, a file or the model cannot be used; the message names it.
    """
    try:
        influence = Influence.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg']}") from error
    tasks = read_tasks(DataSource(path=str(examples)), "examples", with_response=True)
    if warm_state is not None and not (warm_state / MOMENTS_FILE).exists():
        raise DataError(f"--warm-state {warm_state}: no {MOMENTS_FILE} there; give the folder of a warmed-up student")
    folder = out.with_name(out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    reference_file = folder / "reference.jsonl"
    write_tasks(read_tasks(DataSource(path=reference), "reference", with_response=True), reference_file)

    rows: list[Row] = [
        {"example_id": t.id, "prompt_id": t.id, "instruction": t.text, "response": t.response, "finished": True}
        for t in tasks
    ]
    path = Path(local_path(student))
    folders = {"student": path} if path.is_dir() else {}
    folders |= {"moments": warm_state.resolve()} if warm_state is not None else {}
    stage = Stage(
        name="influence",
        version=1,
        program="montessori_core.influence.jobs:open_influence",
        settings={
            "student": Student(model=student, max_length=max_length).model_dump(mode="json"),
            "influence": influence.model_dump(mode="json"),
            "warmup": Warmup().model_dump(mode="json"),
        },
        inputs={**folders, "reference": reference_file.resolve()},
        input_hashes={
            "student": fingerprint(student),
            "reference": hash_path(reference_file),
            **({"moments": hash_path(warm_state / MOMENTS_FILE)} if warm_state is not None else {}),
        },
        folder=folder.resolve(),
    )
    with ProgressBar("influence") as bar:
        shards = [rows[start : start + _SHARD] for start in range(0, len(rows), _SHARD)]
        parts = fan_out(stage, shards, Resources(), Cluster(), bar.show)
    table = join_influence([read_table(part, INFLUENCE) for part in parts])
    write_table(table, out, INFLUENCE)

    summary = summarize_influence(table, threshold=0.0)
    values = table["influence_student"].drop_null().to_numpy()
    lines = Table(show_header=False)
    lines.add_row("examples measured", f"{summary['measured']} of {summary['examples']}")
    lines.add_row("student's reference loss", f"{summary['student_loss']:.4f} nats/token")
    if len(values):
        low, median, high = np.percentile(values, [5, 50, 95])
        lines.add_row("influence, 5 % - median - 95 %", f"{low:.3g}  {median:.3g}  {high:.3g} nats/token")
        lines.add_row("share that helps", f"{summary['share_positive']:.0%}")
    lines.add_row("noise floor", f"{summary['noise_floor']:.3g} nats/token")
    console.print(lines)
    console.print(f"table: {out}", soft_wrap=True)

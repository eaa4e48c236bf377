"""Collect the numbers of an iteration from its tables and logs into `metrics.json`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from cluster.usage import use_of
from montessori_core import layout
from montessori_core.data.tables import INFLUENCE, INSTRUCTIONS, PREFERENCES, read_table
from montessori_core.files import read_json, write_json
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.table import summarize_influence
from montessori_core.program import Row
from montessori_core.synthesis.filtering import funnel
from tasks.evaluation import summarize_gain, summarize_loss
from tasks.run import Run
from tasks.synthesis import SynthesisResult


@dataclass(frozen=True)
class IterationFiles:
    """Result tables of an iteration; `losses` are held-out loss tables by model."""

    probing: SynthesisResult
    influence: Path
    preferences: Path
    training: SynthesisResult
    training_influence: Path | None
    losses: dict[str, Path]


@dataclass(frozen=True)
class IterationBenchmarks:
    """Benchmark results of an iteration.

    Attributes:
        scores: benchmark scores by model.
        head_to_head: comparisons of the student with other models.
        contamination: overlap of each training set with the evaluation set and benchmarks.
    """

    scores: dict[str, list[Row]]
    head_to_head: list[Row]
    contamination: list[Row]


@task(task_run_name="iteration {number}: metrics", cache_policy=NO_CACHE)
def write_metrics(
    run: Run, number: int, files: IterationFiles, checkpoints: list[Row], benchmarked: IterationBenchmarks
) -> Path:
    """Write `metrics.json` of an iteration; `checkpoints` has a row per evaluated teacher checkpoint."""
    folder = run.iteration(number)
    unmodified = run.folder / layout.UNMODIFIED
    pairs = read_table(files.preferences, PREFERENCES, ["prompt_id"])
    influence = read_table(files.influence, INFLUENCE)
    threshold = threshold_of(influence, run.experiment.preferences.baseline)
    used, unused = _usage(run, number)
    content: dict[str, Any] = {
        "iteration": number,
        "synthesis": {
            "probing": funnel(read_table(files.probing.instructions, INSTRUCTIONS)),
            "training": funnel(read_table(files.training.instructions, INSTRUCTIONS)),
        },
        "influence": {"probing": summarize_influence(influence, threshold)},
        "preferences": {"pairs": pairs.num_rows, "prompts": len(set(pairs["prompt_id"].to_pylist()))},
        "training_counts": _read_from_models(run, number, layout.COUNTS_FILE),
        "held_out_loss": {name: summarize_loss(table) for name, table in files.losses.items()},
        "held_out_gain": {
            f"student_over_{name}": summarize_gain(table, files.losses["student"])
            for name, table in files.losses.items()
            if name != "student"
        },
        "teacher_checkpoints": checkpoints,
        "scores": [{"model": name, **score} for name, scores in benchmarked.scores.items() for score in scores],
        "head_to_head": benchmarked.head_to_head,
        "contamination": benchmarked.contamination,
        "training_logs": _read_from_models(run, number, layout.LOG_FILE),
        "job_seconds": {stage["stage"]: stage["seconds"] for stage in used},
        "stages": used,
        "unused_stages": unused,
    }
    if files.training_influence is not None:
        content["influence"]["training"] = summarize_influence(
            read_table(files.training_influence, INFLUENCE), threshold
        )
    if "unmodified" in files.losses:
        content["synthesis"]["unmodified"] = funnel(
            read_table(unmodified / "training" / layout.INSTRUCTIONS, INSTRUCTIONS)
        )
    path = folder / layout.METRICS
    (run.folder / layout.REPORT).unlink(missing_ok=True)  # it shows earlier iterations alone
    write_json(content, path)
    return path


def _usage(run: Run, number: int) -> tuple[list[Row], list[Row]]:
    """Return the usage of the stages of an iteration and of the whole run: of those that it has, and of earlier settings."""
    run_stages = (
        run.folder / layout.UNMODIFIED,
        *run.folder.glob(f"{layout.UNTRAINED}*"),
        run.folder / "benchmark-items",
    )
    executed = set(run.stages)
    used: list[Row] = []
    unused: list[Row] = []
    for parent in (run.iteration(number), *sorted(run_stages)):
        for folder in sorted(stage.parent for stage in parent.rglob("stage.json")):
            usage = use_of(folder)
            row = {"stage": str(folder.relative_to(run.folder)), **asdict(usage), "seconds": round(usage.seconds, 1)}
            (used if folder in executed else unused).append(row)
    return used, unused


def _read_from_models(run: Run, number: int, name: str) -> dict[str, Any]:
    """Read a JSON file from each model folder that the iteration trained, by training."""
    folder = run.iteration(number)
    stages = {training: folder / training for training in ("warmup", "teacher", "student")}
    if number == 1:
        stages["unmodified"] = run.folder / layout.UNMODIFIED / "student"
    contents = {training: read_json(stage / "part-00000" / name) for training, stage in stages.items()}
    return {training: content for training, content in contents.items() if content is not None}

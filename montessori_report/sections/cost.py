"""What a run cost: time per stage and example (Table 7), operations (Table 8), and use of the cluster."""

from collections.abc import Sequence
from typing import Any

from montessori_core import formatting
from montessori_report.figures import Figure, bar_figure
from montessori_report.html import Block, Section, Table
from montessori_report.run_data import RunData

OPERATIONS = (
    "Two operations for each weight and token forward, twice as many backward. The paper's totals are about 110 times "
    "higher for the same work: Appendix E.3 charges a pass over 128 tokens for every token."
)
TABLE_7 = (
    "The 13.4 s (8B) and 3.5 s (1.1B) that Table 7 gives for the influence of an example are the wall time of 8 H100s "
    "together, 107 and 28 GPU-seconds."
)


def cost_section(run: RunData) -> Section:
    """Times, operations and use of the cluster, by the folder of the stage."""
    seconds = {stage: value for stage, value in run.job_seconds.items() if formatting.is_finite(value)}
    blocks = []
    if seconds:
        figures = [time_figure(seconds)]
        tables = []
        if run.stages:
            figures += _stage_figures(run.stages)
            tables.append(_stage_table(run.stages))
        else:
            rows = [[stage, formatting.duration(value)] for stage, value in sorted(seconds.items())]
            rows.append(["all stages", formatting.duration(sum(seconds.values()))])
            tables.append(Table("Job seconds by the folder of the stage", ["Stage", "Time"], rows))
        blocks.append(Block(figures, tables))
    return Section("cost", "Cost", blocks, absent="Times are recorded when an iteration ends.")


def time_figure(seconds: dict[str, float]) -> Figure:
    """Job seconds by stage, longest first."""
    return bar_figure(
        "Seconds of jobs by stage",
        "Each bar adds up the seconds of all of a stage's shards that ended well, so parallel shards count together; the "
        "longest stages come first.",
        "seconds",
        _longest_first(seconds),
        formatting.duration,
    )


def _stage_figures(stages: Sequence[dict[str, Any]]) -> list[Figure]:
    paces = _longest_first({one["stage"]: one["seconds"] / one["rows"] for one in stages if one["rows"]})
    operations = _longest_first({one["stage"]: float(one["flops"]) for one in stages if one["flops"]})
    hours = _longest_first({one["stage"]: gpu_hours(one) for one in stages if one["gpus"]})
    figures = []
    if paces:
        figures.append(
            bar_figure(
                "Seconds per example by stage (Table 7)",
                "What one row costs on one job: an example generated, measured, trained on or evaluated. Loading the model "
                f"is counted, so stages of few rows look dear. {TABLE_7}",
                "seconds per row",
                paces,
                lambda pace: f"{formatting.significant(pace)} s",
            )
        )
    if operations:
        figures.append(
            bar_figure(
                "Floating-point operations by stage (Table 8)",
                f"{OPERATIONS} Models behind an API do theirs elsewhere.",
                "operations",
                operations,
                formatting.significant,
            )
        )
    if hours:
        figures.append(
            bar_figure(
                "GPU-hours by stage",
                "Hours of jobs times the GPUs that each held, busy or not; most is to be saved at the longest bar.",
                "GPU-hours",
                hours,
                lambda number: f"{formatting.significant(number)} h",
            )
        )
    return figures


def _stage_table(stages: Sequence[dict[str, Any]]) -> Table:
    on_gpus = any(one["gpus"] for one in stages)
    rows = [
        [
            one["stage"],
            *(formatting.count(one[key]) for key in ("shards", "rows", "jobs", "retries", "preemptions")),
            formatting.duration(one["seconds"]),
            f"{formatting.significant(one['seconds'] / one['rows'])}\u00a0s" if one["rows"] else formatting.UNKNOWN,
            formatting.significant(gpu_hours(one) if on_gpus else job_hours(one)),
            formatting.significant(float(one["flops"])),
        ]
        for one in stages
    ]
    total = [
        "all stages",
        *(
            formatting.count(sum(one[key] for one in stages))
            for key in ("shards", "rows", "jobs", "retries", "preemptions")
        ),
        formatting.duration(sum(one["seconds"] for one in stages)),
        "",
        formatting.significant(sum(gpu_hours(one) if on_gpus else job_hours(one) for one in stages)),
        formatting.significant(float(sum(one["flops"] for one in stages))),
    ]
    columns = [
        "Stage",
        "Shards",
        "Rows",
        "Jobs",
        "Retries",
        "Preemptions",
        "Job time",
        "Per row",
        "GPU-hours" if on_gpus else "Job-hours",
        "Operations",
    ]
    return Table("Use of the cluster by the folder of the stage", columns, [*rows, total])


def gpu_hours(stage: dict[str, Any]) -> float:
    """Hours of a stage's jobs times the GPUs that each held."""
    return float(stage["seconds"] * stage["gpus"] / 3600)


def job_hours(stage: dict[str, Any]) -> float:
    """Hours of a stage's jobs."""
    return float(stage["seconds"] / 3600)


def _longest_first(bars: dict[str, float]) -> dict[str, float]:
    return dict(sorted(bars.items(), key=lambda item: (-item[1], item[0])))

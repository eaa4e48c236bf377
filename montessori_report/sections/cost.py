"""Cost of a run: time per stage and example (Table 7), operations (Table 8), cluster usage."""

from collections.abc import Callable, Sequence
from typing import Any

from montessori_core.formatting import UNKNOWN, count, duration, is_finite, significant
from montessori_report.figures import Figure, bar_figure
from montessori_report.html import Block, Section, Table
from montessori_report.run_data import RunData

OPERATIONS = (
    "Two operations per weight and token in the forward pass, four in the backward pass. The paper's totals are about 110 "
    "times higher for the same work: Appendix E.3 counts a pass over 128 tokens for every token."
)
TABLE_7 = (
    "Table 7 reports 13.4 s (8B) and 3.5 s (1.1B) for the influence of an example: wall time on 8 H100s, that is 107 and 28 "
    "GPU-seconds."
)
_COUNTS = ("shards", "rows", "jobs", "retries", "interruptions")


def cost_section(run: RunData) -> Section:
    """Return the section of times, operations and cluster usage by stage."""
    seconds = {stage: value for stage, value in run.job_seconds.items() if is_finite(value)}
    blocks = []
    if seconds:
        figures = [time_figure(seconds)]
        tables = []
        if run.stages:
            figures += _stage_figures(run.stages)
            tables.append(_stage_table(run.stages, run.unused_stages))
        else:
            rows = [[stage, duration(value)] for stage, value in sorted(seconds.items())]
            rows.append(["all stages", duration(sum(seconds.values()))])
            tables.append(Table("Job seconds by stage folder", ["Stage", "Time"], rows))
        blocks.append(Block(figures, tables))
    return Section("cost", "Cost", blocks, absent="No iteration has finished yet; times are recorded at its end.")


def time_figure(seconds: dict[str, float]) -> Figure:
    """Draw job seconds by stage, longest first."""
    return bar_figure(
        "Seconds of jobs by stage",
        "Each bar is the sum of the seconds of all completed shards of a stage, including parallel ones. The longest stages "
        "come first.",
        "seconds",
        _longest_first(seconds),
        duration,
    )


def _stage_figures(stages: Sequence[dict[str, Any]]) -> list[Figure]:
    kinds: list[tuple[str, str, str, dict[str, float], Callable[[float], str]]] = [
        (
            "Seconds per example by stage (Table 7)",
            "Job time per row: per example generated, measured, trained on or evaluated. It includes loading the model, so "
            f"stages with few rows look expensive. {TABLE_7}",
            "seconds per row",
            {stage["stage"]: stage["seconds"] / stage["rows"] for stage in stages if stage["rows"]},
            lambda seconds: f"{significant(seconds)} s",
        ),
        (
            "Floating-point operations by stage (Table 8)",
            f"{OPERATIONS} Models behind an API are not counted.",
            "operations",
            {stage["stage"]: float(stage["flops"]) for stage in stages if stage["flops"]},
            significant,
        ),
        (
            "GPU-hours by stage",
            "Job hours times GPUs per job, busy or idle. The longest bar has the largest potential saving.",
            "GPU-hours",
            {stage["stage"]: gpu_hours(stage) for stage in stages if stage["gpus"]},
            lambda hours: f"{significant(hours)} h",
        ),
    ]
    return [
        bar_figure(title, reading, axis, _longest_first(bars), text_of)
        for title, reading, axis, bars, text_of in kinds
        if bars
    ]


def _stage_table(stages: Sequence[dict[str, Any]], unused: Sequence[dict[str, Any]]) -> Table:
    kind, hours = ("GPU-hours", gpu_hours) if any(stage["gpus"] for stage in stages) else ("Job-hours", job_hours)

    def row(name: str, members: Sequence[dict[str, Any]], pace: str) -> list[str]:
        return [
            name,
            *(count(sum(stage[key] for stage in members)) for key in _COUNTS),
            duration(sum(stage["seconds"] for stage in members)),
            pace,
            significant(sum(map(hours, members))),
            significant(float(sum(stage["flops"] for stage in members))),
        ]

    def pace_of(stage: dict[str, Any]) -> str:
        return f"{significant(stage['seconds'] / stage['rows'])}\u00a0s" if stage["rows"] else UNKNOWN

    rows = [row(stage["stage"], [stage], pace_of(stage)) for stage in stages]
    columns = ["Stage", *map(str.capitalize, _COUNTS), "Job time", "Per row", kind, "Operations"]
    rows.append(row("all stages", stages, ""))
    if unused:
        rows.append(row("of earlier settings", unused, ""))
        rows.append(row("spent in all", [*stages, *unused], ""))
    return Table("Cluster usage by stage folder", columns, rows)


def gpu_hours(stage: dict[str, Any]) -> float:
    """Return the job hours of a stage times the GPUs per job."""
    return float(stage["seconds"] * stage["gpus"] / 3600)


def job_hours(stage: dict[str, Any]) -> float:
    """Return the job hours of a stage."""
    return float(stage["seconds"] / 3600)


def _longest_first(bars: dict[str, float]) -> dict[str, float]:
    return dict(sorted(bars.items(), key=lambda item: (-item[1], item[0])))

"""The page that compares runs: held-out losses, benchmarks, influence, cost and settings."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from montessori_core import formatting
from montessori_core.config import differences
from montessori_core.formatting import UNKNOWN, Unit
from montessori_report.figures import Dot, Sample, bar_figure, colour_of, finite_dots
from montessori_report.html import Block, Page, Section, Table, build_page
from montessori_report.run_data import InfluenceData, IterationData, RunData, read_run_data
from montessori_report.sections.benchmarks import (
    MODELS,
    gain_figure,
    head_to_head_figure,
    loss_figure,
    score_figures,
    score_table,
    scores_of,
)
from montessori_report.sections.cost import OPERATIONS, gpu_hours, job_hours
from montessori_report.sections.influence import distribution_figure, influence_unit
from montessori_report.sections.overview import THRESHOLDS, judge

_NOT_COUNTED = "Stages that its configuration does not have any more do not count; its own report has them."
_IGNORED_SETTINGS = ("name",)  # not part of the comparison of configurations


def render_runs(folders: Sequence[Path]) -> Page:
    """Return the page that compares runs, finished or not.

    Raises:
        DataError: a table cannot be read.
    """
    runs = _with_unique_names([read_run_data(folder) for folder in folders], folders)
    unit = influence_unit(runs)
    sections = [
        Section("overview", "Overview", [Block([], [_overview(runs)])]),
        _held_out(runs),
        _benchmarks(runs),
        _influence(runs, unit),
        _cost(runs),
        _configuration(runs),
    ]
    title = " · ".join(run.name for run in runs)
    return build_page("Montessori comparison of runs", title, [("Runs", formatting.count(len(runs)))], sections)


def _with_unique_names(runs: Sequence[RunData], folders: Sequence[Path]) -> list[RunData]:
    """Use folder names where run names are not unique."""
    candidates = [[run.name for run in runs], [folder.name for folder in folders], [str(folder) for folder in folders]]
    names = next((names for names in candidates if len(set(names)) == len(runs)), candidates[-1])
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _overview(runs: Sequence[RunData]) -> Table:
    rows = [
        ["verdict", *(judge(run).headline for run in runs)],
        ["teacher", *(str(run.setting("teacher", "model", UNKNOWN)) for run in runs)],
        ["student", *(str(run.setting("student", "model", UNKNOWN)) for run in runs)],
        ["iterations finished", *(f"{_finished(run)} of {run.planned}" for run in runs)],
        ["helpful means better than", *(THRESHOLDS.get(run.baseline, run.baseline) for run in runs)],
        ["preference pairs", *map(_pairs, runs)],
        ["probing examples measured", *map(_measured, runs)],
        ["share that helps, first probing set", *(_share(_first_probing_set(run)) for run in runs)],
        ["share that helps, last training set", *(_share(_last_training_set(run)) for run in runs)],
    ]
    return Table("Key numbers side by side", ["", *(run.name for run in runs)], rows)


def _finished(run: RunData) -> int:
    return sum(iteration.metrics is not None for iteration in run.iterations)


def _pairs(run: RunData) -> str:
    tables = [part.preferences for part in run.iterations if part.preferences is not None]
    return formatting.count(sum(table.num_rows for table in tables)) if tables else UNKNOWN


def _measured(run: RunData) -> str:
    sets = [part.influence for part in run.iterations if part.influence is not None]
    return formatting.count(sum(len(part.values) for part in sets)) if sets else UNKNOWN


def _share(part: InfluenceData | None) -> str:
    return formatting.share(part.summary["share_positive"]) if part else UNKNOWN


def _first_probing_set(run: RunData) -> InfluenceData | None:
    return next((part.influence for part in run.iterations if part.influence), None)


def _last_training_set(run: RunData) -> InfluenceData | None:
    return next((part.training_influence for part in reversed(run.iterations) if part.training_influence), None)


def _held_out(runs: Sequence[RunData]) -> Section:
    entries, gains = [], []
    for number, run in enumerate(runs):
        colour = colour_of(number)
        losses = run.first_held_out_loss
        entries += [
            (f"{run.name}: {MODELS[name]}", losses[name], colour)
            for name in ("untrained", "unmodified")
            if name in losses
        ]
        for iteration in run.iterations:
            if "student" in iteration.held_out_loss:
                label = f"{_run_label(run, iteration)}: {MODELS['student']}"
                entries.append((label, iteration.held_out_loss["student"], colour))
            gains += [
                (f"{_run_label(run, iteration)}: over the {MODELS[name]}", gain, colour)
                for name in ("unmodified", "untrained")
                if (gain := iteration.held_out_gain.get(f"student_over_{name}"))
            ]
    loss_dots, gain_dots = finite_dots(entries), finite_dots(gains)
    figures = [loss_figure(loss_dots)] if loss_dots else []
    figures += [gain_figure(gain_dots)] if gain_dots else []
    rows = [["Loss: " + dot.label, formatting.loss(dot.mean), _interval(dot)] for dot in loss_dots]
    rows += [["Gain: " + dot.label, formatting.signed(dot.mean), _interval(dot)] for dot in gain_dots]
    table = Table("Held-out losses and paired gains, nats per token", ["", "Mean", "95 % interval"], rows)
    return Section(
        "held-out",
        "Held-out loss",
        [Block(figures, [table])] if figures else [],
        introduction="Compare losses of different runs only if they were evaluated on the same examples. Gains compare each "
        "student with others of the same run.",
        absent="No student of these runs has been evaluated yet.",
    )


def _run_label(run: RunData, iteration: IterationData) -> str:
    heading = run.heading(iteration)
    return f"{run.name}, {heading.lower()}" if heading else run.name


def _interval(dot: Dot) -> str:
    if dot.low == dot.high:
        return UNKNOWN  # a single evaluation example gives no standard error
    return f"{dot.low:.4f} to {dot.high:.4f}".replace("-", "−")


def _benchmarks(runs: Sequence[RunData]) -> Section:
    scores = [(f"{run.name}: {label}", entry) for run in runs for label, entry in scores_of(run)]
    comparisons = [
        (
            f"{_run_label(run, iteration)}: {MODELS.get(entry['model'], entry['model'])} against the "
            f"{MODELS.get(entry['against'], entry['against'])}",
            entry,
        )
        for run in runs
        for iteration in run.iterations
        for entry in iteration.records("head_to_head")
    ]
    blocks = [Block(score_figures(scores), [score_table(scores)])] if scores else []
    blocks += [Block([head_to_head_figure(comparisons)])] if comparisons else []
    return Section("benchmarks", "Benchmarks", blocks, absent="No benchmark has been run in these runs.")


def _influence(runs: Sequence[RunData], unit: Unit) -> Section:
    figures = []
    for title, part_of in (
        ("Influence of the first probing sets", _first_probing_set),
        ("Influence of the last training sets", _last_training_set),
    ):
        samples = [
            Sample.numbered(run.name, part.values, number)
            for number, run in enumerate(runs)
            if (part := part_of(run)) is not None and len(part.values)
        ]
        if samples:
            figures.append(
                distribution_figure(
                    title,
                    "Right of the line, a step on the example lowers the student's reference loss. Compare runs only if "
                    "student and reference set are the same.",
                    samples,
                    unit,
                )
            )
    return Section(
        "influence", "Influence", [Block(figures)] if figures else [], absent="No influence has been measured yet."
    )


def _cost(runs: Sequence[RunData]) -> Section:
    seconds = {run.name: sum(filter(formatting.is_finite, run.job_seconds.values())) for run in runs if run.job_seconds}
    operations = {run.name: float(sum(stage["flops"] for stage in run.stages)) for run in runs if run.stages}
    kinds: list[tuple[str, str, str, dict[str, float], Callable[[float], str]]] = [
        (
            "Seconds of jobs",
            f"Sum over all shards of all stages of a run. {_NOT_COUNTED}",
            "seconds",
            seconds,
            formatting.duration,
        ),
        (
            "Floating-point operations (Table 8)",
            f"Sum over all stages of a run. {_NOT_COUNTED} {OPERATIONS}",
            "operations",
            operations,
            formatting.significant,
        ),
    ]
    figures = [bar_figure(*kind, column="run") for kind in kinds if kind[3]]
    rows = [
        [
            run.name,
            *(
                formatting.count(sum(stage[key] for stage in run.stages))
                for key in ("jobs", "retries", "interruptions")
            ),
            *(formatting.significant(sum(map(hours, run.stages))) for hours in (job_hours, gpu_hours)),
        ]
        for run in runs
        if run.stages
    ]
    columns = ["Run", "Jobs", "Retries", "Interruptions", "Job-hours", "GPU-hours"]
    tables = [Table("Cluster usage", columns, rows)] if rows else []
    return Section(
        "cost",
        "Cost",
        [Block(figures, tables)] if figures else [],
        absent="No iteration has finished yet; times are recorded at its end.",
    )


def _configuration(runs: Sequence[RunData]) -> Section:
    first, *others = runs
    rows = []
    for other in others:
        before, after = (
            {key: value for key, value in run.settings.items() if key not in _IGNORED_SETTINGS}
            for run in (first, other)
        )
        rows += [[other.name, line] for line in differences(before, after)]
    return Section(
        "configuration",
        "Configuration",
        [Block([], [Table("Settings that differ", ["Run", f"Setting: {first.name} -> run"], rows)])] if rows else [],
        absent="The runs have the same configuration.",
    )

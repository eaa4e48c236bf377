"""Evaluation of students: held-out loss, benchmarks, head-to-head comparisons (Figure 4), contamination."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from montessori_core import formatting
from montessori_core.formatting import benchmark_name, items_name, score_name
from montessori_report.figures import (
    AFTER,
    BEFORE,
    GREY,
    REJECTED,
    ROWS,
    TEACHER,
    WARM,
    Dot,
    Figure,
    colour_of,
    dot_figure,
    finite_dots,
    grouped_dot_figure,
    new_plot,
    row_height,
    wrap_label,
)
from montessori_report.html import Block, Section, Table
from montessori_report.run_data import IterationData, RunData

MODELS = {
    "student": "updated teacher's student",
    "unmodified": "unmodified teacher's student",
    "untrained": "untrained student",
    "previous": "student of the iteration before",
}
_COLOURS = {"student": AFTER, "unmodified": BEFORE, "untrained": GREY, "previous": WARM}


def held_out_section(run: RunData) -> Section:
    """Return the section of held-out losses and paired gains."""
    block = _held_out(run)
    return Section(
        "held-out",
        "Held-out loss",
        [block] if block else [],
        note="Standard errors are over the held-out examples. They do not include the variation between random seeds; repeat "
        "the run with other seeds before relying on a small gain."
        if block
        else "",
        absent="No student has been evaluated yet.",
    )


def _held_out(run: RunData) -> Block | None:
    losses = run.first_held_out_loss
    entries = [
        (MODELS[name][0].upper() + MODELS[name][1:], losses[name], _COLOURS[name])
        for name in ("untrained", "unmodified")
        if name in losses
    ]
    entries += [
        (run.in_iteration(MODELS["student"], iteration), iteration.held_out_loss["student"], AFTER)
        for iteration in run.iterations
        if "student" in iteration.held_out_loss
    ]
    gains = [
        (run.in_iteration(f"over the {MODELS[name]}", iteration), gain, _COLOURS[name])
        for iteration in run.iterations
        for name in ("unmodified", "untrained")
        if (gain := iteration.held_out_gain.get(f"student_over_{name}"))
    ]
    if not entries:
        return None
    figures = [loss_figure(finite_dots(entries))]
    if gain_dots := finite_dots(gains):
        figures.append(gain_figure(gain_dots))
    rows = [
        ["Loss: " + label, formatting.loss(s["mean"]), formatting.loss(s["standard_error"])] for label, s, _ in entries
    ]
    rows += [
        ["Gain: " + label, formatting.signed(s["mean"]), formatting.loss(s["standard_error"])] for label, s, _ in gains
    ]
    table = Table("Held-out losses and paired gains, nats per token", ["", "Mean", "Standard error"], rows)
    return Block(figures, [table])


def loss_figure(dots: Sequence[Dot]) -> Figure:
    """Draw held-out losses with their confidence intervals."""
    return dot_figure(
        "Held-out loss of each student",
        "Further left is better. The bars are 95 % confidence intervals over the held-out examples. They may overlap even "
        "if the paired difference is clear, so judge by the gains.",
        dots,
        "mean loss, nats per token",
        formatting.loss,
    )


def gain_figure(dots: Sequence[Dot]) -> Figure:
    """Draw paired gains with their confidence intervals."""
    return dot_figure(
        "Paired gain of the updated teacher's student",
        "The difference of two students' losses on the same held-out examples. Right of 0, the updated teacher's student is "
        "better; an interval that crosses 0 shows no difference.",
        dots,
        "gain, nats per token",
        formatting.signed,
        zero=True,
    )


def benchmark_section(run: RunData) -> Section:
    """Return the section of benchmark scores, head-to-head comparisons, and contamination."""
    scores = scores_of(run)
    comparisons = [
        (
            f"{_label(entry['model'], iteration, run)} against the {MODELS.get(entry['against'], entry['against'])}",
            entry,
        )
        for iteration in run.iterations
        for entry in iteration.records("head_to_head")
    ]
    contamination = [
        (run.in_iteration(entry["data"], iteration), entry)
        for iteration in run.iterations
        for entry in iteration.records("contamination")
    ]
    blocks = []
    if scores:
        blocks.append(Block(score_figures(scores), [score_table(scores)]))
    if comparisons:
        blocks.append(Block([head_to_head_figure(comparisons)], [], "Head to head" if scores else None))
    if contamination:
        heading = "Contamination" if scores or comparisons else None
        blocks.append(Block([], [_contamination_table(contamination)], heading))
    return Section(
        "benchmarks",
        "Benchmarks",
        blocks,
        absent="No benchmark has been run. Select benchmarks in the section benchmarks of the configuration.",
    )


def scores_of(run: RunData) -> list[tuple[str, dict[str, Any]]]:
    """Return the label and record of each finite score; models that iterations do not change appear once."""
    records: dict[tuple[str, str, str], dict[str, Any]] = {}
    for iteration in run.iterations:
        for entry in iteration.records("scores"):
            if formatting.is_finite(entry["mean"]):
                key = _label(entry["model"], iteration, run), entry["benchmark"], entry["metric"]
                records.setdefault(key, entry)
    return [(label, entry) for (label, _, _), entry in records.items()]


def _label(model: str, iteration: IterationData, run: RunData) -> str:
    name = MODELS.get(model, model)
    return name[0].upper() + name[1:] if model in ("unmodified", "untrained") else run.in_iteration(name, iteration)


def score_figures(scores: Sequence[tuple[str, dict[str, Any]]]) -> list[Figure]:
    """Draw a figure per benchmark, with a row per metric and a dot per label.

    Args:
        scores: labels and records of `scores` of metrics.json, with finite means.
    """
    labels = list(dict.fromkeys(label for label, _ in scores))
    models = {label: entry["model"] for label, entry in scores}
    distinct = len({models[label] for label in labels}) == len(labels)
    colours = {
        label: _COLOURS.get(models[label], GREY) if distinct else colour_of(number)
        for number, label in enumerate(labels)
    }
    figures = []
    for benchmark in dict.fromkeys(entry["benchmark"] for _, entry in scores):
        entries = [(label, entry) for label, entry in scores if entry["benchmark"] == benchmark]
        groups = {
            metric.replace("_", " "): [
                Dot.of(label, entry["mean"], entry["standard_error"], colours[label])
                for label, entry in entries
                if entry["metric"] == metric
            ]
            for metric in dict.fromkeys(entry["metric"] for _, entry in entries)
        }
        lower = [entry["metric"].replace("_", " ") for _, entry in entries if not entry["higher_is_better"]]
        better = (
            f"Further right is better, except for {', '.join(dict.fromkeys(lower))}"
            if lower
            else "Further right is better"
        )
        figures.append(
            grouped_dot_figure(
                benchmark_name(benchmark),
                f"{better}. The bars are 95 % intervals; bars that overlap widely show no difference.",
                groups,
                "score",
            )
        )
    return figures


def score_table(scores: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Return all scores as a table, with a row per metric and a column per label."""
    labels = list(dict.fromkeys(label for label, _ in scores))
    cells = {(entry["benchmark"], entry["metric"], label): entry for label, entry in scores}
    metrics = list(dict.fromkeys((entry["benchmark"], entry["metric"]) for _, entry in scores))
    rows = [
        [
            score_name(benchmark, metric),
            *(_score_text(cells.get((benchmark, metric, label))) for label in labels),
        ]
        for benchmark, metric in metrics
    ]
    return Table("Scores, ± one standard error, with the number of examples", ["Benchmark", *labels], rows)


def _score_text(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return formatting.UNKNOWN
    error = f" ± {entry['standard_error']:.2g}" if formatting.is_finite(entry["standard_error"]) else ""
    unparsed = f", {formatting.count(entry['unparsed'])} unparsed" if entry["unparsed"] else ""
    return f"{entry['mean']:.4g}{error} ({formatting.count(entry['examples'])}{unparsed})"


def head_to_head_figure(comparisons: Sequence[tuple[str, dict[str, Any]]]) -> Figure:
    """Draw the shares of wins, ties and losses (Figure 4).

    Args:
        comparisons: labels and records of `head_to_head` of metrics.json.
    """
    kinds = {"wins": AFTER, "ties": GREY, "losses": REJECTED, "unparsed": TEACHER}
    totals = [sum(entry[kind] for kind in kinds) or 1 for _, entry in comparisons]
    prompts = sorted({"published" if entry.get("judge_prompts") == "published" else "own" for _, entry in comparisons})
    shown = [kind for kind in kinds if kind != "unparsed" or any(entry["unparsed"] for _, entry in comparisons)]
    bars = [
        go.Bar(
            name=kind,
            y=[wrap_label(label) for label, _ in comparisons],
            x=[entry[kind] / total for (_, entry), total in zip(comparisons, totals, strict=True)],
            text=[formatting.count(entry[kind]) for _, entry in comparisons],
            textposition="inside",
            insidetextanchor="middle",
            marker_color=kinds[kind],
            hovertemplate=f"%{{y}}: %{{text}} {kind}<extra></extra>",
        )
        for kind in shown
    ]
    plot = new_plot(
        bars,
        110 + row_height([label for label, _ in comparisons], 56) * len(comparisons),
        "share of the comparisons",
        barmode="stack",
        xaxis_tickformat=".0%",
        xaxis_range=[0, 1],
        legend_traceorder="normal",
        **ROWS,
    )
    return Figure(
        "Head-to-head comparisons (Figure 4)",
        f"Each bar compares the answers of two models with {' and '.join(prompts)} judge prompts. More blue than red means "
        "that the first model wins more often. The numbers are comparisons; those without a readable judgement are unparsed.",
        plot,
        ["pairing", "wins", "ties", "losses", "unparsed"],
        [(label, *(entry[kind] for kind in kinds)) for label, entry in comparisons],
    )


def _contamination_table(contamination: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    rows = [
        [
            items_name(entry["benchmark"]),
            data,
            f"{formatting.count(entry['overlapping'])} of {formatting.count(entry['items'])}",
            formatting.count(entry["n"]),
        ]
        for data, entry in contamination
    ]
    return Table(
        "Benchmark items that share n consecutive words with the data; scores on them are less reliable",
        ["Benchmark", "Data", "Overlapping items", "n"],
        rows,
    )

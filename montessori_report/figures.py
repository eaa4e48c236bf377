"""Figures of a page: a Plotly figure, a sentence that says how to read it, and its numbers as a table.

Colours are those of Okabe and Ito, which people with any colour vision tell apart, and mean the same everywhere: orange is
the teacher before its update, blue the updated teacher, green the warm-up. No text that a model wrote enters a figure, since
Plotly would read it as markup; all other text is escaped by `plain`.
"""

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from montessori_core.formatting import count, is_finite
from montessori_report.run_data import Log

BEFORE, AFTER, WARM, GREY = "#E69F00", "#0072B2", "#009E73", "#8A8F98"
CHOSEN, REJECTED, TEACHER = "#56B4E9", "#D55E00", "#CC79A7"
SERIES = (BEFORE, AFTER, WARM, REJECTED, CHOSEN, TEACHER)
"""Colours of teacher 0, teacher 1 and so on, and of whatever else is counted."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
"""With `SERIES`, 42 marks that differ."""
DASHES = ("solid", "dash", "dot", "dashdot")
CONFIDENCE = 1.96
"""Standard errors in half a 95 % interval."""
ROWS: dict[str, Any] = {"yaxis_autorange": "reversed", "yaxis_showgrid": False}
"""Layout of bars below each other, the first at the top."""
_LINE = 17  # pixels
_AXIS = {"title_font_size": 13, "automargin": True, "zeroline": False, "exponentformat": "e"}
_CLEAR = "rgba(0,0,0,0)"
_ERROR_BARS = {"thickness": 2, "width": 5}

TEMPLATE = go.layout.Template(
    # The page's script adds the colours of light or dark mode.
    layout=go.Layout(
        margin={"l": 8, "r": 16, "t": 16, "b": 8},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font={"size": 13, "color": GREY, "family": "system-ui, sans-serif"},
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        modebar={"bgcolor": _CLEAR, "orientation": "v"},
        dragmode=False,  # a finger on a figure scrolls the page
        xaxis=go.layout.XAxis(**_AXIS),
        yaxis=go.layout.YAxis(**_AXIS),
        sunburstcolorway=SERIES,
        shapedefaults={"line": {"color": GREY, "width": 1.5}},
        annotationdefaults={"font": {"size": 12}},
    ),
    data={
        "bar": [go.Bar(orientation="h", marker_color=AFTER, cliponaxis=False)],
        "scatter": [go.Scatter(error_x=_ERROR_BARS, error_y=_ERROR_BARS)],
    },
)


@dataclass(frozen=True)
class Figure:
    """A figure with the sentence that says how to read it.

    Attributes:
        title: above the figure; its file of data is named after it.
        reading: how to read it.
        plot: the Plotly figure.
        columns: names of the columns of the figure's data.
        rows: the numbers that are drawn, for those who want to draw them again.
    """

    title: str
    reading: str
    plot: go.Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def csv(self) -> str:
        """The figure's data as comma-separated values; unknown values are empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Dot:
    """A mean with its interval, whose ends are the mean where no error is known."""

    label: str
    mean: float
    low: float
    high: float
    colour: str

    @staticmethod
    def of(label: str, mean: float, standard_error: float | None, colour: str) -> "Dot":
        """Return the dot with the 95 % interval of a normal distribution."""
        reach = CONFIDENCE * standard_error if is_finite(standard_error) else 0.0
        return Dot(label, mean, mean - reach, mean + reach, colour)


@dataclass(frozen=True)
class Line:
    """Values over places on the x axis."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str = "solid"

    @staticmethod
    def of_log(label: str, log: Log, key: str, colour: str, dash: str = "solid") -> "Line":
        """Return the finite values of a training log over the steps."""
        entries = [entry for entry in log if is_finite(entry.get("step")) and is_finite(entry.get(key))]
        return Line(label, [entry["step"] for entry in entries], [entry[key] for entry in entries], colour, dash)


@dataclass(frozen=True)
class Sample:
    """Values of a set in a figure of several."""

    label: str
    values: npt.NDArray[np.float64]
    colour: str
    dash: str = "solid"

    @staticmethod
    def numbered(label: str, values: npt.NDArray[np.float64], number: int) -> "Sample":
        """Return the sample with the colour and dash of the set's number; they repeat after 24 sets."""
        return Sample(label, values, colour_of(number), dash_of(number))


def colour_of(number: int) -> str:
    """Return the colour of a teacher, run or method by its number."""
    return SERIES[number % len(SERIES)]


def dash_of(number: int) -> str:
    """Return the dash that tells numbers of the same colour apart."""
    return DASHES[number // len(SERIES) % len(DASHES)]


def finite_dots(entries: Iterable[tuple[str, Mapping[str, float], str]]) -> list[Dot]:
    """Return a dot for each label, statistic (`mean` and `standard_error`) and colour, if both numbers are finite."""
    return [
        Dot.of(label, stat["mean"], stat["standard_error"], colour)
        for label, stat, colour in entries
        if is_finite(stat["mean"]) and is_finite(stat["standard_error"])
    ]


def slug(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plain(text: str) -> str:
    """Escape what Plotly would read as markup."""
    return escape(text, quote=False)


def wrapped(label: str) -> str:
    """Break a label into lines, for beside an axis."""
    return "<br>".join(plain(line) for line in textwrap.wrap(label, 24)) or " "


def row_height(labels: Iterable[str], least: int) -> int:
    """Return the pixels of a row in which each of these labels has room."""
    return max([least, *(6 + _LINE * (1 + wrapped(label).count("<br>")) for label in labels)])


def new_plot(traces: Sequence[Any], height: int, x_title: str, y_title: str = "", **layout: Any) -> go.Figure:
    """Return a Plotly figure in the page's style.

    Args:
        traces: what is drawn.
        height: of the figure, pixels.
        x_title: of the x axis.
        y_title: of the y axis; without one the axis has labels for ticks.
        layout: further properties, with underscores between the parts of their names.
    """
    titles = {"xaxis_title_text": plain(x_title), "yaxis_title_text": plain(y_title)}
    # Fixed tick count: otherwise legend wrapping and label width can oscillate.
    ticks = 6 if y_title else None
    return go.Figure(traces, go.Layout(template=TEMPLATE, height=height, yaxis_nticks=ticks, **titles, **layout))


def bar_figure(
    title: str,
    reading: str,
    axis: str,
    bars: Mapping[str, float],
    text_of: Callable[[float], str],
    column: str = "stage",
) -> Figure:
    """Draw horizontal bars from 0, in the order given.

    Args:
        title: of the figure.
        reading: how to read it.
        axis: what the bars are in.
        bars: values by label.
        text_of: formats a value, at the end of its bar.
        column: what the labels are, for the data.
    """
    labels = [label.replace("/", " / ") for label in bars]
    trace = go.Bar(
        y=[wrapped(label) for label in labels],
        x=list(bars.values()),
        text=list(map(text_of, bars.values())),
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    height = 80 + row_height(labels, 28) * len(bars)
    limits = [0, 1.15 * (max(bars.values(), default=0.0) or 1.0)]
    plot = new_plot([trace], height, axis, showlegend=False, xaxis_range=limits, **ROWS)
    return Figure(title, reading, plot, [column, axis], list(bars.items()))


def funnel_figure(label: str, funnel: Mapping[str, int]) -> Figure:
    """Draw the candidates, the rejections of each filter, and the kept instructions."""
    candidates, kept = funnel["candidates"], funnel["kept"]
    rejected = {reason: number for reason, number in funnel.items() if reason not in ("candidates", "kept")}
    steps = {"candidates": candidates, **rejected, "kept": kept}
    left = candidates - np.cumsum(list(rejected.values()), dtype=int)
    trace = go.Bar(
        y=[wrapped(step) for step in steps],
        x=list(steps.values()),
        base=[0, *left.tolist(), 0],
        marker_color=[GREY, *[REJECTED] * len(rejected), AFTER],
        text=[count(candidates), *(f"−{count(number)}" for number in rejected.values()), count(kept)],
        textposition="outside",
        hovertemplate="%{y}: %{x:,}<extra></extra>",
    )
    height, limits = 70 + row_height(funnel, 34) * len(funnel), [0, 1.16 * max(candidates, 1)]
    return Figure(
        label,
        "Read from top to bottom: each red bar is what one filter took away from what was left, and the blue bar is kept.",
        new_plot([trace], height, "instructions", showlegend=False, xaxis_range=limits, **ROWS),
        ["step", "instructions"],
        list(steps.items()),
    )


def histogram_figure(
    title: str, reading: str, samples: Sequence[Sample], edges: npt.NDArray[np.float64], axis: str
) -> Figure:
    """Draw outlines of histograms over common bins, which stay readable where they overlap.

    Values beyond the bins are counted in the outermost.
    """
    traces, rows = [], []
    for sample in samples:
        heights = np.histogram(np.clip(sample.values, edges[0], edges[-1]), edges)[0]
        shares = (heights / len(sample.values)).tolist()
        traces.append(
            go.Scatter(
                mode="lines",
                name=f"{plain(sample.label)}, {count(len(sample.values))} examples",
                x=[float(edges[0]), *edges.tolist()],
                y=[0, *shares, 0],
                line={"shape": "hv", "color": sample.colour, "dash": sample.dash},
                fill="tozeroy",
                fillcolor=f"{sample.colour}{'59' if len(samples) < 3 else '1F'}",
                customdata=[0, *heights.tolist(), 0],
                hovertemplate="from %{x:.4g}: %{y:.1%} (%{customdata} examples)<extra>%{fullData.name}</extra>",
            )
        )
        lows, highs = edges[:-1].tolist(), edges[1:].tolist()
        rows += [(sample.label, *cells) for cells in zip(lows, highs, heights.tolist(), shares, strict=True)]
    plot = new_plot(traces, 400, axis, "share of the set", yaxis_tickformat=".0%", yaxis_rangemode="tozero")
    return Figure(title, reading, plot, ["set", f"from, {axis}", "to", "examples", "share of the set"], rows)


def line_figure(
    title: str,
    reading: str,
    lines: Sequence[Line],
    x_axis: str,
    y_axis: str,
    level: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw lines, with a dotted one at `level`."""
    traces = [
        go.Scatter(
            mode="lines+markers" if len(line.x) <= 60 else "lines",
            name=plain(line.label),
            x=line.x,
            y=line.y,
            line={"color": line.colour, "dash": line.dash},
            marker_size=5,
            hovertemplate="%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )
        for line in lines
    ]
    plot = new_plot(traces, 320, x_axis, y_axis, yaxis_range=limits)
    if level is not None:
        plot.add_hline(level, line_dash="dot")
    rows = [(line.label, x, y) for line in lines for x, y in zip(line.x, line.y, strict=True)]
    return Figure(title, reading, plot, ["line", x_axis, y_axis], rows)


def dot_figure(
    title: str, reading: str, dots: Sequence[Dot], axis: str, text_of: Callable[[float], str], zero: bool = False
) -> Figure:
    """Draw means with their intervals below each other; `zero` draws a line at 0."""
    traces = [
        go.Scatter(
            mode="markers+text",
            name=plain(dot.label),
            x=[dot.mean],
            y=[wrapped(dot.label)],
            error_x=error_bars([dot]) | {"color": dot.colour},
            marker={"color": dot.colour, "size": 12},
            text=[text_of(dot.mean)],
            textposition="top center",
            cliponaxis=False,
            hovertemplate=f"%{{text}} ({dot.low:.4g} to {dot.high:.4g})<extra></extra>",
        )
        for dot in dots
    ]
    plot = new_plot(
        traces,
        90 + row_height([dot.label for dot in dots], 56) * len(dots),
        axis,
        showlegend=False,
        xaxis_range=_range_around(dots, [0.0] * zero),
        yaxis_range=[len(dots) - 0.4, -0.7],
        yaxis_type="category",
    )
    if zero:
        plot.add_vline(0.0, line_dash="dash")
    rows = [(dot.label, dot.mean, dot.low, dot.high) for dot in dots]
    return Figure(title, reading, plot, ["", axis, "95 % interval from", "95 % interval to"], rows)


def grouped_dot_figure(title: str, reading: str, groups: Mapping[str, Sequence[Dot]], axis: str) -> Figure:
    """Draw means with their intervals: a row for each group, in it a dot for each label, colours by label."""
    rows = [(group, dot) for group, dots in groups.items() for dot in dots]
    by_label: dict[str, list[tuple[str, Dot]]] = {}
    for group, dot in rows:
        by_label.setdefault(dot.label, []).append((group, dot))
    traces = [
        go.Scatter(
            mode="markers",
            orientation="h",
            offsetgroup=plain(label),
            name=plain(label),
            x=[dot.mean for _, dot in members],
            y=[wrapped(group) for group, _ in members],
            error_x=error_bars([dot for _, dot in members]),
            marker={"color": members[0][1].colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9},
            hovertemplate="%{y}: %{x:.4g}<extra>%{fullData.name}</extra>",
        )
        for number, (label, members) in enumerate(by_label.items())
    ]
    plot = new_plot(
        traces,
        110 + 20 * len(traces) + (18 + 18 * len(traces)) * len(groups),
        axis,
        scattermode="group",
        xaxis_range=_range_around([dot for _, dot in rows]),
        yaxis_autorange="reversed",
        yaxis_type="category",
    )
    columns = ["group", "label", axis, "95 % interval from", "95 % interval to"]
    return Figure(
        title, reading, plot, columns, [(group, dot.label, dot.mean, dot.low, dot.high) for group, dot in rows]
    )


def error_bars(dots: Sequence[Dot]) -> dict[str, Any]:
    """Return the intervals of dots as Plotly's error bars."""
    return {
        "array": [max(0.0, dot.high - dot.mean) for dot in dots],
        "arrayminus": [max(0.0, dot.mean - dot.low) for dot in dots],
    }


def _range_around(dots: Sequence[Dot], others: Sequence[float] = ()) -> list[float]:
    """Return a range that holds these intervals and numbers with some room beside them."""
    ends = [*(end for dot in dots for end in (dot.low, dot.high)), *others]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    margin = 0.15 * ((high - low) or 1.0)
    return [low - margin, high + margin]

"""Figures of a page: a Plotly figure, an explanation of how to read it, and its data as a table.

Colours are the colour-blind-safe palette of Okabe and Ito, with the same meaning in all figures: orange is the teacher before
its update, blue the updated teacher, green the warm-up. Plotly interprets text as markup, so figures contain no text written
by a model, and `escape_markup` escapes all other text.
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
"""Colours of teacher 0, teacher 1 and so on, and of other numbered series."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
"""Combined with `SERIES`: 42 distinct marks."""
DASHES = ("solid", "dash", "dot", "dashdot")
CONFIDENCE = 1.96
"""Half-width of a 95 % interval, in standard errors."""
ROWS: dict[str, Any] = {"yaxis_autorange": "reversed", "yaxis_showgrid": False}
"""Layout of horizontal bars, the first at the top."""
_LINE = 17  # pixels
_AXIS = {"title_font_size": 13, "zeroline": False, "exponentformat": "e"}
_CLEAR = "rgba(0,0,0,0)"
_ERROR_BARS = {"thickness": 2, "width": 5}

TEMPLATE = go.layout.Template(
    # script.js sets the colours of light or dark mode.
    layout=go.Layout(
        margin={"l": 8, "r": 16, "t": 16, "b": 8},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font={"size": 13, "color": GREY, "family": "system-ui, sans-serif"},
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        modebar={"bgcolor": _CLEAR, "orientation": "v"},
        dragmode=False,  # on a touch screen, a swipe scrolls the page
        # Labels of the x axis change the height alone: if they changed the width, they would change with it, without end.
        xaxis=go.layout.XAxis(automargin="height", **_AXIS),
        yaxis=go.layout.YAxis(automargin="width", **_AXIS),
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
    """A figure with an explanation of how to read it.

    Attributes:
        title: title of the figure; its CSV file is named after it.
        reading: how to read the figure.
        plot: the Plotly figure.
        columns: column names of the figure's data.
        rows: the drawn numbers.
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
    """A mean with its interval; without a standard error, both ends equal the mean."""

    label: str
    mean: float
    low: float
    high: float
    colour: str

    @staticmethod
    def of(label: str, mean: float, standard_error: float | None, colour: str) -> "Dot":
        """Return the dot with the 95 % interval of a normal distribution."""
        half_width = CONFIDENCE * standard_error if is_finite(standard_error) else 0.0
        return Dot(label, mean, mean - half_width, mean + half_width, colour)


@dataclass(frozen=True)
class Line:
    """A line of y over x values."""

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
    """A labelled set of values in a histogram."""

    label: str
    values: npt.NDArray[np.float64]
    colour: str
    dash: str = "solid"

    @staticmethod
    def numbered(label: str, values: npt.NDArray[np.float64], number: int) -> "Sample":
        """Return the sample with the colour and dash of a number; they repeat after 24."""
        return Sample(label, values, colour_of(number), dash_of(number))


def colour_of(number: int) -> str:
    """Return the colour of a teacher, run or method by its number."""
    return SERIES[number % len(SERIES)]


def dash_of(number: int) -> str:
    """Return the dash of a number, distinct for numbers of the same colour."""
    return DASHES[number // len(SERIES) % len(DASHES)]


def finite_dots(entries: Iterable[tuple[str, Mapping[str, float], str]]) -> list[Dot]:
    """Return a dot for each (label, statistic, colour) whose `mean` is finite; one example has no `standard_error`."""
    return [
        Dot.of(label, stat["mean"], stat["standard_error"], colour)
        for label, stat, colour in entries
        if is_finite(stat["mean"])
    ]


def slug(text: str) -> str:
    """Return a text in a form usable in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def escape_markup(text: str) -> str:
    """Escape characters that Plotly would interpret as markup."""
    return escape(text, quote=False)


def wrap_label(label: str) -> str:
    """Break an axis label into lines."""
    return "<br>".join(escape_markup(line) for line in textwrap.wrap(label, 24)) or " "


def row_height(labels: Iterable[str], least: int) -> int:
    """Return the row height in pixels, at least `least`, that fits the longest label."""
    return max([least, *(6 + _LINE * (1 + wrap_label(label).count("<br>")) for label in labels)])


def new_plot(traces: Sequence[Any], height: int, x_title: str, y_title: str = "", **layout: Any) -> go.Figure:
    """Return a Plotly figure in the page's style.

    Args:
        traces: Plotly traces.
        height: height of the figure, pixels.
        x_title: title of the x axis.
        y_title: title of the y axis; empty if its ticks are labels.
        layout: other layout properties, in Plotly's underscore notation.
    """
    titles = {"xaxis_title_text": escape_markup(x_title), "yaxis_title_text": escape_markup(y_title)}
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
        title: title of the figure.
        reading: how to read it.
        axis: title of the value axis.
        bars: values by label.
        text_of: formats the value shown at the end of a bar.
        column: name of the label column in the data.
    """
    labels = [label.replace("/", " / ") for label in bars]
    trace = go.Bar(
        y=[wrap_label(label) for label in labels],
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
    remaining = candidates - np.cumsum(list(rejected.values()), dtype=int)
    trace = go.Bar(
        y=[wrap_label(step) for step in steps],
        x=list(steps.values()),
        base=[0, *remaining.tolist(), 0],
        marker_color=[GREY, *[REJECTED] * len(rejected), AFTER],
        text=[count(candidates), *(f"−{count(number)}" for number in rejected.values()), count(kept)],
        textposition="outside",
        hovertemplate="%{y}: %{x:,}<extra></extra>",
    )
    height, limits = 70 + row_height(funnel, 34) * len(funnel), [0, 1.16 * max(candidates, 1)]
    return Figure(
        label,
        "Read from top to bottom: each red bar is what one filter removed, and the blue bar is what remains.",
        new_plot([trace], height, "instructions", showlegend=False, xaxis_range=limits, **ROWS),
        ["step", "instructions"],
        list(steps.items()),
    )


def histogram_figure(
    title: str, reading: str, samples: Sequence[Sample], edges: npt.NDArray[np.float64], axis: str
) -> Figure:
    """Draw histograms as outlines over common bins, so that overlapping ones are readable.

    Values outside the bins are counted in the first or last bin.
    """
    traces, rows = [], []
    for sample in samples:
        heights = np.histogram(np.clip(sample.values, edges[0], edges[-1]), edges)[0]
        shares = (heights / len(sample.values)).tolist()
        traces.append(
            go.Scatter(
                mode="lines",
                name=f"{escape_markup(sample.label)}, {count(len(sample.values))} examples",
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
    """Draw lines, and a dotted horizontal line at `level`."""
    traces = [
        go.Scatter(
            mode="lines+markers" if len(line.x) <= 60 else "lines",
            name=escape_markup(line.label),
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
    """Draw means with intervals, one row each; `zero` draws a line at 0."""
    traces = [
        go.Scatter(
            mode="markers+text",
            name=escape_markup(dot.label),
            x=[dot.mean],
            y=[wrap_label(dot.label)],
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
    """Draw means with intervals: a row per group, in it a dot per label; labels have colours."""
    rows = [(group, dot) for group, dots in groups.items() for dot in dots]
    by_label: dict[str, list[tuple[str, Dot]]] = {}
    for group, dot in rows:
        by_label.setdefault(dot.label, []).append((group, dot))
    traces = [
        go.Scatter(
            mode="markers",
            orientation="h",
            offsetgroup=escape_markup(label),
            name=escape_markup(label),
            x=[dot.mean for _, dot in members],
            y=[wrap_label(group) for group, _ in members],
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
    """Return the intervals of dots in Plotly's format of error bars."""
    return {
        "array": [max(0.0, dot.high - dot.mean) for dot in dots],
        "arrayminus": [max(0.0, dot.mean - dot.low) for dot in dots],
    }


def _range_around(dots: Sequence[Dot], others: Sequence[float] = ()) -> list[float]:
    """Return an axis range that contains the intervals and numbers, with a margin."""
    ends = [*(end for dot in dots for end in (dot.low, dot.high)), *others]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    margin = 0.15 * ((high - low) or 1.0)
    return [low - margin, high + margin]

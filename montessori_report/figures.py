"""What the figures of a page are made of: plain Plotly data, a sentence that says how to read it, and the numbers as a table.

Colours are those of Okabe and Ito, which people with any colour vision tell apart, and mean the same everywhere: orange is
the teacher before its update, blue the updated teacher, green the warm-up. No text that a model wrote enters a figure, for
Plotly would read it as markup; all other text is escaped by `plain`.
"""

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

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
_LINE = 17  # pixels


@dataclass(frozen=True)
class Figure:
    """A figure with the sentence that says how to read it.

    Attributes:
        title: above the figure; its file of data is named after it.
        reading: how to read it.
        plot: Plotly's data and layout.
        columns: names of the columns of the figure's data.
        rows: the numbers that are drawn, for those who want to draw them again.
    """

    title: str
    reading: str
    plot: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def csv(self) -> str:
        """The figure's data as comma-separated values; what is not known is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Dot:
    """A mean with its interval; without one, both ends are the mean."""

    label: str
    mean: float
    low: float
    high: float
    colour: str

    @staticmethod
    def of(label: str, mean: float, standard_error: float | None, colour: str) -> "Dot":
        """With the 95 % interval of a normal distribution."""
        reach = CONFIDENCE * standard_error if is_finite(standard_error) else 0.0
        return Dot(label, mean, mean - reach, mean + reach, colour)


@dataclass(frozen=True)
class Curve:
    """One value of a training log over the steps."""

    label: str
    log: Log
    key: str
    colour: str
    dash: str = "solid"


@dataclass(frozen=True)
class Sample:
    """Values of one set in a figure of several."""

    label: str
    values: npt.NDArray[np.float64]
    colour: str
    dash: str = "solid"


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plain(text: str) -> str:
    """A text in a figure: what Plotly would read as markup is escaped."""
    return escape(text, quote=False)


def wrapped(label: str) -> str:
    """The same in lines, beside an axis."""
    return "<br>".join(plain(line) for line in textwrap.wrap(label, 24)) or " "


def row_height(labels: Iterable[str], least: int) -> int:
    """Pixels of a row in which each of these labels has room."""
    return max([least, *(6 + _LINE * (1 + wrapped(label).count("<br>")) for label in labels)])


def bar_figure(
    title: str, reading: str, axis: str, bars: Mapping[str, float], texts: Sequence[str], column: str = "stage"
) -> Figure:
    """Horizontal bars from 0, in the order given.

    Args:
        title: of the figure.
        reading: how to read it.
        axis: what the bars are in.
        bars: values by label.
        texts: what stands at the end of each.
        column: what the labels are, for the data.
    """
    labels = [label.replace("/", " / ") for label in bars]
    data = {
        "type": "bar",
        "orientation": "h",
        "y": [wrapped(label) for label in labels],
        "x": list(bars.values()),
        "marker": {"color": AFTER},
        "text": list(texts),
        "textposition": "auto",
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    drawn = layout(80 + row_height(labels, 28) * len(bars), axis)
    drawn |= {"showlegend": False}
    drawn["xaxis"] |= {"range": [0, 1.15 * (max(bars.values(), default=0.0) or 1.0)]}
    drawn["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return Figure(title, reading, {"data": [data], "layout": drawn}, [column, axis], list(bars.items()))


def funnel_figure(label: str, funnel: Mapping[str, int]) -> Figure:
    """From candidates through the filters to what was kept."""
    candidates, kept = funnel["candidates"], funnel["kept"]
    rejected = {reason: number for reason, number in funnel.items() if reason not in ("candidates", "kept")}
    left = candidates
    starts = []
    for number in rejected.values():
        left -= number
        starts.append(left)
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [wrapped(name) for name in ("candidates", *rejected, "kept")],
        "x": [candidates, *rejected.values(), kept],
        "base": [0, *starts, 0],
        "marker": {"color": [GREY, *[REJECTED] * len(rejected), AFTER]},
        "text": [count(candidates), *(f"−{count(number)}" for number in rejected.values()), count(kept)],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:,}<extra></extra>",
    }
    drawn = layout(70 + row_height(funnel, 34) * len(funnel), "instructions")
    drawn |= {"showlegend": False}
    drawn["xaxis"] |= {"range": [0, 1.16 * max(candidates, 1)]}
    drawn["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return Figure(
        label,
        "Read from top to bottom: each red bar is what one filter took away from what was left, and the blue bar is kept.",
        {"data": [bars], "layout": drawn},
        ["step", "instructions"],
        [("candidates", candidates), *rejected.items(), ("kept", kept)],
    )


def histogram_figure(
    title: str,
    reading: str,
    samples: Sequence[Sample],
    edges: npt.NDArray[np.float64],
    axis: str,
) -> Figure:
    """Outlines of histograms over common bins: several stay readable where they overlap, which bars do not.

    What lies beyond the bins is counted in the outermost.
    """
    traces, rows = [], []
    for sample in samples:
        heights = np.histogram(np.clip(sample.values, edges[0], edges[-1]), edges)[0].tolist()
        outline = [0, *heights, 0]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{plain(sample.label)}, {count(len(sample.values))} examples",
                "x": [float(edges[0]), *edges.tolist()],
                "y": [height / len(sample.values) for height in outline],
                "line": {"shape": "hv", "color": sample.colour, "dash": sample.dash, "width": 2},
                "fill": "tozeroy",
                "fillcolor": f"{sample.colour}{'59' if len(samples) < 3 else '1F'}",
                "customdata": outline,
                "hovertemplate": "from %{x:.4g}: %{y:.1%} (%{customdata} examples)<extra>%{fullData.name}</extra>",
            }
        )
        rows += [
            (sample.label, low, high, height, height / len(sample.values))
            for low, high, height in zip(edges.tolist(), edges[1:].tolist(), heights, strict=False)
        ]
    drawn = layout(400, axis, "share of the set")
    drawn["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    columns = ["set", f"from, {axis}", "to", "examples", "share of the set"]
    return Figure(title, reading, {"data": traces, "layout": drawn}, columns, rows)


def line_figure(
    title: str,
    reading: str,
    lines: Sequence[tuple[Sample, Sequence[float]]],
    x_axis: str,
    y_axis: str,
    level: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Values (of each sample) over places on the x axis, with a dotted line at `level`."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(places) <= 60 else "lines",
            "name": plain(sample.label),
            "x": list(places),
            "y": sample.values.tolist(),
            "line": {"color": sample.colour, "dash": sample.dash, "width": 2},
            "marker": {"size": 5},
            "hovertemplate": "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        }
        for sample, places in lines
    ]
    drawn = layout(320, x_axis, y_axis)
    if limits is not None:
        drawn["yaxis"] |= {"range": list(limits)}
    if level is not None:
        drawn["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": stroke("dot")}
        ]
    rows = [
        (sample.label, place, value)
        for sample, places in lines
        for place, value in zip(places, sample.values.tolist(), strict=True)
    ]
    return Figure(title, reading, {"data": traces, "layout": drawn}, ["line", x_axis, y_axis], rows)


def curve_figure(
    title: str,
    reading: str,
    curves: Sequence[Curve],
    axis: str,
    level: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Values over the steps of trainings, with a dotted line at `level`."""
    lines = []
    for curve in curves:
        steps, values = curve_points(curve)
        lines.append((Sample(curve.label, np.array(values, dtype=np.float64), curve.colour, curve.dash), steps))
    figure = line_figure(title, reading, lines, "optimizer step", axis, level, limits)
    if max((len(curve.log) for curve in curves), default=0) <= 12:
        figure.plot["layout"]["xaxis"] |= {"dtick": 1}
    return figure


def curve_points(curve: Curve) -> tuple[list[float], list[float]]:
    """Steps and finite values of a curve."""
    entries = [entry for entry in curve.log if is_finite(entry.get("step")) and is_finite(entry.get(curve.key))]
    return [entry["step"] for entry in entries], [entry[curve.key] for entry in entries]


def dot_figure(
    title: str, reading: str, dots: Sequence[Dot], axis: str, texts: Sequence[str], zero: bool = False
) -> Figure:
    """Means with their intervals, one below the other; `zero` draws a line at 0."""
    traces = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": plain(dot.label),
            "x": [dot.mean],
            "y": [wrapped(dot.label)],
            "error_x": {
                "type": "data",
                "array": [dot.high - dot.mean],
                "arrayminus": [dot.mean - dot.low],
                "color": dot.colour,
                "thickness": 2,
                "width": 7,
            },
            "marker": {"color": dot.colour, "size": 12},
            "text": [text],
            "textposition": "top center",
            "cliponaxis": False,
            "hovertemplate": f"{text} ({dot.low:.4g} to {dot.high:.4g})<extra></extra>",
        }
        for dot, text in zip(dots, texts, strict=True)
    ]
    drawn = layout(90 + row_height([dot.label for dot in dots], 56) * len(dots), axis)
    drawn |= {"showlegend": False}
    drawn["xaxis"] |= {"range": _around([end for dot in dots for end in (dot.low, dot.high)] + [0.0] * zero)}
    drawn["yaxis"] |= {"range": [len(dots) - 0.4, -0.7], "type": "category"}
    if zero:
        drawn["shapes"] = [vertical(0.0, "dash")]
    rows = [(dot.label, dot.mean, dot.low, dot.high) for dot in dots]
    return Figure(
        title, reading, {"data": traces, "layout": drawn}, ["", axis, "95 % interval from", "95 % interval to"], rows
    )


def grouped_dot_figure(title: str, reading: str, groups: Mapping[str, Sequence[Dot]], axis: str) -> Figure:
    """Means with their intervals: one row for each group, one dot in it for each label, colours by label."""
    labels = list(dict.fromkeys(dot.label for dots in groups.values() for dot in dots))
    traces = []
    for number, label in enumerate(labels):
        own = [(group, dot) for group, dots in groups.items() for dot in dots if dot.label == label]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "orientation": "h",
                "offsetgroup": plain(label),
                "name": plain(label),
                "x": [dot.mean for _, dot in own],
                "y": [wrapped(group) for group, _ in own],
                "error_x": {
                    "type": "data",
                    "array": [dot.high - dot.mean for _, dot in own],
                    "arrayminus": [dot.mean - dot.low for _, dot in own],
                    "thickness": 1.5,
                    "width": 4,
                },
                "marker": {"color": own[0][1].colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9},
                "hovertemplate": "%{y}: %{x:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    drawn = layout(110 + 20 * len(labels) + (18 + 18 * len(labels)) * len(groups), axis)
    drawn |= {"scattermode": "group"}
    drawn["xaxis"] |= {
        "range": _around([end for dots in groups.values() for dot in dots for end in (dot.low, dot.high)])
    }
    drawn["yaxis"] |= {"autorange": "reversed", "type": "category"}
    rows = [(group, dot.label, dot.mean, dot.low, dot.high) for group, dots in groups.items() for dot in dots]
    columns = ["group", "label", axis, "95 % interval from", "95 % interval to"]
    return Figure(title, reading, {"data": traces, "layout": drawn}, columns, rows)


def layout(height: int, x_title: str, y_title: str | None = None) -> dict[str, Any]:
    """The layout that all figures share; the page's script adds the colours of light or dark mode."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 13, "color": GREY, "family": "system-ui, sans-serif"},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "orientation": "v"},
        "dragmode": False,  # a finger on a figure scrolls the page
        "xaxis": axis_of(x_title),
        # Were ticks chosen by the height, a legend that takes another line could change the labels' width, that the room for
        # the legend, and that its lines, and so on.
        "yaxis": axis_of(y_title) | {"nticks": 6} if y_title else axis_of(""),
    }


def axis_of(title: str) -> dict[str, Any]:
    """An axis with a title."""
    return {
        "title": {"text": plain(title), "font": {"size": 13}},
        "automargin": True,
        "zeroline": False,
        "exponentformat": "e",
    }


def vertical(at: float, dash: str) -> dict[str, Any]:
    """A line from bottom to top."""
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at, "line": stroke(dash)}


def stroke(dash: str) -> dict[str, Any]:
    """How a line is drawn that is no data."""
    return {"color": GREY, "width": 1.5, "dash": dash}


def _around(ends: Sequence[float]) -> list[float]:
    """A range that holds these with some room beside them."""
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    margin = 0.15 * ((high - low) or 1.0)
    return [low - margin, high + margin]

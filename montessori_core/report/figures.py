"""The figures of the report, as plain Plotly data.

Colours are those of Okabe and Ito and mean the same everywhere: orange is the teacher before its update, blue the updated
teacher, green the warm-up. No text that a model wrote enters a figure: Plotly would read it as markup.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from montessori_core.report.contents import Log
from montessori_core.report.numbers import Unit, count, duration, gain, known, loss, signed

BEFORE, AFTER, WARM, GREY = "#E69F00", "#0072B2", "#009E73", "#8A8F98"
CHOSEN, REJECTED, TEACHER = "#56B4E9", "#D55E00", "#CC79A7"
_ROW = 34
_CONFIDENCE = 1.96  # standard errors in half a 95 % interval


@dataclass(frozen=True)
class Figure:
    """A figure with the sentence that says how to read it; `plot` is Plotly's data and layout."""

    title: str
    reading: str
    plot: Mapping[str, Any]


@dataclass(frozen=True)
class Dot:
    """A mean with its standard error."""

    label: str
    mean: float
    standard_error: float
    colour: str


@dataclass(frozen=True)
class Curve:
    """One value of a training log over the steps."""

    label: str
    log: Log
    key: str
    colour: str
    dash: str = "solid"


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
        "y": [_wrapped(name) for name in ("candidates", *rejected, "kept")],
        "x": [candidates, *rejected.values(), kept],
        "base": [0, *starts, 0],
        "marker": {"color": [GREY, *[REJECTED] * len(rejected), AFTER]},
        "text": [count(candidates), *(f"−{count(number)}" for number in rejected.values()), count(kept)],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:,}<extra></extra>",
    }
    layout = _layout(70 + _ROW * len(funnel), "instructions")
    layout |= {"showlegend": False}
    layout["xaxis"] |= {"range": [0, 1.16 * max(candidates, 1)]}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return Figure(
        label,
        "Read from top to bottom: each red bar is what one filter took away from what was left, and the blue bar is kept.",
        {"data": [bars], "layout": layout},
    )


def influence_figure(
    sets: Sequence[tuple[str, npt.NDArray[np.float64], str]],
    unit: Unit,
    marks: Mapping[str, float],
    threshold: float,
    noise_floor: float,
) -> Figure:
    """How influence against the student is distributed in each set.

    Args:
        sets: label, influence (nats) and colour of each.
        unit: what the axis is in.
        marks: influence (nats) of what an example may be compared with, by its name.
        threshold: what divides helpful from harmful examples, nats.
        noise_floor: half the width of the band around the threshold, nats.
    """
    scaled = [(label, unit.scale(1.0) * values, colour) for label, values, colour in sets if len(values)]
    pooled = np.concatenate([values for _, values, _ in scaled]) if scaled else np.zeros(0)
    edges = histogram_edges(pooled, unit.scale(threshold))
    outside = int(((pooled < edges[0]) | (pooled > edges[-1])).sum())
    lines = {name: unit.scale(nats) for name, nats in marks.items()}
    shown = [float(edges[0]), float(edges[-1]), *lines.values()]
    margin = 0.03 * (max(shown) - min(shown))
    layout = _layout(400, f"influence against the student, {unit}", "share of the set")
    layout["xaxis"] |= {"range": [min(shown) - margin, max(shown) + margin]}
    layout["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    layout["shapes"] = [
        *_band(unit.scale(threshold), unit.scale(noise_floor)),
        *(_vertical(at, "dash") for at in lines.values()),
        _vertical(unit.scale(threshold), "solid"),
    ]
    layout["annotations"] = [_mark(name, at, row) for row, (name, at) in enumerate(lines.items())]
    beyond = f" {count(outside)} examples lie beyond the bars and are counted in the outermost." if outside else ""
    return Figure(
        "Influence before and after the teacher's update",
        "Examples right of the solid line count as helpful; if the update worked, blue lies further right than orange. The "
        "named lines are what an example can be compared with: the student as it is (0), the null step, or the median. The "
        f"grey band, if wide enough to be seen, is the noise floor.{beyond}",
        {"data": [_histogram(*part, edges) for part in scaled], "layout": layout},
    )


def histogram_edges(values: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.float64]:
    """Equal bins of which none straddles the threshold; values far outside the bulk do not stretch them."""
    if not len(values):
        return threshold + np.array([-1.0, 0.0, 1.0])
    lower, upper = np.percentile(values, [25, 75]) - threshold
    low, high = float(values.min()) - threshold, float(values.max()) - threshold
    bins = 12.0
    if upper > lower:
        reach = 4 * float(upper - lower)
        low, high = max(low, float(lower) - reach), min(high, float(upper) + reach)
        freedman_diaconis = 2 * float(upper - lower) / len(values) ** (1 / 3)
        bins = min(60.0, max(12.0, (high - low) / freedman_diaconis))
    scale = max(abs(low), abs(high), abs(threshold))
    width = (max(high - low, 1e-9 * scale) or 1.0) / bins
    first = math.floor(low / width)
    last = max(math.ceil(high / width), first + 1)
    return threshold + width * np.arange(first, last + 1, dtype=np.float64)


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
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(steps) <= 60 else "lines",
                "name": curve.label,
                "x": steps,
                "y": values,
                "line": {"color": curve.colour, "dash": curve.dash, "width": 2},
                "marker": {"size": 5},
                "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    layout = _layout(320, "optimizer step", axis)
    if max((len(curve.log) for curve in curves), default=0) <= 12:
        layout["xaxis"] |= {"dtick": 1}
    if limits is not None:
        layout["yaxis"] |= {"range": list(limits)}
    if level is not None:
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": _line("dot")}
        ]
    return Figure(title, reading, {"data": lines, "layout": layout})


def curve_points(curve: Curve) -> tuple[list[float], list[float]]:
    """Steps and finite values of a curve."""
    entries = [entry for entry in curve.log if known(entry.get("step")) and known(entry.get(curve.key))]
    return [entry["step"] for entry in entries], [entry[curve.key] for entry in entries]


def loss_figure(dots: Sequence[Dot]) -> Figure:
    """Held-out losses with their confidence intervals."""
    return Figure(
        "Held-out loss of each student",
        "Further left is better; the bars are 95 % confidence intervals over the held-out examples. Intervals may overlap "
        "although a paired difference is clear, so judge by the gains.",
        _dots(dots, "mean loss, nats per token", [loss(dot.mean) for dot in dots], zero=False),
    )


def gain_figure(dots: Sequence[Dot]) -> Figure:
    """Paired gains with their confidence intervals."""
    return Figure(
        "Paired gain of the updated teacher's student",
        "Each held-out example is compared with itself under the other student; right of 0 the updated teacher's student is "
        "better, and an interval that crosses 0 shows no difference.",
        _dots(dots, "gain, nats per token", [signed(dot.mean, 4) for dot in dots], zero=True),
    )


def time_figure(seconds: Mapping[str, float]) -> Figure:
    """Job seconds by stage, longest first."""
    stages = sorted(seconds, key=lambda stage: (-seconds[stage], stage))
    longest = max(seconds.values())
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [_wrapped(stage.replace("/", " / ")) for stage in stages],
        "x": [seconds[stage] for stage in stages],
        "marker": {"color": AFTER},
        "text": [duration(seconds[stage]) for stage in stages],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:,.1f} s<extra></extra>",
    }
    layout = _layout(80 + 28 * len(stages), "seconds")
    layout |= {"showlegend": False}
    layout["xaxis"] |= {"range": [0, 1.2 * (longest or 1.0)]}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return Figure(
        "Seconds of jobs by stage",
        "Each bar adds up the seconds of all of a stage's shards that ended well, so parallel shards count together; the "
        "longest stages come first.",
        {"data": [bars], "layout": layout},
    )


def _dots(dots: Sequence[Dot], axis: str, texts: Sequence[str], zero: bool) -> dict[str, Any]:
    data = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": dot.label,
            "x": [dot.mean],
            "y": [_wrapped(dot.label)],
            "error_x": {"array": [_CONFIDENCE * dot.standard_error], "color": dot.colour, "thickness": 2, "width": 7},
            "marker": {"color": dot.colour, "size": 12},
            "text": [text],
            "textposition": "top center",
            "cliponaxis": False,
            "hovertemplate": f"{gain(dot.mean, dot.standard_error) if zero else loss(dot.mean)}<extra></extra>",
        }
        for dot, text in zip(dots, texts, strict=True)
    ]
    layout = _layout(90 + 56 * len(dots), axis)
    layout |= {"showlegend": False}
    ends = [dot.mean + side * _CONFIDENCE * dot.standard_error for dot in dots for side in (-1, 1)] + [0.0] * zero
    margin = 0.15 * ((max(ends) - min(ends)) or 1.0)
    layout["xaxis"] |= {"range": [min(ends) - margin, max(ends) + margin]}
    layout["yaxis"] |= {"range": [len(dots) - 0.4, -0.7], "type": "category"}
    if zero:
        layout["shapes"] = [_vertical(0.0, "dash")]
    return {"data": data, "layout": layout}


def _layout(height: int, x_title: str, y_title: str | None = None) -> dict[str, Any]:
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
        "xaxis": _axis(x_title),
        "yaxis": _axis(y_title or ""),
    }


def _axis(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 13}},
        "automargin": True,
        "zeroline": False,
        "exponentformat": "e",
    }


def _histogram(
    label: str, values: npt.NDArray[np.float64], colour: str, edges: npt.NDArray[np.float64]
) -> dict[str, Any]:
    """The outline of a histogram: two of them stay readable where they overlap, which bars do not."""
    heights = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
    outline = [0, *heights, 0]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"{label}, {count(len(values))} examples",
        "x": [float(edges[0]), *edges.tolist()],
        "y": [height / len(values) for height in outline],
        "line": {"shape": "hv", "color": colour, "width": 2},
        "fill": "tozeroy",
        "fillcolor": f"{colour}59",
        "customdata": outline,
        "hovertemplate": "from %{x:.4g}: %{y:.1%} (%{customdata} examples)<extra>%{fullData.name}</extra>",
    }


def _vertical(at: float, dash: str) -> dict[str, Any]:
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at, "line": _line(dash)}


def _band(at: float, half_width: float) -> list[dict[str, Any]]:
    if half_width == 0:
        return []
    sides = {"x0": at - half_width, "x1": at + half_width}
    return [
        {
            "type": "rect",
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            **sides,
            "fillcolor": GREY,
            "opacity": 0.3,
            "line": {"width": 0},
        }
    ]


def _mark(name: str, at: float, row: int) -> dict[str, Any]:
    return {
        "text": name,
        "x": at,
        "y": 1,
        "yref": "paper",
        "yshift": -18 * row,
        "xanchor": "left",
        "yanchor": "top",
        "showarrow": False,
        "font": {"size": 12},
    }


def _line(dash: str) -> dict[str, Any]:
    return {"color": GREY, "width": 1.5, "dash": dash}


def _wrapped(label: str) -> str:
    return "<br>".join(escape(line) for line in textwrap.wrap(label, 24)) or " "

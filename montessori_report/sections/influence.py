"""Influence: distribution by teacher (Figure 3c) and training batch (3d), and accuracy of the measurement."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import pyarrow.compute as pc

from montessori_core import formatting
from montessori_core.evaluation.statistics import share_interval
from montessori_core.formatting import UNKNOWN, Unit, count
from montessori_core.influence.table import LengthLine, influence_warnings
from montessori_report.figures import (
    AFTER,
    BEFORE,
    GREY,
    Figure,
    Line,
    Sample,
    colour_of,
    histogram_figure,
    line_figure,
    new_plot,
)
from montessori_report.html import Block, Section, Table
from montessori_report.run_data import InfluenceData, IterationData, RunData

INTRODUCTION = (
    "An example's influence is how much one training step on it lowers the student's loss on the reference set, here in "
    "{unit}. It is measured against the student as it is, and against the null step, the step of AdamW's momentum without "
    "any example. The two differ by the same amount for every example."
)


def influence_unit(runs: Sequence[RunData]) -> Unit:
    """Return the unit of influence on a page."""
    tables = [
        part
        for run in runs
        for iteration in run.iterations
        for part in (iteration.influence, iteration.training_influence)
        if part
    ]
    return formatting.unit_of(
        float(value) for part in tables for value in part.values - part.summary["null_step_influence"]
    )


def influence_section(run: RunData, unit: Unit) -> Section:
    """Return the section of influence."""
    run_figures = [figure for figure in (_teachers(run, unit), _batches(run)) if figure]
    blocks = [_of_iteration(iteration, run, unit) for iteration in run.iterations if iteration.influence]
    return Section(
        "influence",
        "Influence",
        [*blocks, Block(run_figures, heading="From teacher to teacher" if len(run.iterations) > 1 else None)]
        if run_figures
        else blocks,
        introduction=INTRODUCTION.format(unit=unit),
        note=_warnings(run),
        absent="No influence has been measured yet.",
    )


def _warnings(run: RunData) -> str:
    """Return the warnings about the influence tables, in one paragraph."""
    return " ".join(
        f"Warning, {run.in_iteration(part.label, iteration)}: {warning}."
        for iteration in run.iterations
        for part in (iteration.influence, iteration.training_influence)
        if part
        for warning in influence_warnings(part.summary)
    )


def _of_iteration(iteration: IterationData, run: RunData, unit: Unit) -> Block:
    sets = [
        (part, colour)
        for part, colour in ((iteration.influence, BEFORE), (iteration.training_influence, AFTER))
        if part is not None
    ]
    first = sets[0][0]
    marks = {"student": 0.0, "null step": first.summary["null_step_influence"]}
    if run.baseline in ("median", "prompt"):
        marks["median"] = first.threshold
    figures = [
        influence_figure(
            [Sample(part.label, part.values, colour) for part, colour in sets],
            unit,
            marks,
            first.threshold,
            max(part.summary["noise_floor"] for part, _ in sets),
        )
    ]
    agreement = _agreement_figure(first, unit)
    figures += [agreement] if agreement else []
    return Block(figures, [_influence_table([part for part, _ in sets], unit)], run.heading(iteration))


def influence_figure(
    sets: Sequence[Sample], unit: Unit, marks: Mapping[str, float], threshold: float, noise_floor: float
) -> Figure:
    """Draw the distribution of influence against the student in each set.

    Args:
        sets: influence of each set, nats.
        unit: unit of the axis.
        marks: influence of each baseline by name, nats.
        threshold: influence above which an example is helpful, nats.
        noise_floor: half the width of the band around the threshold, nats.
    """
    scaled, edges, outliers = _binned(sets, unit, threshold)
    lines = {name: unit.scale(nats) for name, nats in marks.items()}
    both = len(scaled) > 1
    figure = histogram_figure(
        "Influence before and after the teacher's update" if both else "Influence before the teacher's update",
        f"Examples right of the solid line, the threshold, help{'; if the update worked, blue is further right' * both}. "
        "The labelled lines are the baselines: the student as it is (0), the null step, the median. The grey band, if wide "
        f"enough to be visible, is the noise floor.{outliers}",
        scaled,
        edges,
        f"influence against the student, {unit}",
    )
    if noise_floor:
        band = (unit.scale(threshold - noise_floor), unit.scale(threshold + noise_floor))
        figure.plot.add_vrect(*band, fillcolor=GREY, opacity=0.3, line_width=0)
    for row, (name, position) in enumerate(lines.items()):
        figure.plot.add_vline(position, line_dash="dash", annotation={"text": name, "yshift": -18 * row})
    figure.plot.add_vline(unit.scale(threshold), line_dash="solid")
    shown = [float(edges[0]), float(edges[-1]), *lines.values()]
    margin = 0.03 * (max(shown) - min(shown))
    figure.plot.update_xaxes(range=[min(shown) - margin, max(shown) + margin])
    return figure


def distribution_figure(title: str, reading: str, sets: Sequence[Sample], unit: Unit) -> Figure:
    """Draw distributions of influence against the student as it is, with a line at 0.

    Args:
        title: title of the figure.
        reading: how to read it.
        sets: influence of each set, nats.
        unit: unit of the axis.
    """
    scaled, edges, outliers = _binned(sets, unit, 0.0)
    axis = f"influence against the student, {unit}"
    figure = histogram_figure(title, reading + outliers, scaled, edges, axis)
    figure.plot.add_vline(0.0, line_dash="solid")
    return figure


def _teachers(run: RunData, unit: Unit) -> Figure | None:
    """Draw Figure 3c; not for a single iteration, whose figure shows the same."""
    if len(run.iterations) < 2 or len(run.teachers) < 2:
        return None
    return distribution_figure(
        "Influence of what each teacher writes (Figure 3c)",
        "If the updates work, each teacher's distribution is further right than the previous one. Each is measured on the "
        "student of its iteration; right of the line, the step lowers that student's reference loss.",
        [Sample.numbered(f"Teacher {number}", part.values, number) for number, part in run.teachers.items()],
        unit,
    )


def _batches(run: RunData) -> Figure | None:
    """Draw Figure 3d."""
    size = run.setting("training", "batch_size", 32)
    sets = [
        (f"Teacher {iteration.number} (updated)", iteration.training_influence, colour_of(iteration.number), "solid")
        for iteration in run.iterations
        if iteration.training_influence
    ]
    if run.unmodified_influence:
        sets.append(("Teacher 0 (unmodified)", run.unmodified_influence, BEFORE, "dash"))
    lines = []
    for label, part, colour, dash in sets:
        shares = positive_shares(part, size)
        if shares:
            lines.append(Line(label, list(shares), list(shares.values()), colour, dash))
    if not lines:
        return None
    return line_figure(
        "Share of positive influence per training batch (Figure 3d)",
        f"The share of examples that lower the student's reference loss, whatever the threshold, among each {count(size)} "
        "examples of the training set, in the order the teacher wrote them. The updated teacher's line should be above the "
        "unmodified one's. Influence is measured on the warm student; training uses another order of batches.",
        lines,
        "batch",
        "share of positive influence",
        limits=(-0.02, 1.02),
    )


def positive_shares(part: InfluenceData, size: int) -> dict[int, float]:
    """Return the share of measured examples of positive influence by batch number, from 1; empty batches are omitted.

    It is positive if the step lowers the student's reference loss, as in Section 5.2: the threshold of the preference pairs
    may be the median of the probing set, above which half of the unmodified teacher's examples are.
    """
    values, statuses = part.table["influence_student"].to_pylist(), part.table["status"].to_pylist()
    shares = {}
    for start in range(0, len(values), size):
        batch = slice(start, start + size)
        measured = [value for value, status in zip(values[batch], statuses[batch], strict=True) if status == "ok"]
        if measured:
            shares[start // size + 1] = sum(value > 0.0 for value in measured) / len(measured)
    return shares


def _agreement_figure(part: InfluenceData, unit: Unit) -> Figure | None:
    """Draw estimated against exact influence of the audited examples."""
    table = part.table
    both = pc.and_(pc.is_valid(table["first_order_null_step"]), pc.equal(table["status"], "ok"))
    audited = table.filter(pc.and_(table["audited"], both))
    if audited.num_rows < 2:
        return None
    estimated, exact = (
        unit.scale(1.0) * audited[name].to_numpy() for name in ("first_order_null_step", "influence_null_step")
    )
    estimator = part.screening.estimator_name if part.screening else "first order"
    floor = unit.scale(part.summary["noise_floor"])
    ends = [float(min(estimated.min(), exact.min())), float(max(estimated.max(), exact.max()))]
    points = go.Scatter(
        mode="markers",
        name=f"{count(audited.num_rows)} audited examples",
        x=estimated.tolist(),
        y=exact.tolist(),
        marker={"color": AFTER, "size": 7, "opacity": 0.7},
        hovertemplate=f"{estimator} %{{x:.4g}}, exact %{{y:.4g}}<extra></extra>",
    )
    sides = [("equal", 0.0, "solid"), ("noise floor", floor, "dot"), ("", -floor, "dot")]
    lines = [
        go.Scatter(
            mode="lines",
            name=name,
            showlegend=bool(name),
            x=ends,
            y=[end + shift for end in ends],
            line={"color": GREY, "width": 1.5, "dash": dash},
            hoverinfo="skip",
        )
        for name, shift, dash in sides
    ]
    screening = part.screening
    rank = (
        f" Rank correlation {screening.spearman:.3f}." if screening and formatting.is_finite(screening.spearman) else ""
    )
    axes = [f"{name}, against the null step, {unit}" for name in (estimator, "exact")]
    return Figure(
        f"{estimator.replace(' ', '-').capitalize()} estimate against exact influence",
        "Each dot is an audited example, measured with both estimators; the closer to the line, the better they agree. "
        "Distances within the dotted lines are noise. An offset common to all dots is corrected in the table."
        f"{rank}",
        new_plot([*lines, points], 400, *axes),
        ["example_id", *axes],
        list(zip(audited["example_id"].to_pylist(), estimated.tolist(), exact.tolist(), strict=True)),
    )


def _helpful_without_length(part: InfluenceData, line: LengthLine) -> str:
    return share_of(int((part.values_at_mean_length(line) > part.threshold).sum()), len(part.values))


def _explained_by_length(part: InfluenceData) -> str:
    total = float(np.var(part.values)) if len(part.values) else 0.0
    rest = float(np.var(part.values_at_mean_length(part.length_line)))
    return formatting.share(1.0 - rest / total) if total else UNKNOWN


def _influence_table(sets: Sequence[InfluenceData], unit: Unit) -> Table:
    def row(name: str, text_of: Callable[[InfluenceData], str]) -> list[str]:
        return [name, *map(text_of, sets)]

    def median(part: InfluenceData, origin: float) -> str:
        return unit.text(float(np.median(part.values)) - origin) if len(part.values) else UNKNOWN

    line = sets[0].length_line  # the probing set's also for the training set, whose responses may all be longer
    rows = [
        row("examples measured", lambda part: count(len(part.values))),
        row("examples excluded", lambda part: count(part.table.num_rows - len(part.values))),
        row("share that helps (better than the threshold)", lambda part: _interval(part, "share_positive")),
        row("share that helps, adjusted for response length", lambda part: _helpful_without_length(part, line)),
        row("variance of influence that response length explains", _explained_by_length),
        row("share better than the student as it is", lambda part: _interval(part, "share_positive_student")),
        row("share better than the null step", lambda part: _interval(part, "share_positive_null_step")),
        row(f"median influence against the student ({unit})", lambda part: median(part, 0.0)),
        row(
            f"median influence against the null step ({unit})",
            lambda part: median(part, part.summary["null_step_influence"]),
        ),
        row(f"threshold, against the student ({unit})", lambda part: unit.text(part.threshold)),
        row(
            f"influence of the null step, against the student ({unit})",
            lambda part: unit.text(part.summary["null_step_influence"]),
        ),
        row(f"noise floor ({unit})", lambda part: unit.size(part.summary["noise_floor"])),
        row(
            f"standard error over the reference examples ({unit}, root mean square)",
            lambda part: unit.size(part.summary["standard_error"]),
        ),
        row(
            "reference loss of the student (nats per token)", lambda part: formatting.loss(part.summary["student_loss"])
        ),
        row(
            "coordinates that the example's gradient dominates (median share)",
            lambda part: formatting.share(part.summary["median_dominated_share"]),
        ),
    ]
    if any(part.screening for part in sets):
        rows += [
            row("measured exactly", _measured_exactly),
            row("signs of the estimates that agree with exact ones", lambda part: _agreement(part, "estimated")),
            row("signs that agree after correction and confirmation", lambda part: _agreement(part, "screened")),
        ]
    return Table(
        "Influence in numbers; in parentheses the 95 % Wilson interval of each share",
        ["", *(part.label for part in sets)],
        rows,
    )


def _measured_exactly(part: InfluenceData) -> str:
    if part.screening is None:
        return UNKNOWN
    if part.screening.fell_back:
        return f"all: {part.screening.estimator_name} was inaccurate"
    return f"{count(part.screening.audited)} to audit, {count(part.screening.confirmed)} in doubt"


def _agreement(part: InfluenceData, which: str) -> str:
    return str(getattr(part.screening, which)) if part.screening else UNKNOWN


def _interval(part: InfluenceData, share: str) -> str:
    value = part.summary[share]
    return share_of(round(value * len(part.values)), len(part.values)) if formatting.is_finite(value) else UNKNOWN


def share_of(part: int, examples: int) -> str:
    """Write a share of examples with its 95 % interval (Wilson)."""
    if not examples:
        return UNKNOWN
    return share_text(part / examples, share_interval(part, examples))


def share_text(value: float, interval: tuple[float, float]) -> str:
    """Write a share with its interval."""
    low, high = map(formatting.share, interval)
    return f"{formatting.share(value)} ({low} to {high})"


def histogram_edges(values: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.float64]:
    """Return the edges of equal bins with an edge at the threshold; outliers do not extend the range."""
    if not len(values):
        return threshold + np.array([-1.0, 0.0, 1.0])
    lower, upper = np.percentile(values, [25, 75]) - threshold
    low, high = float(values.min()) - threshold, float(values.max()) - threshold
    bins = 12.0
    if upper > lower:
        margin = 4 * float(upper - lower)
        low, high = max(low, float(lower) - margin), min(high, float(upper) + margin)
        freedman_diaconis = 2 * float(upper - lower) / len(values) ** (1 / 3)
        bins = min(60.0, max(12.0, (high - low) / freedman_diaconis))
    scale = max(abs(low), abs(high), abs(threshold))
    width = (max(high - low, 1e-9 * scale) or 1.0) / bins
    first = math.floor(low / width)
    last = max(math.ceil(high / width), first + 1)
    return threshold + width * np.arange(first, last + 1, dtype=np.float64)


def _binned(sets: Sequence[Sample], unit: Unit, threshold: float) -> tuple[list[Sample], npt.NDArray[np.float64], str]:
    """Return the sets in the unit, their common bin edges, and a sentence about values outside the bins."""
    scaled = [
        Sample(part.label, unit.scale(1.0) * part.values, part.colour, part.dash) for part in sets if len(part.values)
    ]
    pooled = np.concatenate([part.values for part in scaled]) if scaled else np.zeros(0)
    edges = histogram_edges(pooled, unit.scale(threshold))
    outside = int(((pooled < edges[0]) | (pooled > edges[-1])).sum())
    outliers = f" The first and last bars include {count(outside)} examples outside the range." if outside else ""
    return scaled, edges, outliers

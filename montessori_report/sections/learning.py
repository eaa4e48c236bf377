"""What the teacher of a study learned (Figure 3): influence of its training set and the baseline's, and its checkpoints."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from montessori_core import formatting
from montessori_core.data.tables import INFLUENCE, read_table
from montessori_core.evaluation.statistics import share_interval_of_seeds
from montessori_core.formatting import UNKNOWN, Unit, count
from montessori_report.figures import GREY, Figure, Line, Sample, colour_of, dash_of, line_figure
from montessori_report.html import Block, Section, Table
from montessori_report.run_data import InfluenceData
from montessori_report.sections.influence import INTRODUCTION, distribution_figure, positive_shares, share_text


def learning_section(
    teachers: Sequence[dict[str, Any]], folder: Path, batch_size: int, baseline: str, colours: Mapping[str, str]
) -> Section | None:
    """Return the section of Figure 3; None if the study did not measure anything of it.

    Args:
        teachers: `teachers` of the study's result, a row for each seed.
        folder: folder of the study.
        batch_size: examples of a training batch.
        baseline: the method that gains are over.
        colours: colour of each method.

    Raises:
        DataError: an influence table cannot be read.
    """
    measured: dict[str, list[InfluenceData]] = defaultdict(list)
    for seed in teachers:
        for row in seed["influence"]:
            table = read_table(folder / row["table"], INFLUENCE)
            measured[row["method"]].append(InfluenceData(row["method"], table, row["threshold"]))
    blocks, introduction = [], ""
    if measured:
        unit = formatting.unit_of(
            value - part.summary["null_step_influence"]
            for parts in measured.values()
            for part in parts
            for value in part.values
        )
        introduction = INTRODUCTION.format(unit=unit) + (
            " Here it is that of the training examples of two methods on the warm student of the first iteration, over all "
            "seeds. Examples above the threshold of the preference pairs are helpful. With several seeds, the interval of "
            "their share is over the seeds."
        )
        figures = [_distributions(measured, unit, colours), _batches(measured, batch_size, colours)]
        blocks.append(Block(figures, [_influence_table(measured, unit)]))
    if any(seed["checkpoints"] for seed in teachers):
        blocks.append(Block([_checkpoints(teachers, baseline)], [_checkpoint_table(teachers)], "From step to step"))
    return Section("learning", "What the teacher learned", blocks, introduction=introduction) if blocks else None


def _distributions(measured: Mapping[str, Sequence[InfluenceData]], unit: Unit, colours: Mapping[str, str]) -> Figure:
    return distribution_figure(
        "Influence of what each method trains on (Figure 3c)",
        "Right of the line, the step lowers the student's reference loss. In the paper, the distribution moves to the right "
        "as the teacher is updated.",
        [
            Sample(method, np.concatenate([part.values for part in parts]), colours.get(method, GREY))
            for method, parts in measured.items()
        ],
        unit,
    )


def _batches(measured: Mapping[str, Sequence[InfluenceData]], size: int, colours: Mapping[str, str]) -> Figure:
    lines = []
    for method, parts in measured.items():
        shares: dict[int, list[float]] = defaultdict(list)
        for part in parts:
            for batch, share in positive_shares(part, size).items():
                shares[batch].append(share)
        means = [float(np.mean(shares[batch])) for batch in sorted(shares)]
        lines.append(Line(method, sorted(shares), means, colours.get(method, GREY)))
    return line_figure(
        "Share of positive influence per training batch (Figure 3d)",
        f"The share of examples that lower the student's reference loss, whatever the threshold, among each {count(size)} "
        "examples of the training set, in the order in which they were written; means over the seeds. Influence is measured "
        "on the warm student; in the paper, on the student in training. There, the updated teacher's share stays above the "
        "unmodified one's, and both fall.",
        lines,
        "batch",
        "share of positive influence",
        limits=(-0.02, 1.02),
    )


def _influence_table(measured: Mapping[str, Sequence[InfluenceData]], unit: Unit) -> Table:
    rows = []
    for method, parts in measured.items():
        values = np.concatenate([part.values for part in parts])
        helpful = [(int((part.values > part.threshold).sum()), len(part.values)) for part in parts]
        share = mean = UNKNOWN
        if len(values):
            interval = share_interval_of_seeds(helpful)
            share = share_text(sum(part for part, _ in helpful) / len(values), interval)
            mean = unit.text(float(values.mean()))
        rows.append([method, count(len(values)), share, mean])
    columns = ["Method", "Examples measured", "Helpful (95 % interval)", f"Mean influence, {unit}"]
    return Table("Influence of training examples", columns, rows)


def _checkpoints(teachers: Sequence[dict[str, Any]], baseline: str) -> Figure:
    lines = []
    for number, seed in enumerate(teachers):
        rows = [
            row
            for row in seed["checkpoints"]
            if formatting.is_finite(row["margin"]) and formatting.is_finite(row["gain"])
        ]
        margins, gains = [row["margin"] for row in rows], [row["gain"] for row in rows]
        lines.append(Line(f"seed {seed['seed']}", margins, gains, colour_of(number), dash_of(number)))
    return line_figure(
        "Teacher checkpoints: margin and student (Figures 3a, 3b)",
        "Each dot is a student trained on the data of the teacher at one step of its update: to the right, the teacher "
        f"prefers the chosen instructions more, in the mean over the steps since the dot before; above the line, the student "
        f"is better than with {baseline}. In the paper, students improve with the margin.",
        lines,
        "DPO reward margin",
        f"gain over {baseline}, nats per token",
        level=0.0,
    )


def _checkpoint_table(teachers: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            str(seed["seed"]),
            count(row["step"]),
            formatting.significant(row["margin"]) if formatting.is_finite(row["margin"]) else UNKNOWN,
            formatting.loss(row["held_out_loss"]),
            formatting.signed(row["gain"]),
        ]
        for seed in teachers
        for row in seed["checkpoints"]
    ]
    return Table("Students of teacher checkpoints", ["Seed", "Step", "Margin", "Held-out loss", "Gain"], rows)

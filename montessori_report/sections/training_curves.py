"""Training curves: losses, rewards, learning rates, and teacher checkpoints (Figures 3a and 3b)."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from montessori_core import formatting
from montessori_core.config import TeacherUpdate
from montessori_report.figures import (
    AFTER,
    BEFORE,
    CHOSEN,
    CONFIDENCE,
    REJECTED,
    TEACHER,
    WARM,
    Figure,
    Line,
    line_figure,
    new_plot,
)
from montessori_report.html import Block, Section, Table
from montessori_report.run_data import IterationData, Log, RunData


def learning_section(run: RunData) -> Section:
    """Return the section of training curves."""
    return Section(
        "learning",
        "Learning curves",
        [block for iteration in run.iterations if (block := _learning(iteration, run))],
        absent="No training has finished yet.",
    )


def _learning(iteration: IterationData, run: RunData) -> Block | None:
    logs = iteration.logs
    students = [
        ("student, warm-up", logs["warmup"], WARM, "dot"),
        ("student, updated teacher's data", logs["student"], AFTER, "solid"),
        ("student, unmodified teacher's data", logs["unmodified"], BEFORE, "dash"),
    ]
    losses = [Line.of_log(label, log, "loss", *style) for label, log, *style in students if log]
    rates = [Line.of_log(label, log, "learning_rate", *style) for label, log, *style in students if log]
    teacher = [Line.of_log("teacher update (DPO)", logs["teacher"], "loss", TEACHER)] if logs["teacher"] else []
    if teacher:
        rates.append(Line.of_log("teacher update", logs["teacher"], "learning_rate", TEACHER, "dashdot"))
    if not rates:
        return None
    figures = []
    if losses:
        figures.append(
            _curve_figure(
                "Training loss of the students",
                "The loss should fall steadily, without jumps. The students are trained on different data, so compare their "
                "held-out losses, not these.",
                losses,
                "loss, nats per token",
            )
        )
    if teacher:
        figures += _teacher_figures(run, logs["teacher"], teacher)
    figures.append(
        _curve_figure("Learning rate", "The scheduled learning rate of each optimizer step.", rates, "learning rate")
    )
    checkpoints = [entry for entry in iteration.records("teacher_checkpoints") if _is_complete(entry)]
    if len(checkpoints) > 1:
        figures += _checkpoint_figures(checkpoints)
    return Block(figures, [_learning_table([*losses, *teacher])], run.heading(iteration))


def _curve_figure(
    title: str,
    reading: str,
    lines: Sequence[Line],
    axis: str,
    level: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw values over optimizer steps, with a dotted line at `level`."""
    figure = line_figure(title, reading, lines, "optimizer step", axis, level, limits)
    if max(len(line.x) for line in lines) <= 12:
        figure.plot.update_xaxes(dtick=1)
    return figure


def _teacher_figures(run: RunData, log: Log, loss: Sequence[Line]) -> list[Figure]:
    rewards = [
        Line.of_log("margin (chosen − rejected)", log, "rewards/margins", TEACHER),
        Line.of_log("chosen", log, "rewards/chosen", CHOSEN, "dash"),
        Line.of_log("rejected", log, "rewards/rejected", REJECTED, "dot"),
    ]
    return [
        _teacher_loss_figure(run, loss),
        _curve_figure(
            "Rewards of the teacher",
            "The margin should rise above 0. If both rewards fall, the teacher only learns to avoid both texts.",
            rewards,
            "reward",
            level=0.0,
        ),
        _curve_figure(
            "Reward accuracy",
            "The share of pairs in a batch whose chosen instruction has the higher reward. The dotted line is chance.",
            [Line.of_log("accuracy", log, "rewards/accuracies", TEACHER)],
            "share of pairs",
            level=0.5,
            limits=(-0.02, 1.02),
        ),
    ]


def _teacher_loss_figure(run: RunData, loss: Sequence[Line]) -> Figure:
    """Draw the loss of an update, and what it is without any preference, if that is one number."""
    default = TeacherUpdate()
    title, axis = "DPO loss of the teacher", "DPO loss"
    if run.setting("teacher_update", "sft_weight", default.sft_weight):
        reading = "The loss of the preferences, and the weighted negative log-likelihood of the chosen instructions."
        return _curve_figure(title, reading, loss, axis)
    level, name = math.log(2), "ln 2"
    if run.setting("teacher_update", "loss", default.loss) == "ipo":
        level, name = (2 * run.setting("teacher_update", "beta", default.beta)) ** -2, "1/(2β)²"
    reading = (
        f"The dotted line is {name}, the loss without any preference; below it, the teacher prefers the chosen "
        "instructions."
    )
    return _curve_figure(title, reading, loss, axis, level=level)


def _is_complete(entry: dict[str, Any]) -> bool:
    return all(formatting.is_finite(entry.get(key)) for key in ("step", "margin", "held_out_loss"))


def _checkpoint_figures(checkpoints: Sequence[dict[str, Any]]) -> list[Figure]:
    steps, margins, losses = ([entry[key] for entry in checkpoints] for key in ("step", "margin", "held_out_loss"))
    errors = [entry.get("standard_error") for entry in checkpoints]
    bars = {"array": [CONFIDENCE * error if formatting.is_finite(error) else 0.0 for error in errors]}
    over_steps = new_plot(
        [
            go.Scatter(name="margin", x=steps, y=margins, marker_size=8, line_color=TEACHER),
            go.Scatter(name="loss", x=steps, y=losses, yaxis="y2", error_y=bars, marker_size=8, line_color=AFTER),
        ],
        420,
        "step of the teacher's update",
        "margin",
        showlegend=False,
        xaxis_anchor="y2",
        yaxis_domain=[0.55, 1.0],
        yaxis2={"title": "held-out loss", "domain": [0.0, 0.45], "anchor": "x"},
    )
    against = go.Scatter(
        mode="markers+text",
        x=margins,
        y=losses,
        text=[f"step {formatting.count(step)}" for step in steps],
        textposition="top center",
        cliponaxis=False,
        error_y=bars,
        marker={"size": 10, "color": AFTER},
        hovertemplate="%{text}: margin %{x:.4g}, loss %{y:.4f}<extra></extra>",
    )
    columns = ["step", "margin", "held-out loss, nats per token", "standard error"]
    rows = list(zip(steps, margins, losses, errors, strict=True))
    return [
        Figure(
            "Teacher checkpoints: margin and student (Figures 3a, 3b)",
            "Top: how strongly the teacher prefers the chosen instructions, in the mean over the steps since the checkpoint "
            "before. Bottom: held-out loss of a student trained on its data, with its 95 % interval. As the margin "
            "rises, the loss should fall.",
            over_steps,
            columns,
            rows,
        ),
        Figure(
            "Margin against student",
            "Each dot is a teacher checkpoint, labelled with its step. A downward trend means that a teacher with a larger "
            "margin writes better data.",
            new_plot([against], 420, "DPO reward margin", "held-out loss, nats per token", showlegend=False),
            columns,
            rows,
        ),
    ]


def _learning_table(losses: Sequence[Line]) -> Table:
    rows = [
        [line.label, formatting.count(len(line.x)), formatting.loss(line.y[0]), formatting.loss(line.y[-1])]
        for line in losses
        if line.x
    ]
    return Table("Trainings, first and last logged loss", ["Training", "Steps", "First loss", "Last loss"], rows)

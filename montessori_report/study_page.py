"""The page of a study: comparison of methods, gain against cost (Figure 15), transfer (Figure 5), and the paper's numbers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from montessori_core import formatting
from montessori_core.config import Study
from montessori_core.data.tables import SIMILARITY, read_table
from montessori_core.formatting import kind_text, score_name, score_text, spread_text
from montessori_report.figures import (
    GREY,
    SYMBOLS,
    Dot,
    Figure,
    Line,
    bar_figure,
    colour_of,
    dash_of,
    dot_figure,
    error_bars,
    escape_markup,
    grouped_dot_figure,
    line_figure,
    new_plot,
)
from montessori_report.html import Block, Page, Section, Table, build_page
from montessori_report.sections.cost import OPERATIONS
from montessori_report.sections.learning import learning_section
from montessori_report.sections.paper import paper_section
from montessori_report.sections.target_kind import accuracy_text, not_shown, share_figure

_CURVE_POINTS = 200

_INTERVAL = (
    "There is one seed: its interval is over the evaluation examples only, and another seed may give another sign.",
    "The 95 % interval is over seeds and evaluation examples, and widened for few seeds. The spread is the standard "
    "deviation of the gain over seeds.",
)
"""What an interval is: of one seed, and of several."""


def study_page(study: Study, result: dict[str, Any], folder: Path) -> Page:
    """Return the page of a study.

    Args:
        study: configuration of the study.
        result: content of its `comparison.json`.
        folder: folder of the study, for its influence tables, and the NormSim tables of method nomad.

    Raises:
        DataError: a table cannot be read.
    """
    rows = result["methods"]
    colours = {row["method"]: colour_of(number) for number, row in enumerate(rows)}
    finite_rows = _finite(rows)
    sections = [
        _gain(study, rows, colours, result["untrained_loss"]),
        Section(
            "cost",
            "Gain against cost",
            [
                Block(
                    [
                        _gain_cost_figure(
                            study, finite_rows, colours, "flops", "floating-point operations of one seed"
                        ),
                        _gain_cost_figure(study, finite_rows, colours, "job_seconds", "job seconds of one seed"),
                        _operations_figure(rows),
                    ]
                )
            ],
            introduction="A stage shared by several methods counts in full for each of them. The evaluation of the student "
            "does not count.",
        ),
    ]
    if kind := result.get("kind_classifier"):
        sections.append(_target_kind(rows, colours, kind))
    if benchmarks := _benchmarks(study, result):
        sections.append(benchmarks)
    if (equal := result.get("equal_response_tokens")) and equal["methods"]:
        sections.append(_equal_tokens(study, equal, colours))
    if result["transfer"]:
        sections.append(_transfer(study, result, colours))
    teachers = result.get("teachers", [])
    batch_size = study.experiment.training.batch_size
    if learning := learning_section(teachers, folder, batch_size, study.baseline, colours):
        sections.append(learning)
    if paper := paper_section(study, rows, [seed["seconds"] for seed in teachers]):
        sections.append(paper)
    if similarity := _similarity(folder):
        sections.append(Section("norm-sim", "Similarity to real examples", [Block([similarity])]))
    facts = [
        ("Student", study.experiment.student.model),
        ("Teacher", study.experiment.teacher.model),
        ("Baseline", study.baseline),
        ("Seeds", ", ".join(map(str, study.seeds))),
    ]
    return build_page("Montessori comparison of methods", study.name, facts, sections)


def _benchmarks(study: Study, result: dict[str, Any]) -> Section | None:
    """Return the benchmark scores of each student, by method (Tables 1 and 2), and the items that training sets share.

    The scores are means over seeds, see `mean_over_seeds`.
    """
    untrained = result.get("untrained_scores")
    first = [{"method": "untrained student", "scores": untrained}] if untrained else []
    tables = [
        _score_table(f"Benchmarks{f' of {student}' if result['transfer'] else ''}", rows)
        for student, rows in _by_student(study, result, first)
        if any(row.get("scores") for row in rows)
    ]
    if any(row.get("contamination") for row in result["methods"]):
        tables.append(_contamination_table(result["methods"]))
    return Section("benchmarks", "Benchmarks", [Block([], tables)]) if tables else None


def _by_student(
    study: Study, result: dict[str, Any], first: Sequence[dict[str, Any]] = ()
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the label and the rows of the study's student, which begin with `first`, then of each transfer student."""
    rows = [[*first, *result["methods"]], *(other["methods"] for other in result["transfer"])]
    return list(zip(study.student_labels(), rows, strict=True))


def _score_table(caption: str, rows: Sequence[dict[str, Any]]) -> Table:
    scores_by_method = [
        {score_name(entry["benchmark"], entry["metric"]): entry for entry in row.get("scores", [])} for row in rows
    ]
    names = list(dict.fromkeys(name for scores in scores_by_method for name in scores))
    lines = [
        [row["method"], *(score_text(scores.get(name)) for name in names)]
        for row, scores in zip(rows, scores_by_method, strict=True)
    ]
    return Table(f"{caption}, means over the seeds ± standard error over seeds and items", ["Method", *names], lines)


def _contamination_table(rows: Sequence[dict[str, Any]]) -> Table:
    copies = {row["method"]: formatting.copies_by_benchmark(row) for row in rows}
    names = list(dict.fromkeys(name for of_method in copies.values() for name in of_method))
    words = next(entry["n"] for row in rows for entry in row.get("contamination", []))
    return Table(
        f"Items that share {words} consecutive words with a method's training sets, over all seeds; scores on them are less "
        "reliable",
        ["Method", *names],
        [
            [method, *(of_method.get(name, formatting.UNKNOWN) for name in names)]
            for method, of_method in copies.items()
        ],
    )


def _finite(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with a finite gain; a diverged student has none."""
    return [row for row in rows if all(formatting.is_finite(row[key]) for key in ("gain", "gain_low", "gain_high"))]


def _gain(study: Study, rows: Sequence[dict[str, Any]], colours: Mapping[str, str], untrained_loss: float) -> Section:
    """Return the gain of each method at equal numbers of examples."""
    return Section(
        "gain",
        "Gain over the baseline",
        [
            Block(
                [_gain_figure("Gain of each method", study, rows, colours)],
                [_table("Methods, means over the seeds", rows)],
            )
        ],
        introduction=f"Each method trains the same student on {study.experiment.training.examples:,} examples. Gain is the "
        f"held-out loss of {study.baseline} minus that of the method; higher is better. {_INTERVAL[len(study.seeds) > 1]} "
        f"Before any training, the loss is {formatting.loss(untrained_loss)}.",
    )


def _gain_dot(label: str, row: dict[str, Any], colour: str) -> Dot:
    return Dot(label, row["gain"], row["gain_low"], row["gain_high"], colour)


def _gain_figure(title: str, study: Study, rows: Sequence[dict[str, Any]], colours: Mapping[str, str]) -> Figure:
    return dot_figure(
        title,
        f"Right of 0, the student is better than with {study.baseline}. An interval that crosses 0 shows no difference.",
        [_gain_dot(row["method"], row, colours[row["method"]]) for row in _finite(rows)],
        f"gain over {study.baseline}, nats per token",
        formatting.signed,
        zero=True,
    )


def _gain_cost_figure(
    study: Study, rows: Sequence[dict[str, Any]], colours: Mapping[str, str], cost: str, axis: str
) -> Figure:
    """Draw the gain of each method against its cost."""
    gain = f"gain over {study.baseline}, nats per token"
    highest = max((row[cost] for row in rows), default=0.0)
    points = [
        go.Scatter(
            mode="markers+text",
            name=escape_markup(row["method"]),
            x=[row[cost]],
            y=[row["gain"]],
            text=[f" {escape_markup(row['method'])} "],
            textposition="middle left" if row[cost] > 0.5 * highest else "middle right",
            cliponaxis=False,
            error_y=error_bars([_gain_dot(row["method"], row, colours[row["method"]])]),
            marker={"color": colours[row["method"]], "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 11},
            hovertemplate="%{text}: gain %{y:.4f} for %{x:.3g}<extra></extra>",
        )
        for number, row in enumerate(rows)
    ]
    limits = [-0.05 * highest, 1.1 * highest] if highest else None
    plot = new_plot(points, 420, axis, gain, showlegend=False, xaxis_range=limits)
    plot.add_hline(0.0, line_dash="dot")
    return Figure(
        f"Gain against {axis.removesuffix(' of one seed')} (Figure 15)",
        "Up and to the left is better: more gain at less cost. A method pays off only if no other is above and to the left "
        "of it. Bars are 95 % intervals.",
        plot,
        ["method", axis, gain, "95 % interval from", "95 % interval to"],
        [(row["method"], row[cost], row["gain"], row["gain_low"], row["gain_high"]) for row in rows],
    )


def _operations_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    operations = {row["method"]: float(row["flops"]) for row in sorted(rows, key=lambda row: -row["flops"])}
    return bar_figure(
        "Floating-point operations of each method (Table 8)",
        f"For one seed. {OPERATIONS} Models behind an API are not counted.",
        "operations",
        operations,
        formatting.significant,
        column="method",
    )


def _target_kind(rows: Sequence[dict[str, Any]], colours: Mapping[str, str], classifier: dict[str, Any]) -> Section:
    """Return the share of each method's examples that are of the kind of the reference set's tasks."""
    dots = [
        Dot(row["method"], row["wanted_kind"], row["wanted_kind_low"], row["wanted_kind_high"], colours[row["method"]])
        for row in rows
        if row.get("wanted_kind") is not None
    ]
    figure = share_figure(
        "Training examples of the target kind",
        "Further to the right, more of the instructions that the student was trained on are of the target kind. With "
        "several seeds, the 95 % intervals are over the seeds; with one, over its instructions (Wilson).",
        dots,
    )
    accuracy = accuracy_text(
        classifier["recall"], classifier["false_positives"], classifier["balanced_accuracy"], classifier["others"]
    )
    return Section(
        "target-kind",
        "Target kind",
        [Block([figure])] if dots else [],
        introduction=f"The target kind of task is that of the reference set. A classifier of words {accuracy}."
        if dots
        else "",
        absent=not_shown(classifier["objection"]),
    )


def _equal_tokens(study: Study, equal: dict[str, Any], colours: Mapping[str, str]) -> Section:
    """Return the gain of each method at equal response tokens: longer responses teach more, whatever they say."""
    rows = equal["methods"]
    limits = ", ".join(f"{limit:,}" for limit in equal["limits"])
    return Section(
        "equal-tokens",
        "Gain at equal response tokens",
        [
            Block(
                [_gain_figure("Gain at equal response tokens", study, rows, colours)],
                [_table("At equal response tokens, means over the seeds", rows)],
            )
        ],
        introduction="Longer responses teach a student more, whatever they say. Here each student learns from the first "
        f"examples of its method within equally many response tokens, by seed: {limits}. Time and operations are those of "
        "the whole set.",
    )


def _transfer(study: Study, result: dict[str, Any], colours: Mapping[str, str]) -> Section:
    """Return Figure 5: other students trained on the same data."""
    students = _by_student(study, result)
    figure = grouped_dot_figure(
        "Gain on each student (Figure 5)",
        f"One group per student; the data was made for the first. Right of 0, a method's data is better for that student "
        f"than the data of {study.baseline}.",
        {
            student: [_gain_dot(row["method"], row, colours.get(row["method"], GREY)) for row in _finite(rows)]
            for student, rows in students
        },
        f"gain over {study.baseline}, nats per token",
    )
    return Section(
        "transfer",
        "Transfer to other students",
        [Block([figure], [_table(f"Transfer to {student}", rows) for student, rows in students[1:]])],
        introduction="The same data, used for students that it was not made for.",
    )


def _similarity(folder: Path) -> Figure | None:
    """Draw the similarity of synthetic examples to real ones (NOMAD, Figure 2)."""
    lines = []
    for number, path in enumerate(sorted(folder.glob("seed-*/methods/nomad/round-*/norm-sim/norm-sim.parquet"))):
        similarity = np.sort(np.asarray(read_table(path, SIMILARITY)["norm_sim"].to_numpy()))[::-1]
        if not len(similarity):
            continue
        ranks = np.unique(np.linspace(0, len(similarity) - 1, _CURVE_POINTS).round().astype(int))
        label = ", ".join(part for part in path.relative_to(folder).parts if part.startswith(("seed-", "round-")))
        shares = ((ranks + 1) / len(similarity)).tolist()
        lines.append(Line(label, shares, similarity[ranks].tolist(), colour_of(number), dash_of(number)))
    if not lines:
        return None
    return line_figure(
        "NormSim of the examples of nomad (NOMAD, Figure 2)",
        "The share of examples with at least this similarity to their nearest real example. Near 1 they repeat it, near 0 "
        "they are unrelated to it; most should be in between.",
        lines,
        "share of the examples",
        "NormSim",
    )


def _table(caption: str, rows: Sequence[dict[str, Any]]) -> Table:
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "Method": lambda row: str(row["method"]),
        "Held-out loss": lambda row: formatting.loss(row["held_out_loss"]),
        "Gain": lambda row: formatting.signed(row["gain"]),
        "95 % interval": formatting.signed_interval,
        "Spread over seeds": lambda row: spread_text(row) if formatting.is_finite(row["gain"]) else formatting.UNKNOWN,
        "Target kind": kind_text,
        "Job time": lambda row: formatting.duration(row["job_seconds"]),
        "Operations": lambda row: formatting.significant(float(row["flops"])),
    }
    if not any(map(kind_text, rows)):  # no usable classifier, or a table of another student of the same data
        del cells["Target kind"]
    return Table(caption, list(cells), [[text_of(row) for text_of in cells.values()] for row in rows])

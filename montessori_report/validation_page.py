"""The page of a validation: how well influence and its rivals predict what training does."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from scipy.stats import rankdata

from montessori_core import formatting
from montessori_report.figures import (
    AFTER,
    BEFORE,
    GREY,
    SYMBOLS,
    Dot,
    Figure,
    colour_of,
    dot_figure,
    escape_markup,
    grouped_dot_figure,
    new_plot,
)
from montessori_report.html import Block, Page, Section, build_page

_COLOURS = {"top": AFTER, "middle": GREY, "bottom": BEFORE}


def validation_page(result: dict[str, Any]) -> Page:
    """Return the page of a validation, given the content of its `validation.json`."""
    subsets, settings = result["random_subsets"], result["settings"]
    sections = [
        Section(
            "subsets",
            "Random subsets",
            [
                Block(
                    [
                        _score_figure("Linear datamodeling score", subsets["scores"]),
                        _outcome_figure("Predicted and measured", subsets, "drop in reference loss, nats per token"),
                    ]
                )
            ],
            introduction=f"The warm student was trained on {len(subsets['measured'])} random subsets of {subsets['size']} of "
            f"{result['examples']} examples. A predictor's score is the rank correlation of its values, summed over a "
            "subset, and the drop in reference loss.",
        )
    ]
    if "left_out" in result:
        left_out = result["left_out"]
        sections.append(
            Section(
                "left-out",
                "Left out",
                [
                    Block(
                        [
                            _score_figure("Score without a group", left_out["scores"]),
                            _outcome_figure(
                                "Predicted and measured without a group",
                                left_out,
                                "loss without the group less loss with it",
                            ),
                        ]
                    )
                ],
                introduction=f"The student was trained on all examples, and on all but one of {len(left_out['measured'])} "
                f"groups of {left_out['size']}. The other examples stay in their batches.",
            )
        )
    sections.append(Section("deciles", "Deciles", [Block([_deciles_figure(result["tenths"])])]))
    facts = [
        ("Student", settings["student"]),
        ("Examples", formatting.count(result["examples"])),
        ("Reference examples", formatting.count(result["reference_examples"])),
        ("Reference loss of the warm student", formatting.loss(result["student_loss"])),
        ("Batch size", formatting.count(settings["batch_size"])),
        ("Learning rate", f"{settings['learning_rate']:g}"),
    ]
    return build_page("Montessori validation of influence", "Does influence predict training?", facts, sections)


def _score_figure(title: str, scores: Sequence[dict[str, Any]]) -> Figure:
    """Draw the score of each predictor that has one."""
    return dot_figure(
        title,
        "1 is a perfect order, 0 is chance, and a negative score predicts the opposite order. Bars are 95 % intervals of a "
        "bootstrap over the trainings.",
        [
            Dot(score["predictor"], score["score"], score["low"], score["high"], colour_of(number))
            for number, score in enumerate(scores)
            if formatting.is_finite(score["score"]) and formatting.is_finite(score["low"])
        ],
        "rank correlation",
        lambda value: f"{value:.2f}",
        zero=True,
    )


def _outcome_figure(title: str, part: dict[str, Any], outcome: str) -> Figure:
    """Draw the outcome of each training against the rank of its prediction; only the first predictor is shown at first."""
    names = [score["predictor"] for score in part["scores"]]
    ranks = {name: rankdata(part["predicted"][name]).tolist() for name in names}
    traces = [
        go.Scatter(
            mode="markers",
            name=escape_markup(name),
            x=ranks[name],
            y=part["measured"],
            visible=True if number == 0 else "legendonly",
            marker={"color": colour_of(number), "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9},
            hovertemplate="rank %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )
        for number, name in enumerate(names)
    ]
    axis = "rank of the prediction"
    return Figure(
        title,
        "One point per training. Points on a rising line: the prediction orders the outcomes. Select a predictor in the "
        "legend to show or hide it.",
        new_plot(traces, 420, axis, outcome),
        ["predictor", axis, "prediction", outcome],
        [
            (name, *cells)
            for name in names
            for cells in zip(ranks[name], part["predicted"][name], part["measured"], strict=True)
        ],
    )


def _deciles_figure(deciles: dict[str, Any]) -> Figure:
    """Draw what training on the deciles of each predictor does."""
    return grouped_dot_figure(
        "Training on a tenth of the examples",
        f"Drop in reference loss after training on the {deciles['size']} examples of highest, middle and lowest value. If "
        "the predictor is good, the top is right of the middle, and the bottom is left of it.",
        {
            row["predictor"]: [Dot.of(part, row[part], None, colour) for part, colour in _COLOURS.items()]
            for row in deciles["falls"]
        },
        "drop in reference loss, nats per token",
    )

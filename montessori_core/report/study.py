"""The page of a study: a table of methods, and what each costs against what it gains."""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from montessori_core.study import Study

_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
"""


def render_study(study: Study, result: dict[str, Any]) -> str:
    """A self-contained HTML page.

    Args:
        study: what was compared.
        result: content of its `comparison.json`.
    """
    name, baseline, rows = html.escape(study.name), html.escape(study.baseline), result["methods"]
    transferred = "".join(
        f"<h2>Transfer to {html.escape(other['student'])}</h2><p>The same data, none of it made for this student.</p>"
        f"{_table(other['methods'])}"
        for other in result["transfer"]
    )
    plots = "".join(
        _against(study, rows, *axis, include_plotlyjs=number == 0)
        for number, axis in enumerate(
            [
                ("job_seconds", "job seconds of one seed, shared stages included"),
                ("flops", "floating-point operations of one seed, shared stages included (Appendix E.3)"),
            ]
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{name}</h1><p>Each method trains the same student on {study.experiment.training.examples:,} examples; "
        f"{len(study.seeds)} seed(s). Gain: held-out loss of {baseline} minus that of the method, so more is better. The "
        "interval resamples the evaluation examples, the spread is the standard deviation over seeds; a gain that is not "
        f"well beyond both is not shown to be one. Before any training the loss is {result['untrained_loss']:.4f}.</p>"
        f"{_table(rows)}<h2>Gain against cost</h2><p>Up and to the left is better. Models behind an API do their operations "
        f"elsewhere.</p>{plots}{transferred}</body></html>"
    )


def _against(study: Study, rows: Sequence[dict[str, Any]], cost: str, title: str, include_plotlyjs: bool) -> str:
    """What each method gains, against what it costs."""
    figure = go.Figure(
        go.Scatter(
            x=[row[cost] for row in rows],
            y=[row["gain"] for row in rows],
            text=[row["method"] for row in rows],
            mode="markers+text",
            textposition="top center",
            error_y={
                "type": "data",
                "array": [max(0.0, row["gain_high"] - row["gain"]) for row in rows],
                "arrayminus": [max(0.0, row["gain"] - row["gain_low"]) for row in rows],
            },
        )
    )
    figure.update_layout(
        template="plotly_white",
        xaxis_title=title,
        yaxis_title=f"gain over {study.baseline}, nats per token",
    )
    html_of_figure: str = figure.to_html(full_html=False, include_plotlyjs=include_plotlyjs)
    return html_of_figure


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(row['method'])}</td><td>{row['held_out_loss']:.4f}</td><td>{gain_text(row)}</td>"
        f"<td>{interval_text(row)}</td><td>{spread_text(row)}</td><td>{row['job_seconds']:,.0f} s</td>"
        f"<td>{row['flops']:.2e}</td></tr>"
        for row in rows
    )
    return (
        "<table><thead><tr><th>method</th><th>held-out loss</th><th>gain</th><th>95 % interval</th><th>spread over seeds"
        f"</th><th>job time</th><th>FLOPs</th></tr></thead><tbody>{lines}</tbody></table>"
    )


def gain_text(row: dict[str, Any]) -> str:
    """The gain of a row, with its sign."""
    return f"{row['gain']:+.4f}"


def interval_text(row: dict[str, Any]) -> str:
    """The interval of a row's gain; the baseline has none."""
    return "" if row["gain_low"] == row["gain_high"] == 0.0 else f"{row['gain_low']:+.4f} to {row['gain_high']:+.4f}"


def spread_text(row: dict[str, Any]) -> str:
    """The spread of a row's gain over seeds; one seed has none."""
    return "" if row["spread_over_seeds"] is None else f"{row['spread_over_seeds']:.4f}"

"""Scores of `montessori evaluate` in the card of a model that this project trained.

An evaluation has a section of its own, between two comments, and entries in `model-index` of the YAML header, which the
Hugging Face hub shows. The rest of the card is kept byte for byte.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_core.config import dump_yaml
from montessori_core.data.cards import CARD, LONGEST_CARD, parse_header
from montessori_core.export.markdown import escape, table
from montessori_core.files import commit
from montessori_core.formatting import is_finite, task_name

_TAG = "montessori"
_INDEX = re.compile(r"^model-index:.*\n(?:(?:[ -].*)?\n)*", re.MULTILINE)
_HEADER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """Results of an evaluation of a model.

    Attributes:
        name: of the evaluation; letters, digits and '._-'.
        data: name of the evaluation set, for publication.
        date: of the measurement, as 2026-11-28.
        examples: number of examples of the evaluation set.
        loss: mean and standard error of the held-out loss, nats per token.
        scores: rows of `montessori_core.evaluation.scores`.
    """

    name: str
    data: str
    date: str
    examples: int
    loss: Mapping[str, float]
    scores: list[dict[str, Any]]


def add_scores(evaluated: Evaluated, folder: Path) -> None:
    """Write an evaluation into the card of the model in a folder, in place of an earlier one of that name.

    Without a card of this project, or if the folder cannot be written, nothing happens but a line in the log.
    """
    path = folder / CARD
    try:
        if not path.is_file() or path.is_symlink() or path.stat().st_size > LONGEST_CARD:  # links: the hub's cache
            log.info("%s has no card of a model that Montessori trained: scores are in the evaluation's folder", folder)
            return
        card = path.read_bytes().decode()  # with its line ends
        content = card_with_scores(card, folder.resolve().name, evaluated)
        if content is None:
            log.info("%s is no card of Montessori: scores are in the evaluation's folder", path)
        elif content != card:
            with commit(path) as temporary:
                temporary.write_bytes(content.encode())
            log.info("%s: added the scores of %s", path, evaluated.name)
    except (OSError, UnicodeDecodeError) as error:
        log.info("%s: scores are not added (%s)", path, error)


def card_with_scores(card: str, model: str, evaluated: Evaluated) -> str | None:
    """Return a model's card with the scores of an evaluation; None if it is no card of this project.

    Args:
        card: text of the card.
        model: name of the model.
        evaluated: the evaluation.
    """
    match = _HEADER.match(card)
    header = parse_header(card)
    if match is None or not isinstance(header.get("tags"), list) or _TAG not in header["tags"]:
        return None
    body = card[match.end() :]
    begin, end = f"<!-- montessori evaluate: {evaluated.name} -->\n", f"<!-- end of {evaluated.name} -->\n"
    section = f"{begin}{_section(evaluated)}{end}"
    before, found, rest = body.partition(begin)
    _, closed, after = rest.partition(end)
    body = f"{before}{section}{after}" if found and closed else body.rstrip("\n") + f"\n\n{section}"
    index = {"model-index": _index(header.get("model-index"), model, evaluated)}
    content = f"---\n{_INDEX.sub('', match[1])}{dump_yaml(index)}---\n{body}"
    return content if parse_header(content) == header | index else None


def _section(evaluated: Evaluated) -> str:
    rows = [("held-out loss, nats per token", *_number(evaluated.loss), evaluated.examples)]
    rows += [
        (f"{task_name(score['benchmark'])}, {score['metric']}", *_number(score), score["examples"])
        for score in evaluated.scores
        if score["mean"] is not None
    ]
    return (
        f"## Evaluation {escape(evaluated.name)}\n\n"
        f"By `montessori evaluate` on {escape(evaluated.date)}; held-out loss on {escape(evaluated.data)}, the mean over its "
        f"examples.\n\n{table(('measure', 'mean', 'standard error', 'examples'), rows)}"
    )


def _number(score: Mapping[str, Any]) -> tuple[str, str]:
    error = score["standard_error"]
    return f"{score['mean']:.4f}", f"{error:.4f}" if is_finite(error) else ""


def _index(present: Any, model: str, evaluated: Evaluated) -> list[dict[str, Any]]:
    """Return the model-index of a card: results of other evaluations are kept."""
    entry = present[0] if isinstance(present, list) and present and isinstance(present[0], dict) else {}
    others = entry.get("results")
    kept = [
        other
        for other in (others if isinstance(others, list) else [])
        if isinstance(other, dict)
        and isinstance(data := other.get("dataset"), dict)
        and data.get("config") != evaluated.name
    ]
    return [{"name": entry.get("name") or model, "results": [*kept, *_results(evaluated)]}]


def _results(evaluated: Evaluated) -> list[dict[str, Any]]:
    """Return the finite results of an evaluation, one per data set, in the hub's form."""
    metrics: dict[str, list[dict[str, Any]]] = {}
    if math.isfinite(evaluated.loss["mean"]):
        loss = {"type": "loss", "value": _rounded(evaluated.loss["mean"]), "name": "held-out loss, nats per token"}
        metrics[evaluated.data] = [loss]
    for score in evaluated.scores:
        if score["mean"] is not None:
            metric = {"type": score["metric"], "value": _rounded(score["mean"]), "name": score["metric"]}
            metrics.setdefault(task_name(score["benchmark"]), []).append(metric)
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": name, "type": name, "config": evaluated.name},
            "metrics": values,
        }
        for name, values in metrics.items()
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

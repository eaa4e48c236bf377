"""The report: one self-contained HTML page for a run.

The page asks nothing of any network, and every text that a model wrote is data on it: Jinja escapes it, Plotly never sees
it, and the page's policy allows only the two scripts whose hashes it names, so that even text that slipped through could
not run.
"""

import base64
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from montessori_core.report import figures as fig
from montessori_core.report import numbers
from montessori_core.report.contents import Contents, Influence, Iteration, Log, Synthesis, missing_parts, read_contents
from montessori_core.report.numbers import UNKNOWN, Unit

PAIRS_SHOWN = 20
EXAMPLES_SHOWN = 2000
REJECTIONS_SHOWN = 30
_BASELINES = {"null_step": "null step", "student": "student"}
_THRESHOLDS = {
    "student": "the student as it is",
    "null_step": "the null step",
    "median": "the median of the probing set",
}
_OTHERS = {"unmodified": "unmodified teacher's student", "untrained": "untrained student"}
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Block:
    """Figures and the table with their numbers, under a heading of their own if there is one."""

    figures: Sequence[fig.Figure]
    table: Table | None
    heading: str | None = None


@dataclass(frozen=True)
class Card:
    """A key figure."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What the run shows, in a line; `tone` picks the colour."""

    tone: Literal["better", "worse", "noise", "open"]
    headline: str
    sentence: str


def render_report(folder: Path) -> str:
    """The report of the run in `folder`, from whatever of it is there.

    Raises:
        DataError: a table is there but cannot be read.
    """
    run = read_contents(folder)
    unit = _influence_unit(run)
    plotly, script = get_plotlyjs(), _asset("script.js")
    environment = Environment(
        loader=PackageLoader("montessori_core", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    page = environment.get_template("template.html.j2")
    return page.render(
        run=run,
        unit=unit,
        facts=_facts(run),
        verdict=judge(run),
        missing=missing_parts(run),
        cards=[(iteration, _cards(iteration, run)) for iteration in run.iterations],
        synthesis=_synthesis(run.syntheses),
        influence=[_influence(iteration, run, unit) for iteration in run.iterations if iteration.influence],
        learning=[block for iteration in run.iterations if (block := _learning(iteration, run))],
        held_out=_held_out(run),
        pairs=[(part, _pairs(part)) for part in run.iterations if part.preferences is not None],
        examples=[(part, _examples(part)) for part in run.iterations if part.probing.examples is not None],
        rejections=_rejections(run.syntheses),
        time=_time(run),
        provenance=_provenance(run),
        style=Markup(_asset("style.css")),
        scripts=[Markup(plotly), Markup(script)],
        script_hashes=[_policy_hash(text) for text in (plotly, script)],
    )


def visible(text: str) -> str:
    """The text with control characters as visible signs; line breaks and tabs stay."""
    return text.translate(_VISIBLE)


def judge(run: Contents) -> Verdict:
    """Whether the updated teacher's student is better than the unmodified teacher's, as far as the run can say."""
    finished = [iteration for iteration in run.iterations if "student" in iteration.held_out_loss]
    if not finished:
        return Verdict("open", "No verdict yet", "No iteration's student has been evaluated on the held-out examples.")
    compared = [iteration for iteration in finished if "student_over_unmodified" in iteration.held_out_gain]
    if not compared:
        return Verdict("open", "No comparison", _without_comparison(finished[-1], run))
    last = compared[-1]
    difference = last.held_out_gain["student_over_unmodified"]
    mean, error = difference["mean"], difference["standard_error"]
    if not (numbers.known(mean) and numbers.known(error)):
        return Verdict("open", "No verdict", "A held-out loss is not a finite number; look at the learning curves.")
    losses = last.held_out_loss
    sentence = (
        f"{f'Iteration {last.number}: the' if run.planned > 1 else 'The'} updated teacher's student has a held-out loss of "
        f"{numbers.loss(losses['student']['mean'])}, the unmodified teacher's "
        f"{numbers.loss(_mean(run, last, 'unmodified'))}: a paired gain of {numbers.gain(mean, error)} nats per token"
    )
    untrained = _loss_to_untrained(run, last)
    if abs(mean) <= 2 * error:
        return Verdict(
            "noise", "Within noise", f"{sentence}, less than two standard errors from no difference.{untrained}"
        )
    if mean < 0:
        return Verdict("worse", "Worse student", f"{sentence}.{untrained}")
    if untrained:
        return Verdict("noise", "Better than unmodified, worse than untrained", f"{sentence}.{untrained}")
    return Verdict("better", "Better student", f"{sentence}.")


def _loss_to_untrained(run: Contents, iteration: Iteration) -> str:
    """A warning where training made the student worse than it was, whichever teacher's data it was trained on."""
    gain = iteration.held_out_gain.get("student_over_untrained")
    if gain is None or not gain["mean"] < -2 * gain["standard_error"]:
        return ""
    return (
        f" But training made it worse than the untrained student, {numbers.loss(_mean(run, iteration, 'untrained'))}: a "
        f"paired gain of {numbers.gain(gain['mean'], gain['standard_error'])}."
    )


def _without_comparison(iteration: Iteration, run: Contents) -> str:
    why = "has not been evaluated yet" if run.compares else "was not asked for"
    sentence = f"The updated teacher's student has a held-out loss of {numbers.loss(_mean(run, iteration, 'student'))}"
    over_untrained = iteration.held_out_gain.get("student_over_untrained")
    if over_untrained:
        paired = numbers.gain(over_untrained["mean"], over_untrained["standard_error"])
        sentence += f", a paired gain of {paired} nats per token over the untrained student"
    return f"{sentence}; a student of the unmodified teacher to compare it with {why}."


def _mean(run: Contents, iteration: Iteration, name: str) -> float | None:
    """Held-out loss of a model; those that are evaluated only once stand with the first iteration."""
    for place in (iteration, *run.iterations):
        if name in place.held_out_loss:
            return place.held_out_loss[name]["mean"]
    return None


def _facts(run: Contents) -> list[tuple[str, str]]:
    finished = sum(iteration.metrics is not None for iteration in run.iterations)
    facts = [
        ("Teacher", run.setting("teacher", "model", UNKNOWN)),
        ("Student", run.setting("student", "model", UNKNOWN)),
        ("Iterations", f"{finished} of {run.planned} finished"),
        ("Helpful means better than", _THRESHOLDS.get(run.baseline, run.baseline)),
        ("Opened", _moment(run.provenance.get("opened"))),
    ]
    return [(name, str(value)) for name, value in facts]


def _moment(text: object) -> str:
    return str(text).replace("T", " ").replace("Z", " UTC") if text else UNKNOWN


def _cards(iteration: Iteration, run: Contents) -> list[Card]:
    return [
        _kept_card(iteration),
        _pairs_card(iteration),
        _positive_card(iteration, run),
        _loss_card(iteration, run),
        _gain_card(iteration),
    ]


def _kept_card(iteration: Iteration) -> Card:
    probing, training = iteration.probing.funnel, iteration.training.funnel
    value = f"{numbers.count(probing['kept'])} of {numbers.count(probing['candidates'])}" if probing else UNKNOWN
    detail = (
        f"probing set; training set {numbers.count(training['kept'])} of {numbers.count(training['candidates'])}"
        if training
        else "probing set; the training set is not there yet"
    )
    return Card("Candidates kept", value, detail)


def _pairs_card(iteration: Iteration) -> Card:
    table = iteration.preferences
    if table is None:
        return Card("Preference pairs", UNKNOWN, "not there yet")
    prompts = len(set(table["prompt_id"].to_pylist()))
    return Card("Preference pairs", numbers.count(table.num_rows), f"from {numbers.count(prompts)} prompts")


def _positive_card(iteration: Iteration, run: Contents) -> Card:
    label = "Share that helps, before → after"
    before, after = iteration.influence, iteration.training_influence
    if before is None:
        return Card(label, UNKNOWN, "influence is not measured yet")
    shares = [numbers.share(part.summary["share_positive"]) for part in (before, after) if part]
    measured = " and ".join(numbers.count(len(part.values)) for part in (before, after) if part)
    return Card(
        label,
        " → ".join(shares),
        f"of {measured} examples, better than {_THRESHOLDS.get(run.baseline, run.baseline)}"
        + ("" if after else "; not measured after the update"),
    )


def _loss_card(iteration: Iteration, run: Contents) -> Card:
    label = "Held-out loss"
    if "student" not in iteration.held_out_loss:
        return Card(label, UNKNOWN, "not evaluated yet")
    others = [
        f"{name} {numbers.loss(mean)}"
        for name in ("unmodified", "untrained")
        if (mean := _mean(run, iteration, name)) is not None
    ]
    return Card(label, numbers.loss(_mean(run, iteration, "student")), "; ".join(others) or "nats per token")


def _gain_card(iteration: Iteration) -> Card:
    for other in ("unmodified", "untrained"):
        gain = iteration.held_out_gain.get(f"student_over_{other}")
        if gain:
            value = numbers.signed(gain["mean"], 4) if numbers.known(gain["mean"]) else UNKNOWN
            error = numbers.loss(gain["standard_error"])
            return Card(f"Gain over {other}", value, f"± {error} nats per token, paired (one standard error)")
    return Card("Gain", UNKNOWN, "no paired comparison recorded")


def _synthesis(sets: Sequence[Synthesis]) -> Block | None:
    counted = [(part.label, part.funnel) for part in sets if part.funnel]
    if not counted:
        return None
    reasons = list(
        dict.fromkeys(step for _, funnel in counted for step in funnel if step not in ("candidates", "kept"))
    )
    rows = [
        [step, *(numbers.count(funnel.get(step, 0)) for _, funnel in counted)]
        for step in ("candidates", *reasons, "kept")
    ]
    rates = [
        numbers.share(funnel["kept"] / funnel["candidates"] if funnel["candidates"] else None) for _, funnel in counted
    ]
    return Block(
        [fig.funnel_figure(label, funnel) for label, funnel in counted],
        Table(
            "Instructions by what became of them",
            ["Step", *(label for label, _ in counted)],
            [*rows, ["share kept", *rates]],
        ),
    )


def _influence_unit(run: Contents) -> Unit:
    tables = [
        part for iteration in run.iterations for part in (iteration.influence, iteration.training_influence) if part
    ]
    return numbers.unit_of(
        float(value) for part in tables for value in part.values - part.summary["null_step_influence"]
    )


def _influence(iteration: Iteration, run: Contents, unit: Unit) -> Block:
    sets = [
        (part, colour)
        for part, colour in ((iteration.influence, fig.BEFORE), (iteration.training_influence, fig.AFTER))
        if part is not None
    ]
    first = sets[0][0]
    marks = {"student": 0.0, "null step": first.summary["null_step_influence"]}
    if run.baseline == "median":
        marks["median"] = first.threshold
    figure = fig.influence_figure(
        [(part.label, part.values, colour) for part, colour in sets],
        unit,
        marks,
        first.threshold,
        max(part.summary["noise_floor"] for part, _ in sets),
    )
    return Block([figure], _influence_table([part for part, _ in sets], unit), _heading(iteration, run))


def _influence_table(sets: Sequence[Influence], unit: Unit) -> Table:
    def row(name: str, text_of: Callable[[Influence], str]) -> list[str]:
        return [name, *map(text_of, sets)]

    def median(part: Influence, origin: float) -> str:
        return unit.text(float(np.median(part.values)) - origin) if len(part.values) else UNKNOWN

    rows = [
        row("examples measured", lambda part: numbers.count(len(part.values))),
        row("examples excluded", lambda part: numbers.count(part.table.num_rows - len(part.values))),
        row("share that helps (better than the threshold)", lambda part: _interval(part, "share_positive")),
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
        row("reference loss of the student (nats)", lambda part: numbers.loss(part.summary["student_loss"])),
    ]
    if any(part.screening for part in sets):
        rows += [
            row("measured exactly", _measured_exactly),
            row("signs of first order that agree with exact ones", lambda part: _agreement(part, "first_order")),
            row("signs that agree after correction and confirmation", lambda part: _agreement(part, "screened")),
        ]
    return Table(
        "Influence in numbers; in brackets the 95 % interval (Wilson) of each share",
        ["", *(part.label for part in sets)],
        rows,
    )


def _measured_exactly(part: Influence) -> str:
    if part.screening is None:
        return UNKNOWN
    if part.screening.fell_back:
        return "all: first order was unfit"
    return f"{numbers.count(part.screening.audited)} to audit, {numbers.count(part.screening.confirmed)} in doubt"


def _agreement(part: Influence, which: str) -> str:
    return str(getattr(part.screening, which)) if part.screening else UNKNOWN


def _interval(part: Influence, share: str) -> str:
    value = part.summary[share]
    if not numbers.known(value):
        return UNKNOWN
    low, high = wilson_interval(value, len(part.values))
    return f"{numbers.share(value)} ({numbers.share(low)} to {numbers.share(high)})"


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in so many independent examples."""
    z = 1.96
    centre = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    reach = z / (1 + z**2 / number) * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _learning(iteration: Iteration, run: Contents) -> Block | None:
    logs = iteration.logs
    trainings = [
        ("student, warm-up", "warmup", fig.WARM, "dot"),
        ("student, updated teacher's data", "student", fig.AFTER, "solid"),
        ("student, unmodified teacher's data", "unmodified", fig.BEFORE, "dash"),
    ]
    losses = [
        fig.Curve(label, logs[name], "loss", colour, dash) for label, name, colour, dash in trainings if logs[name]
    ]
    teacher = logs["teacher"]
    rates = [fig.Curve(c.label, c.log, "learning_rate", c.colour, c.dash) for c in losses]
    if teacher:
        rates.append(fig.Curve("teacher update", teacher, "learning_rate", fig.TEACHER, "dashdot"))
    if not rates:
        return None
    figures = []
    if losses:
        figures.append(
            fig.curve_figure(
                "Training loss of the students",
                "Each student is trained on other data, so compare the held-out losses, not these; what to look for here is "
                "a steady fall without jumps.",
                losses,
                "loss, nats per token",
            )
        )
    if teacher:
        figures += _teacher_figures(teacher)
    figures.append(
        fig.curve_figure(
            "Learning rate", "The rate each optimizer step was taken with, as scheduled.", rates, "learning rate"
        )
    )
    return Block(figures, _learning_table([*losses, *_teacher_loss(teacher)]), _heading(iteration, run))


def _teacher_loss(log: Log) -> list[fig.Curve]:
    return [fig.Curve("teacher update (DPO)", log, "loss", fig.TEACHER)] if log else []


def _teacher_figures(log: Log) -> list[fig.Figure]:
    rewards = [
        fig.Curve("margin (chosen − rejected)", log, "rewards/margins", fig.TEACHER),
        fig.Curve("chosen", log, "rewards/chosen", fig.CHOSEN, "dash"),
        fig.Curve("rejected", log, "rewards/rejected", fig.REJECTED, "dot"),
    ]
    return [
        fig.curve_figure(
            "DPO loss of the teacher",
            "The dotted line is ln 2, the loss of a teacher that prefers neither side; below it the teacher has begun to "
            "prefer the chosen instructions.",
            _teacher_loss(log),
            "DPO loss",
            level=math.log(2),
        ),
        fig.curve_figure(
            "Rewards of the teacher",
            "The margin should rise above 0; if both rewards fall, the teacher only learns to avoid both texts.",
            rewards,
            "reward",
            level=0.0,
        ),
        fig.curve_figure(
            "Reward accuracy",
            "The share of a batch's pairs in which the chosen instruction has the higher reward; the dotted line is chance.",
            [fig.Curve("accuracy", log, "rewards/accuracies", fig.TEACHER)],
            "share of pairs",
            level=0.5,
            limits=(-0.02, 1.02),
        ),
    ]


def _learning_table(curves: Sequence[fig.Curve]) -> Table:
    rows = []
    for curve in curves:
        steps, values = fig.curve_points(curve)
        if values:
            rows.append([curve.label, numbers.count(len(steps)), numbers.loss(values[0]), numbers.loss(values[-1])])
    return Table("Trainings, first and last logged loss", ["Training", "Steps", "First loss", "Last loss"], rows)


def _held_out(run: Contents) -> Block | None:
    first = {name: stat for place in reversed(run.iterations) for name, stat in place.held_out_loss.items()}
    entries = [
        (label, first[name], colour)
        for name, label, colour in (
            ("untrained", "Untrained student", fig.GREY),
            ("unmodified", "Unmodified teacher's student", fig.BEFORE),
        )
        if name in first
    ]
    entries += [
        (_in_iteration("updated teacher's student", iteration, run), iteration.held_out_loss["student"], fig.AFTER)
        for iteration in run.iterations
        if "student" in iteration.held_out_loss
    ]
    gains = [
        (_in_iteration(f"over the {label}", iteration, run), gain, colour)
        for iteration in run.iterations
        for name, label, colour in (
            ("unmodified", _OTHERS["unmodified"], fig.BEFORE),
            ("untrained", _OTHERS["untrained"], fig.GREY),
        )
        if (gain := iteration.held_out_gain.get(f"student_over_{name}"))
    ]
    if not entries:
        return None
    loss_dots, gain_dots = _dots(entries), _dots(gains)
    figures = [fig.loss_figure(loss_dots)] + ([fig.gain_figure(gain_dots)] if gain_dots else [])
    rows = [["Loss: " + label, numbers.loss(s["mean"]), numbers.loss(s["standard_error"])] for label, s, _ in entries]
    rows += [["Gain: " + label, _signed(s["mean"]), numbers.loss(s["standard_error"])] for label, s, _ in gains]
    return Block(
        figures, Table("Held-out losses and paired gains, nats per token", ["", "Mean", "Standard error"], rows)
    )


def _signed(value: float | None) -> str:
    return numbers.signed(value, 4) if numbers.known(value) else UNKNOWN


def _dots(entries: Iterable[tuple[str, dict[str, float], str]]) -> list[fig.Dot]:
    return [
        fig.Dot(label, stat["mean"], stat["standard_error"], colour)
        for label, stat, colour in entries
        if numbers.known(stat["mean"]) and numbers.known(stat["standard_error"])
    ]


def _pairs(iteration: Iteration) -> list[dict[str, Any]]:
    """The pairs with the widest influence gap, each side with the texts of its example."""
    texts = _by_id(iteration.probing.examples)
    gaps = [
        (row["chosen_influence_student"] - row["rejected_influence_student"], row)
        for row in _rows(iteration.preferences)
    ]
    return [
        {
            "prompt_id": row["prompt_id"],
            "gap": gap,
            "sides": [
                {
                    "name": name,
                    "id": row[f"{name}_id"],
                    "instruction": texts.get(row[f"{name}_id"], {}).get("instruction", row[name]),
                    "response": texts.get(row[f"{name}_id"], {}).get("response"),
                    "influence": {of: row[f"{name}_influence_{baseline}"] for baseline, of in _BASELINES.items()},
                }
                for name in ("chosen", "rejected")
            ],
        }
        for gap, row in sorted(gaps, key=lambda pair: -pair[0])[:PAIRS_SHOWN]
    ]


def _by_id(examples: pa.Table | None) -> dict[str, dict[str, Any]]:
    return {row["example_id"]: row for row in _rows(examples)}


def _examples(iteration: Iteration) -> dict[str, Any]:
    """Rows of the probing set with their influence; all examples of the teacher while none is measured."""
    texts = _by_id(iteration.probing.examples)
    if iteration.influence is None:
        rows = [{"status": "not measured", **row} for row in itertools.islice(texts.values(), EXAMPLES_SHOWN)]
        return {"total": len(texts), "rows": rows, "errors": False}
    table = iteration.influence.table
    measured = table.slice(0, EXAMPLES_SHOWN).to_pylist()
    return {
        "total": table.num_rows,
        "rows": [texts.get(row["example_id"], {}) | row for row in measured],
        "errors": any(row["standard_error"] is not None for row in measured),
    }


def _rejections(sets: Sequence[Synthesis]) -> dict[str, Any]:
    """Rejected candidates by reason; the reasons take turns, so that rare ones are seen."""
    by_reason: dict[str, list[dict[str, str]]] = {}
    for part in sets:
        for row in _rows(part.instructions):
            if row["rejection"] is not None:
                text = row["instruction"] or row["raw_output"]
                by_reason.setdefault(row["rejection"], []).append({"set": part.label, "text": text})
    depth = _rows_each([len(rows) for rows in by_reason.values()], REJECTIONS_SHOWN)
    return {
        "total": sum(map(len, by_reason.values())),
        "shown": sum(depth),
        "reasons": [
            (reason, len(rows), rows[:number]) for (reason, rows), number in zip(by_reason.items(), depth, strict=True)
        ],
    }


def _rows_each(available: Sequence[int], wanted: int) -> list[int]:
    """How many rows of each group to show, as even as can be, `wanted` in all."""
    taken = [0] * len(available)
    for turn in range(max(available, default=0)):
        for group, number in enumerate(available):
            if number > turn and sum(taken) < wanted:
                taken[group] += 1
    return taken


def _rows(table: pa.Table | None) -> list[dict[str, Any]]:
    return table.to_pylist() if table is not None else []


def _time(run: Contents) -> Block | None:
    seconds = {stage: value for stage, value in run.job_seconds.items() if numbers.known(value)}
    if not seconds:
        return None
    rows = [[stage, numbers.duration(value)] for stage, value in sorted(seconds.items())]
    rows.append(["all stages", numbers.duration(sum(seconds.values()))])
    return Block([fig.time_figure(seconds)], Table("Job seconds by the folder of the stage", ["Stage", "Time"], rows))


def _provenance(run: Contents) -> Table | None:
    def flat(content: Any, path: str) -> list[list[str]]:
        if isinstance(content, dict):
            return [row for key in sorted(content) for row in flat(content[key], f"{path}.{key}" if path else key)]
        return [[path, UNKNOWN if content is None else str(content)]]

    return Table("Where the run came from", ["", "Value"], flat(run.provenance, "")) if run.provenance else None


def _in_iteration(label: str, iteration: Iteration, run: Contents) -> str:
    heading = _heading(iteration, run)
    return f"{heading}: {label}" if heading else label[0].upper() + label[1:]


def _heading(iteration: Iteration, run: Contents) -> str | None:
    return f"Iteration {iteration.number}" if max(run.planned, len(run.iterations)) > 1 else None


def _asset(name: str) -> str:
    return files("montessori_core.report").joinpath(name).read_text(encoding="utf-8")


def _policy_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

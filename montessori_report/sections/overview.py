"""The top of the report: verdict and key numbers."""

from dataclasses import dataclass
from typing import Literal

from montessori_core import formatting
from montessori_core.formatting import UNKNOWN
from montessori_report.run_data import IterationData, RunData

THRESHOLDS = {
    "student": "the student as it is",
    "null_step": "the null step",
    "median": "the median of the probing set",
    "prompt": "the median of the probing set; in pairs, the mean of the prompt",
}

_ONE_RUN = (
    " The error is over the evaluation examples. Another seed may give the opposite result: two sets by one teacher may "
    "differ as much, so compare several seeds (montessori compare)."
)


@dataclass(frozen=True)
class Card:
    """A key number of an iteration."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The result of a run; `tone` selects the colour."""

    tone: Literal["better", "worse", "noise", "open"]
    headline: str
    sentence: str


def judge(run: RunData) -> Verdict:
    """Return the verdict: is the updated teacher's student better than the unmodified teacher's?"""
    finished = [iteration for iteration in run.iterations if "student" in iteration.held_out_loss]
    if not finished:
        return Verdict("open", "No verdict yet", "No iteration's student has been evaluated on the held-out examples.")
    comparisons = [iteration for iteration in finished if "student_over_unmodified" in iteration.held_out_gain]
    if not comparisons:
        return Verdict("open", "No comparison", _without_comparison(finished[-1], run))
    last = comparisons[-1]
    difference = last.held_out_gain["student_over_unmodified"]
    mean, error = difference["mean"], difference["standard_error"]
    if not formatting.is_finite(mean):
        return Verdict("open", "No verdict", "A held-out loss is not finite; see the learning curves.")
    if not formatting.is_finite(error):
        gain = f"The paired gain is {formatting.signed(mean)} nats per token"
        remedy = "but a single evaluation example gives no standard error; use at least two"
        return Verdict("open", "No verdict", f"{gain}, {remedy}.")
    losses = last.held_out_loss
    sentence = (
        f"{f'Iteration {last.number}: the' if run.planned > 1 else 'The'} updated teacher's student has a held-out loss of "
        f"{formatting.loss(losses['student']['mean'])}, the unmodified teacher's "
        f"{formatting.loss(_mean(run, last, 'unmodified'))}: a paired gain of {formatting.gain(mean, error)} nats per token"
    )
    untrained = _warn_if_worse_than_untrained(run, last)
    if abs(mean) <= 2 * error:
        return Verdict("noise", "Within noise", f"{sentence}, within two standard errors of no difference.{untrained}")
    if mean < 0:
        return Verdict("worse", "Worse student in this run", f"{sentence}.{_ONE_RUN}{untrained}")
    if untrained:
        return Verdict("noise", "Better than unmodified, worse than untrained", f"{sentence}.{untrained}")
    return Verdict("better", "Better student in this run", f"{sentence}.{_ONE_RUN}")


def _warn_if_worse_than_untrained(run: RunData, iteration: IterationData) -> str:
    """Return a warning if training made the student worse than the untrained student."""
    gain = iteration.held_out_gain.get("student_over_untrained")
    if gain is None or not gain["mean"] < -2 * gain["standard_error"]:
        return ""
    return (
        f" But training made it worse than the untrained student, {formatting.loss(_mean(run, iteration, 'untrained'))}: a "
        f"paired gain of {formatting.gain(gain['mean'], gain['standard_error'])}."
    )


def _without_comparison(iteration: IterationData, run: RunData) -> str:
    reason = "has not been evaluated yet" if run.compares else "is not configured"
    sentence = (
        f"The updated teacher's student has a held-out loss of {formatting.loss(_mean(run, iteration, 'student'))}"
    )
    over_untrained = iteration.held_out_gain.get("student_over_untrained")
    if over_untrained:
        paired = formatting.gain(over_untrained["mean"], over_untrained["standard_error"])
        sentence += f", a paired gain of {paired} nats per token over the untrained student"
    return f"{sentence}; the student of the unmodified teacher, for comparison, {reason}."


def _mean(run: RunData, iteration: IterationData, name: str) -> float | None:
    """Return the held-out loss of a model, from the first iteration if this one does not have it."""
    for candidate in (iteration, *run.iterations):
        if name in candidate.held_out_loss:
            return candidate.held_out_loss[name]["mean"]
    return None


def facts_of(run: RunData) -> list[tuple[str, str]]:
    """Return names and values for the header of the report."""
    finished = sum(iteration.metrics is not None for iteration in run.iterations)
    facts = [
        ("Teacher", run.setting("teacher", "model", UNKNOWN)),
        ("Student", run.setting("student", "model", UNKNOWN)),
        ("Iterations", f"{finished} of {run.planned} finished"),
        ("Helpful means better than", THRESHOLDS.get(run.baseline, run.baseline)),
        ("Opened", _format_time(run.provenance.get("opened"))),
    ]
    return [(name, str(value)) for name, value in facts]


def _format_time(text: object) -> str:
    return str(text).replace("T", " ").replace("Z", " UTC") if text else UNKNOWN


def cards_of(iteration: IterationData, run: RunData) -> list[Card]:
    """Return the key numbers of an iteration."""
    cards = [
        _kept_card(iteration),
        _pairs_card(iteration),
        _positive_card(iteration, run),
        _kind_card(iteration, run),
        _loss_card(iteration, run),
        _gain_card(iteration),
    ]
    return [card for card in cards if card is not None]


def _kept_card(iteration: IterationData) -> Card:
    probing, training = iteration.probing.funnel, iteration.training.funnel
    value = f"{formatting.count(probing['kept'])} of {formatting.count(probing['candidates'])}" if probing else UNKNOWN
    detail = (
        f"probing set; training set {formatting.count(training['kept'])} of {formatting.count(training['candidates'])}"
        if training
        else "probing set; no training set yet"
    )
    return Card("Candidates kept", value, detail)


def _pairs_card(iteration: IterationData) -> Card:
    table = iteration.preferences
    if table is None:
        return Card("Preference pairs", UNKNOWN, "none yet")
    prompts = len(set(table["prompt_id"].to_pylist()))
    return Card("Preference pairs", formatting.count(table.num_rows), f"from {formatting.count(prompts)} prompts")


def _positive_card(iteration: IterationData, run: RunData) -> Card:
    label = "Share that helps, before → after"
    before, after = iteration.influence, iteration.training_influence
    if before is None:
        return Card(label, UNKNOWN, "influence not measured yet")
    shares = [formatting.share(part.summary["share_positive"]) for part in (before, after) if part]
    measured = " and ".join(formatting.count(len(part.values)) for part in (before, after) if part)
    return Card(
        label,
        " → ".join(shares),
        f"of {measured} examples, better than {THRESHOLDS.get(run.baseline, run.baseline)}"
        + ("" if after else "; not measured after the update"),
    )


def _kind_card(iteration: IterationData, run: RunData) -> Card | None:
    """Return the share of instructions of the target kind; None without a usable classifier."""
    before = run.iterations[0].probing.kind_share(run.classifier)
    after = iteration.training.kind_share(run.classifier)
    if before is None or run.classifier is None:
        return None
    return Card(
        "Of the target kind, before → after",
        " → ".join(formatting.share(share.value) for share in (before, after) if share),
        f"of {' and '.join(formatting.count(share.total) for share in (before, after) if share)} instructions; classifier "
        f"of {run.classifier.balanced_accuracy:.2f} balanced accuracy" + ("" if after else "; no training set yet"),
    )


def _loss_card(iteration: IterationData, run: RunData) -> Card:
    label = "Held-out loss"
    if "student" not in iteration.held_out_loss:
        return Card(label, UNKNOWN, "not evaluated yet")
    others = [
        f"{name} {formatting.loss(mean)}"
        for name in ("unmodified", "untrained")
        if (mean := _mean(run, iteration, name)) is not None
    ]
    return Card(label, formatting.loss(_mean(run, iteration, "student")), "; ".join(others) or "nats per token")


def _gain_card(iteration: IterationData) -> Card:
    for other in ("unmodified", "untrained"):
        gain = iteration.held_out_gain.get(f"student_over_{other}")
        if gain:
            value = formatting.signed(gain["mean"])
            error = formatting.loss(gain["standard_error"])
            return Card(f"Gain over {other}", value, f"± {error} nats per token, paired (one standard error)")
    return Card("Gain", UNKNOWN, "no paired comparison recorded")

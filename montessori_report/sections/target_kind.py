"""What the teachers write before and after the update: the share of the target kind, and the first texts of each."""

from collections.abc import Sequence
from typing import Any

from montessori_core import formatting
from montessori_report.figures import Dot, Figure, colour_of, dot_figure
from montessori_report.html import Block, Section
from montessori_report.run_data import RunData, SynthesisData

INSTRUCTIONS_SHOWN = 10


def target_kind_section(run: RunData) -> Section:
    """Return the section of the share of instructions of the target kind."""
    figure = _figure_of_teachers(run)
    return Section(
        "target-kind",
        "Target kind",
        [Block([figure])] if figure else [],
        introduction=_accuracy(run) if figure else "",
        note="The intervals are over the instructions. They do not include the errors of the classifier, which often takes "
        "a noisy text with words of the target kind for a task of that kind."
        if figure
        else "",
        absent=_absence(run),
    )


def _accuracy(run: RunData) -> str:
    assert run.classifier is not None
    classifier = run.classifier
    accuracy = accuracy_text(
        classifier.recall, classifier.false_positives, classifier.balanced_accuracy, classifier.others
    )
    return (
        f"The target kind of task is that of the reference set. A classifier of words {accuracy}. Compare the shares with "
        "each other: neither is free of its errors."
    )


def accuracy_text(recall: float, false_positives: float, balanced_accuracy: float, others: str) -> str:
    """Say how well a classifier recognises the target kind; see `KindClassifier`."""
    return (
        f"assigns {formatting.share(recall)} of the reference tasks to it, and {formatting.share(false_positives)} of "
        f"{others} (cross-validated; balanced accuracy {balanced_accuracy:.2f})"
    )


def not_shown(objection: str) -> str:
    """Say why there is no share."""
    return f"The share of instructions of the target kind is not shown: {objection}."


def _absence(run: RunData) -> str:
    if run.classifier is None:
        return "The reference set and the seed pool are not in the folder."
    if not run.classifier.usable:
        return not_shown(run.classifier.objection)
    return "No teacher has written examples yet."


def _figure_of_teachers(run: RunData) -> Figure | None:
    dots = []
    for number, part in run.examples_of_teachers.items():
        share = part.kind_share(run.classifier)
        if share is not None and share.value is not None:
            low, high = share.interval
            label = f"{teacher_title(number)}: {formatting.count(share.total)} instructions"
            dots.append(Dot(label, share.value, low, high, colour_of(number)))
    if not dots:
        return None
    return share_figure(
        "Instructions of the target kind",
        "Further to the right, more of the teacher's instructions are of the target kind. Intervals (Wilson, 95 %) that "
        "do not overlap show that the update moved the teacher.",
        dots,
    )


def share_figure(title: str, reading: str, dots: Sequence[Dot]) -> Figure:
    """Draw shares of instructions of the target kind."""
    figure = dot_figure(title, reading, dots, "share of the instructions of the target kind", formatting.share)
    longest = max((dot.high for dot in dots), default=1.0)
    figure.plot.update_xaxes(tickformat=".0%", range=[0, min(1.02, 1.15 * longest)])
    return figure


def teacher_title(number: int) -> str:
    """Return the title of a teacher: teacher 0 is the unmodified one."""
    return "Unmodified teacher" if number == 0 else f"Teacher after update {number}"


def teachers_of(run: RunData) -> list[dict[str, Any]]:
    """Return the first instructions of each teacher by id, with whether each is of the target kind."""
    return [
        {"title": teacher_title(number), "number": number, "instructions": _first_instructions(part, run)}
        for number, part in run.examples_of_teachers.items()
    ]


def _first_instructions(part: SynthesisData, run: RunData) -> list[dict[str, Any]]:
    assert part.examples is not None
    classifier = run.classifier if run.classifier is not None and run.classifier.usable else None
    rows = part.examples.select(["example_id", "instruction"]).sort_by("example_id").slice(0, INSTRUCTIONS_SHOWN)
    return [
        {"text": row["instruction"], "target": classifier is not None and classifier.is_target(row["instruction"])}
        for row in rows.to_pylist()
    ]

"""Synthesis: filter funnel, lengths (Figures 11 and 12), verbs and objects (Figures 6 and 8 to 10)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from montessori_core import formatting
from montessori_report.figures import GREY, Figure, Sample, funnel_figure, histogram_figure
from montessori_report.html import Block, Section, Table
from montessori_report.run_data import RunData, SynthesisData
from montessori_report.sections.verb_nouns import PARSED, REMEDY, open_parser, read_verbs, sunburst_figure

_MOST_BINS = 50


def synthesis_section(run: RunData) -> Section:
    """Return the section of funnels, lengths and verbs."""
    introduction = (
        "The teacher writes candidate instructions. The filters of the configuration remove some; each bar names the filter "
        "and its reason."
    )
    if run.iterations:
        introduction += " The first probing set includes the examples that warm the student."
    funnels = _funnels(run.syntheses)
    blocks = [funnels] if funnels else []
    lengths = _length_figures(run)
    if lengths:
        blocks.append(Block(lengths, heading="Lengths"))
    verbs, note = _verbs(run)
    if verbs:
        blocks.append(Block(verbs, heading="What the instructions ask for"))
    return Section(
        "synthesis",
        "Synthesis",
        blocks,
        introduction=introduction,
        note=note if blocks else "",
        absent="No synthesis has finished yet.",
    )


def _funnels(sets: Sequence[SynthesisData]) -> Block | None:
    counted = [(part.label, part.funnel) for part in sets if part.funnel]
    if not counted:
        return None
    reasons = list(
        dict.fromkeys(step for _, funnel in counted for step in funnel if step not in ("candidates", "kept"))
    )
    rows = [
        [step, *(formatting.count(funnel.get(step, 0)) for _, funnel in counted)]
        for step in ("candidates", *reasons, "kept")
    ]
    rates = [
        formatting.share(funnel["kept"] / funnel["candidates"] if funnel["candidates"] else None)
        for _, funnel in counted
    ]
    return Block(
        [funnel_figure(label, funnel) for label, funnel in counted],
        [Table("Instructions by filter", ["Step", *(label for label, _ in counted)], [*rows, ["share kept", *rates]])],
    )


def _length_figures(run: RunData) -> list[Figure]:
    """Draw the lengths of each teacher's examples in the student's tokens, from the influence tables."""
    tables = [
        (part.table, Sample.numbered(f"Teacher {number}", np.zeros(0), number)) for number, part in run.teachers.items()
    ]
    if run.unmodified_influence:
        tables.append((run.unmodified_influence.table, Sample("Teacher 0, training set", np.zeros(0), GREY, "dash")))
    kinds = [
        (
            "Lengths of instructions (Figure 11)",
            "tokens of the instruction, template included",
            lambda table: table["tokens"].to_numpy() - table["response_tokens"].to_numpy(),
        ),
        (
            "Lengths of responses (Figure 12)",
            "tokens of the response",
            lambda table: table["response_tokens"].to_numpy(),
        ),
    ]
    figures = []
    for title, axis, lengths_of in kinds:
        samples = [
            replace(style, values=np.asarray(lengths_of(table), dtype=np.float64))
            for table, style in tables
            if table.num_rows
        ]
        if samples:
            figures.append(
                histogram_figure(
                    title,
                    "Teacher 0 is the initial teacher, teacher 1 its first update, and so on. A shift means that the "
                    "teacher learned to write longer or shorter texts. The last bar includes longer texts.",
                    samples,
                    length_edges(np.concatenate([sample.values for sample in samples])),
                    axis,
                )
            )
    return figures


def length_edges(lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return bin edges in whole tokens, from the shortest text to the 99.5th percentile."""
    low, high = math.floor(lengths.min()), math.ceil(np.percentile(lengths, 99.5))
    width = max(1, math.ceil((high + 1 - low) / _MOST_BINS))
    return np.arange(low, high + 1 + width, width, dtype=np.float64)


def _verbs(run: RunData) -> tuple[list[Figure], str]:
    """Return a sunburst figure per teacher, or none and a remedy if no parser is installed."""
    sets: list[tuple[str, pa.Table]] = []
    if run.unmodified is not None and run.unmodified.examples is not None:
        sets.append(("unmodified teacher", run.unmodified.examples))
    elif run.iterations and run.iterations[0].probing.examples is not None:
        sets.append(("teacher 0, probing set", run.iterations[0].probing.examples))
    for iteration in run.iterations:
        if iteration.training.examples is not None:
            label = "updated teacher" if run.heading(iteration) is None else f"teacher {iteration.number}"
            sets.append((label, iteration.training.examples))
    if not sets:
        return [], ""
    parser = open_parser()
    if parser is None:
        return [], REMEDY
    figures = []
    for label, examples in sets:
        instructions = examples["instruction"].to_pylist()
        figures.append(sunburst_figure(label, read_verbs(parser, instructions), min(len(instructions), PARSED)))
    return figures, ""

"""The paper's results of the methods of a study (Montessori-Instruct, Tables 1, 2 and 7), beside those of the study."""

from collections.abc import Mapping, Sequence
from typing import Any

from montessori_core.formatting import UNKNOWN, is_finite, signed, signed_interval, significant
from montessori_report.html import Block, Section, Table

_SCORES = ("AlpacaEval 2.0 LC, %", "win rate, %", "MT-Bench", "MMLU", "GPQA", "ARC-C", "GSM8K", "HellaSwag")

# The Llama3-8B student after one iteration: Table 1; the last four rows, Table 2.
_PAPER: dict[str, tuple[float, ...]] = {
    "self_instruct": (50.0, 50.0, 6.490, 62.42, 31.92, 59.98, 58.76, 80.93),
    "self_instruct_strong": (54.95, 56.39, 5.918, 63.41, 30.13, 60.58, 50.42, 81.42),
    "self_reward": (51.87, 55.38, 6.713, 62.46, 28.19, 59.84, 53.60, 81.04),
    "llm2llm": (51.49, 53.12, 6.531, 62.18, 29.12, 57.49, 55.28, 80.49),
    "montessori": (54.92, 58.59, 6.903, 62.93, 29.91, 62.97, 58.76, 81.22),
    "llm_judge": (53.42, 54.93, 6.731, 62.93, 29.75, 62.09, 58.82, 81.05),
    "training_loss": (52.34, 54.99, 6.656, 62.54, 29.89, 61.48, 58.76, 80.93),
    "bootstrap": (50.59, 48.14, 6.618, 60.67, 25.19, 57.95, 58.13, 80.46),
    "response": (51.59, 54.22, 6.556, 62.43, 27.45, 60.42, 56.38, 81.04),
}
_SECONDS = {"self_instruct": 0.486, "montessori": 5.842}  # per training example, on eight H100s: Table 7
_PARTS = {  # what a study calls it: what Table 7 calls it, its seconds for an 8B and a 1.1B student
    "instructions": ("instructions, per example", "0.37", "0.37"),
    "responses": ("responses, per example", "0.03", "0.03"),
    "influence": ("influence, per example", "13.403", "3.533"),
    "teacher": ("update of the teacher, per pair", "0.36", "0.36"),
}


def paper_section(
    rows: Sequence[dict[str, Any]], training_examples: int, seconds: Sequence[Mapping[str, float]] = ()
) -> Section | None:
    """Return the section that puts the paper's numbers beside a study's; None if the paper has none of its methods.

    Args:
        rows: the methods of the study's result.
        training_examples: examples that each method's student is trained on.
        seconds: job seconds of the parts of an iteration of montessori, for each seed.
    """
    in_paper = [row for row in rows if row["method"] in _PAPER]
    if not in_paper:
        return None
    lines = [
        [
            row["method"],
            _gain_text(row),
            *(f"{score:g}" for score in _PAPER[row["method"]]),
            f"{significant(row['job_seconds'] / training_examples)} s",
            f"{_SECONDS[row['method']]} s" if row["method"] in _SECONDS else "",
        ]
        for row in in_paper
    ]
    columns = ["Method", "Gain here", *_SCORES, "Job time per example, here", "in the paper"]
    tables = [Table("This study and Tables 1, 2 and 7 of the paper", columns, lines)]
    if seconds:
        parts = [
            [name, f"{significant(sum(seed[part] for seed in seconds) / len(seconds))} s", f"{of_8b} s", f"{of_1b} s"]
            for part, (name, of_8b, of_1b) in _PARTS.items()
        ]
        columns = ["Part of an iteration", "Job time here", "in the paper, 8B", "1.1B"]
        tables.append(Table("Time by part of an iteration of montessori (Table 7)", columns, parts))
    return Section(
        "paper",
        "Beside the paper",
        [Block([], tables)],
        introduction="Gain is of this study, in nats per token. The scores are the paper's, of a Llama3-8B student after one "
        "iteration: compare the order of the methods, not the numbers. Win rates are against self_instruct. The job "
        "time here leaves out the evaluation of the student. The paper's times are wall time on eight H100s, spread over "
        "all examples.",
    )


def _gain_text(row: dict[str, Any]) -> str:
    if not is_finite(row["gain"]):
        return UNKNOWN
    interval = signed_interval(row)
    return f"{signed(row['gain'])} ({interval})" if interval else signed(row["gain"])

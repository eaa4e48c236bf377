"""The paper's results of the methods of a study (Montessori-Instruct, Tables 1, 2, 6 and 7), beside those of the study."""

from collections.abc import Mapping, Sequence
from typing import Any

from montessori_core.config import Study
from montessori_core.formatting import UNKNOWN, is_finite, signed, signed_interval, significant
from montessori_report.html import Block, Section, Table

_SCORES = ("AlpacaEval 2.0 LC, %", "win rate, %", "MT-Bench", "MMLU", "GPQA", "ARC-C", "GSM8K", "HellaSwag")

# A method's table and its scores of the Llama3-8B student. Self-Reward and LLM2LLM have two rounds here, as in Section 4.
_PAPER: dict[str, tuple[str, tuple[float, ...]]] = {
    "self_instruct": ("Table 1", (50.0, 50.0, 6.490, 62.42, 31.92, 59.98, 58.76, 80.93)),
    "self_instruct_strong": ("Table 1", (54.95, 56.39, 5.918, 63.41, 30.13, 60.58, 50.42, 81.42)),
    "llm2llm": ("Table 1, iteration 2", (52.63, 55.02, 6.519, 62.46, 30.04, 59.65, 57.75, 80.57)),
    "llm_judge": ("Table 2", (53.42, 54.93, 6.731, 62.93, 29.75, 62.09, 58.82, 81.05)),
    "training_loss": ("Table 2", (52.34, 54.99, 6.656, 62.54, 29.89, 61.48, 58.76, 80.93)),
    "bootstrap": ("Table 2", (50.59, 48.14, 6.618, 60.67, 25.19, 57.95, 58.13, 80.46)),
    "response": ("Table 2", (51.59, 54.22, 6.556, 62.43, 27.45, 60.42, 56.38, 81.04)),
}
_MONTESSORI = {  # by number of iterations
    1: ("Table 1, iteration 1", (54.92, 58.59, 6.903, 62.93, 29.91, 62.97, 58.76, 81.22)),
    2: ("Table 1, iteration 2", (56.37, 60.15, 7.163, 63.47, 31.36, 60.17, 60.02, 81.98)),
}
_SELF_REWARD = {  # by whether a model behind an API judges, or the student itself
    True: ("Table 1, iteration 2", (53.49, 57.32, 6.798, 62.02, 29.08, 60.64, 56.37, 81.13)),
    False: ("Table 6, iteration 2", (2.69, 4.71, 5.428, 61.79, 23.58, 57.64, 49.53, 80.17)),
}
# Per training example, after one iteration, on eight H100s: Table 7.
_SECONDS = {"self_instruct": 0.486, "montessori": 5.842}
_PARTS = {  # what a study calls it: what Table 7 calls it, its seconds for an 8B and a 1.1B student
    "instructions": ("instructions, per example", "0.37", "0.37"),
    "responses": ("responses, per example", "0.03", "0.03"),
    "influence": ("influence, per example", "13.403", "3.533"),
    "teacher": ("update of the teacher, per pair", "0.36", "0.36"),
}


def paper_section(
    study: Study, rows: Sequence[dict[str, Any]], seconds: Sequence[Mapping[str, float]] = ()
) -> Section | None:
    """Return the section that puts the paper's numbers beside a study's; None if the paper has none of its methods.

    Args:
        study: configuration of the study.
        rows: the methods of the study's result.
        seconds: job seconds of the parts of an iteration of montessori, for each seed.
    """
    in_paper = [(row, *result) for row in rows if (result := _paper_result(row["method"], study))]
    lines = [
        [
            row["method"],
            _gain_text(row),
            table,
            *(f"{score:g}" for score in scores),
            f"{significant(row['job_seconds'] / study.experiment.training.examples)} s",
            _seconds_text(row["method"], study),
        ]
        for row, table, scores in in_paper
    ]
    tables = []
    if lines:
        columns = [
            *("Method", "Gain here", "In the paper", *_SCORES),
            *("Job time per example, here", "in the paper (Table 7)"),
        ]
        tables.append(Table("This study and the paper", columns, lines))
    if seconds:
        parts = [
            [name, f"{significant(sum(seed[part] for seed in seconds) / len(seconds))} s", f"{of_8b} s", f"{of_1b} s"]
            for part, (name, of_8b, of_1b) in _PARTS.items()
        ]
        columns = ["Part of an iteration", "Job time here", "in the paper, 8B", "1.1B"]
        tables.append(Table("Time by part of an iteration of montessori (Table 7)", columns, parts))
    if not tables:
        return None
    return Section(
        "paper",
        "Beside the paper",
        [Block([], tables)],
        introduction="Gain is of this study, in nats per token. The scores are the paper's, of a Llama3-8B student after as "
        "many iterations as here: compare the order of the methods, not the numbers. Win rates are against self_instruct. "
        "The job time here leaves out the evaluation of the student. The paper's times are wall time on eight H100s, spread "
        "over all examples.",
    )


def _paper_result(method: str, study: Study) -> tuple[str, tuple[float, ...]] | None:
    """Return the table and the scores of a method as the study runs it; None if the paper has none."""
    if method == "montessori":
        return _MONTESSORI.get(study.experiment.iterations)
    if method == "self_reward":
        return _SELF_REWARD[study.experiment.judge is not None]
    return _PAPER.get(method)


def _seconds_text(method: str, study: Study) -> str:
    if method not in _SECONDS or (method == "montessori" and study.experiment.iterations > 1):
        return ""
    return f"{_SECONDS[method]} s"


def _gain_text(row: dict[str, Any]) -> str:
    if not is_finite(row["gain"]):
        return UNKNOWN
    interval = signed_interval(row)
    return f"{signed(row['gain'])} ({interval})" if interval else signed(row["gain"])

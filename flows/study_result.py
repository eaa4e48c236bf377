"""The result of a study: gains over the baseline, costs, shares of the target kind, and its page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from cluster.usage import use_of
from montessori_core.config import Study
from montessori_core.data.tables import REFERENCE_LOSS, read_table
from montessori_core.errors import UserError
from montessori_core.evaluation.kinds import KindShare, read_classifier, read_instructions
from montessori_core.evaluation.scores import mean_over_seeds
from montessori_core.evaluation.statistics import Outcome, compare_outcomes, share_interval_of_seeds
from montessori_core.files import write_json
from montessori_core.program import Row
from montessori_report.study_page import study_page
from tasks.evaluation import StudentEvaluation, per_token, summarize_loss
from tasks.report import link_page
from tasks.run import Run
from tasks.studies import PAGE, RESULT


@dataclass(frozen=True)
class Cost:
    """Job seconds and floating-point operations."""

    seconds: float
    flops: int

    @staticmethod
    def of(*runs: Run) -> "Cost":
        """Sum the cost of the stages that runs have executed."""
        stages = [stage for run in runs for stage in dict.fromkeys(run.stages)]
        uses = list(map(use_of, stages))
        return Cost(sum(use.seconds for use in uses), sum(use.flops for use in uses))


MethodResults = dict[str, list[tuple[StudentEvaluation, Cost]]]
"""For each method, by seed: the evaluation of its student, and the cost."""

MethodLosses = dict[str, list[tuple[Path, Cost]]]
"""For each method, by seed: the table of its student's held-out losses, and the cost."""


@dataclass
class EqualTokens:
    """Results at equal response tokens.

    Attributes:
        limits: response tokens, by seed.
        results: results of the methods whose students are trained on examples; a method may be left out for some seeds.
    """

    limits: list[int]
    results: MethodLosses


@dataclass(frozen=True)
class StudyOutcome:
    """What a study computed.

    Attributes:
        untrained: evaluation of the untrained student.
        results: results of the study's student, then of each transfer student.
        proposed: example tables of each method, by seed.
        copies: what each method's examples share with evaluation data, by seed; empty without benchmarks.
        equal: results at equal response tokens, empty if the study does not ask for them.
        learned: what the teacher of montessori learned, by seed, see `flows.learning.follow_teacher`.
    """

    untrained: StudentEvaluation
    results: list[MethodResults]
    proposed: dict[str, list[Path]]
    copies: dict[str, list[list[Row]]]
    equal: EqualTokens
    learned: list[Row]


@task(task_run_name="comparison", cache_policy=NO_CACHE, persist_result=False)
def write_comparison(study: Study, folder: Path, baseline: str, outcome: StudyOutcome) -> None:
    """Write `comparison.json` and `comparison.html` of a study; `baseline` is the name of its method."""
    rows, *transfer_rows = (_compare_methods(of_student, baseline) for of_student in outcome.results)
    for row in rows:
        row["contamination"] = _sum_over_seeds(outcome.copies[row["method"]])
    kind = _add_kind_shares(rows, study, folder, outcome.proposed)
    equal = {name: seeds for name, seeds in outcome.equal.results.items() if len(seeds) == len(study.seeds)}
    result = {
        "study": study.name,
        "seeds": study.seeds,
        "kind_classifier": kind,
        "untrained_loss": summarize_loss(outcome.untrained.losses)["mean"],
        "untrained_scores": outcome.untrained.benchmarks.scores,
        "methods": rows,
        "equal_response_tokens": {
            "limits": outcome.equal.limits,
            "methods": compare_outcomes(_to_outcomes(equal), baseline) if baseline in equal else [],
        },
        "transfer": [
            {"student": student, "methods": methods}
            for student, methods in zip(study.student_labels()[1:], transfer_rows, strict=True)
        ],
        "teachers": outcome.learned,
    }
    write_json(result, folder / RESULT)
    study_page(study, result, folder).write(folder / PAGE)
    table = [
        {key: value for key, value in row.items() if key not in ("gain_of_seeds", "scores", "contamination")}
        for row in rows
    ]
    create_table_artifact(table, description=f"Comparison of methods: {study.name}")
    link_page(folder / PAGE, f"Comparison of methods: {study.name}")


def _compare_methods(results: MethodResults, baseline: str) -> list[dict[str, Any]]:
    """Return a row per method of one student: gain, cost and benchmark scores."""
    rows = compare_outcomes(_to_outcomes(_losses(results)), baseline)
    for row in rows:
        row["scores"] = mean_over_seeds([evaluated.benchmarks.scores for evaluated, _ in results[row["method"]]])
    return rows


def _sum_over_seeds(seeds: list[list[Row]]) -> list[Row]:
    """Add up the items and the overlapping ones of each benchmark, see `tasks.benchmarks.check_contamination`."""
    return [
        rows[0] | {key: sum(row[key] for row in rows) for key in ("items", "overlapping")}
        for rows in zip(*seeds, strict=True)
    ]


def _add_kind_shares(
    rows: list[dict[str, Any]], study: Study, folder: Path, proposed: dict[str, list[Path]]
) -> dict[str, Any]:
    """Add the share of each method's training examples that are of the target kind; return the classifier's accuracy."""
    classifier = read_classifier(folder / f"seed-{study.seeds[0]}")  # all seeds have the same sets
    assert classifier is not None
    trained = study.experiment.training.examples
    for row in rows:
        shares = [classifier.share(read_instructions(path)[:trained]) for path in proposed[row["method"]]]
        share = KindShare(sum(part.target for part in shares), sum(part.total for part in shares))
        low, high = share_interval_of_seeds([(part.target, part.total) for part in shares])
        values = (share.value, low, high) if classifier.usable else (None, None, None)
        row |= dict(zip(("wanted_kind", "wanted_kind_low", "wanted_kind_high"), values, strict=True))
    return {
        "balanced_accuracy": classifier.balanced_accuracy,
        "recall": classifier.recall,
        "false_positives": classifier.false_positives,
        "others": classifier.others,
        "objection": None if classifier.usable else classifier.objection,
    }


def _losses(results: MethodResults) -> MethodLosses:
    return {method: [(evaluated.losses, cost) for evaluated, cost in seeds] for method, seeds in results.items()}


def _to_outcomes(results: MethodLosses) -> list[Outcome]:
    outcomes = []
    for method, seeds in results.items():
        if not seeds:
            continue
        tables = [read_table(path, REFERENCE_LOSS) for path, _ in seeds]
        if any(table["example_id"] != tables[0]["example_id"] for table in tables):
            raise UserError(
                "the seeds of this study were evaluated on different examples: the evaluation set has changed; "
                "give the study another name"
            )
        losses = np.stack([per_token(table) for table in tables])
        costs = [cost for _, cost in seeds]
        seconds = np.array([cost.seconds for cost in costs])
        flops = np.array([float(cost.flops) for cost in costs])
        outcomes.append(Outcome(method, losses, seconds, flops))
    return outcomes

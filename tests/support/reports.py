"""Runs and studies as flows write them, without any computation: for tests of pages."""

import json
import random
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from montessori_core.config import DataSource, Preferences, Study, parse, parse_experiment, write_yaml
from montessori_core.data.sources import read_tasks, write_tasks
from montessori_core.data.tables import (
    EXAMPLES,
    INFLUENCE,
    INSTRUCTIONS,
    PREFERENCES,
    SIMILARITY,
    read_table,
    table_from_rows,
    write_table,
)
from montessori_core.evaluation import scores
from montessori_core.evaluation.kinds import KindShare
from montessori_core.evaluation.scores import score as benchmark_score
from montessori_core.evaluation.statistics import Outcome, compare_outcomes
from montessori_core.files import write_json
from montessori_core.influence.preferences import pair_by_influence, write_preferences
from montessori_core.influence.table import schema_with_metadata
from montessori_core.synthesis.filtering import NO_TAGS, rejection_by
from montessori_core.synthesis.filters.rouge_l import LIKE_ACCEPTED, ROUGE_L
from montessori_report.run_page import render_report

REPEATED = rejection_by(ROUGE_L, LIKE_ACCEPTED)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "</textarea></style><img src=x onerror=alert(1)>",
    "{{ 7*7 }} {% include '/etc/passwd' %} ${7*7}",
    '" onmouseover="alert(1)" data-x=\'',
    "<!-- <script> ]]> <svg/onload=alert(1)>",
    "\u202eright to left\u200f \u2066isolate",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f next \x85 line \u2028 paragraph \u2029",
    "&lt;b&gt; &#60;i&#62; <a href='javascript:alert(1)'>link</a> https://example.com/x.png",
]
SHOWN = {"script": HOSTILE[0], "template": HOSTILE[2], "control": "nul ␀ bell ␇ escape ␛[31m delete ␡"}


@dataclass
class Page(HTMLParser):
    """A parsed report."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[tuple[str | None, str]] = field(default_factory=list)  # class and content
    reversing: set[str] = field(default_factory=set)
    style: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs).get("class"), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            kind, content = self.scripts[-1]
            self.scripts[-1] = (kind, content + data)
        elif self.cdata_elem == "style":
            self.style += data
        else:
            self.text += data
            if "\u202e" in data:
                self.reversing.add(self.tags[-1][0])

    @property
    def programs(self) -> list[str]:
        return [content for kind, content in self.scripts if kind is None]

    @property
    def plots(self) -> list[dict[str, Any]]:
        return [content["plot"] for content in self.data("figure")]

    @property
    def examples(self) -> list[Any]:
        """Return the rows of the examples table, of all its pages."""
        return [row for rows in self.data("rows") for row in rows]

    def data(self, kind: str) -> list[Any]:
        """Return the data that the page passes to its script."""
        return [json.loads(content, parse_constant=_no_constant) for found, content in self.scripts if found == kind]

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def page_of(folder: Path) -> Page:
    return Page(render_report(folder).html)


def write_run(
    folder: Path, iterations: int = 1, examples: int = 40, texts: list[str] | None = None, **sections: object
) -> Path:
    """Write a run as the flows do: real schemas, small tables."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {"model": "smollm2-135m"}
    content = {"name": "trial", "iterations": iterations, "teacher": model, "student": model, **sections}
    experiment = parse_experiment({"preferences": {"baseline": "median"}} | content, "test")
    write_yaml(experiment, folder / "config.yaml")
    write_json({"opened": "2026-01-01T00:00:00Z", "versions": {"torch": "2.9"}}, folder / "provenance.json")
    write_sources(folder, experiment.reference)
    write_synthesis(folder / "unmodified" / "training", "u", examples, texts)
    write_influence(folder / "unmodified" / "training-influence.parquet", "u", examples, 0.0)
    for number in range(1, iterations + 1):
        write_iteration(folder / f"iteration-{number}", number, examples, texts, experiment.preferences)
    return folder


def write_sources(folder: Path, reference: DataSource) -> None:
    """Write copies of the reference set and the built-in seed pool."""
    (folder / "sources").mkdir(exist_ok=True)
    sources = {"reference": reference, "seed_pool": DataSource(path="builtin")}
    for name, source in sources.items():
        tasks = read_tasks(source, name, with_response=name == "reference")
        write_tasks(tasks, folder / "sources" / f"{name}.jsonl")


def write_iteration(
    folder: Path, number: int, examples: int, texts: list[str] | None, preferences: Preferences
) -> None:
    write_synthesis(folder, f"i{number}-probing", examples, texts)
    write_synthesis(folder / "training", f"i{number}-training", examples, texts)
    write_influence(folder / "influence.parquet", f"i{number}-probing", examples, 0.0)
    write_influence(folder / "training-influence.parquet", f"i{number}-training", examples, 1e-4)
    influence = read_table(folder / "influence.parquet", INFLUENCE)
    pairs = pair_by_influence(influence, preferences)
    write_preferences(pairs, folder / "examples.parquet", folder / "preferences.parquet", PREFERENCES)
    write_json(metrics(number), folder / "metrics.json")


def write_synthesis(folder: Path, draw: str, examples: int, texts: list[str] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    candidates, kept = [], []
    for i in range(examples + 6):
        text = texts[i % len(texts)] if texts else f"{draw}: explain thing number {i} in two short sentences."
        candidate = {
            "example_id": f"{draw}-{i}",
            "prompt_id": f"{draw}-p{i // 4}",
            "prompt": text,
            "demonstrations": ["seed-1"],
            "raw_output": f"{text}</instruction>",
            "instruction": text if i < examples + 3 else None,
            "rejection": None if i < examples else REPEATED if i < examples + 3 else NO_TAGS,
        }
        candidates.append(candidate)
        if i < examples:
            kept.append(
                {key: candidate[key] for key in ("example_id", "prompt_id", "prompt", "raw_output", "instruction")}
                | {"response": f"Answer: {text}", "response_finished": i % 3 > 0}
            )
    write_table(table_from_rows(candidates, INSTRUCTIONS), folder / "instructions.parquet", INSTRUCTIONS)
    write_table(table_from_rows(kept, EXAMPLES), folder / "examples.parquet", EXAMPLES)


def write_influence(path: Path, draw: str, examples: int, shift: float) -> None:
    random_numbers = random.Random(draw)
    rows: list[dict[str, object]] = []
    for i in range(examples):
        measured = i != examples - 1
        value = random_numbers.gauss(1e-4 + shift, 2e-4)
        rows.append(
            {
                "example_id": f"{draw}-{i}",
                "prompt_id": f"{draw}-p{i // 4}",
                "status": "ok" if measured else "no_response_tokens",
                "tokens": 40 + i,
                "response_tokens": 20 + i % 7 if measured else 0,
                "truncated": i == 1,
                "example_loss": 1.5 if measured else None,
                "influence_student": value - 5e-4 if measured else None,
                "influence_null_step": value if measured else None,
                "standard_error": 3e-5 if measured else None,
                "estimator": "exact",
                "audited": measured,
                "reference_tokens": 900,
                "first_order_null_step": value + random_numbers.gauss(0, 3e-5) if measured else None,
                "gradient_norm": 4.0 + i if measured else None,
                "dominated_share": 0.25 if measured else None,
            }
        )
    notes = {"noise_floor": 2e-5, "null_step_influence": -5e-4, "student_loss": 2.5, "reference_tokens": 900.0}
    write_table(table_from_rows(rows, schema_with_metadata(notes)), path, INFLUENCE)


def metrics(number: int, gain: float = 0.02, error: float = 0.004) -> dict[str, Any]:
    sft = [{"step": float(s), "loss": 2.0 - 0.05 * s, "learning_rate": 1e-6 * s} for s in range(1, 9)]
    dpo = [
        entry
        | {
            "rewards/margins": 0.1 * s,
            "rewards/chosen": 0.05 * s,
            "rewards/rejected": -0.05 * s,
            "rewards/accuracies": 0.6,
        }
        for s, entry in enumerate(sft)
    ]
    content: dict[str, Any] = {
        "iteration": number,
        "held_out_loss": {"student": {"mean": 2.5 - 0.1 * number, "standard_error": 0.05}},
        "held_out_gain": {},
        "training_logs": {"teacher": dpo, "student": sft},
        "job_seconds": {f"iteration-{number}/student": 75.5, f"iteration-{number}/influence": 7200.0},
        "stages": [
            stage_use(f"iteration-{number}/student", rows=400, seconds=75.5),
            stage_use(f"iteration-{number}/influence", rows=1000, seconds=7200.0, jobs=8, retries=2, interruptions=1),
        ],
        "scores": [
            score(model, benchmark, metric, mean + 0.01 * number)
            for model in ("student", "unmodified", "untrained")
            for benchmark, metric, mean in (
                ("arc_challenge", "acc_norm", 0.31),
                ("mt_bench", "score", 5.2),
                ("mt_bench", "score_writing", 6.1),
            )
        ],
        "head_to_head": [
            {"model": "student", "against": "unmodified", "wins": 12, "ties": 3, "losses": 5, "unparsed": 1},
            {"model": "student", "against": "untrained", "wins": 15, "ties": 1, "losses": 4, "unparsed": 0},
        ],
        "contamination": [
            {"benchmark": "mt_bench", "data": "training set", "items": 80, "overlapping": 1, "n": 8},
        ],
        "teacher_checkpoints": [
            {"step": 10 * s, "margin": 0.1 * s, "held_out_loss": 2.7 - 0.03 * s, "standard_error": 0.01}
            for s in range(1, 5)
        ],
    }
    if number == 1:
        content["held_out_loss"] |= {
            "untrained": {"mean": 2.8, "standard_error": 0.06},
            "unmodified": {"mean": 2.42, "standard_error": 0.05},
        }
        content["held_out_gain"] = {
            "student_over_unmodified": {"mean": gain, "standard_error": error},
            "student_over_untrained": {"mean": 0.4, "standard_error": 0.02},
        }
        content["training_logs"] |= {"warmup": sft, "unmodified": sft}
    return content


def stage_use(stage: str, rows: int, seconds: float, **counts: int) -> dict[str, Any]:
    use = {"shards": 4, "jobs": 1, "retries": 0, "interruptions": 0, "gpus": 4, "flops": 10**15} | counts
    return {"stage": stage, "rows": rows, "seconds": seconds} | use


def score(model: str, benchmark: str, metric: str, mean: float) -> dict[str, Any]:
    return {"model": model, **scores.score(benchmark, metric, mean, 0.01, 80, unparsed=3)}


METHODS = ("montessori", "self_instruct", "nomad")


def write_study(folder: Path) -> tuple[Study, dict[str, Any]]:
    """Write a study as its flow does."""
    model = {"model": "smollm2-135m"}
    content = {"name": "trial", "experiment": {"teacher": model, "student": model}, "methods": METHODS, "seeds": [0, 1]}
    study = parse(Study, content | {"transfer": [{"model": HOSTILE[0]}]}, "test")
    random_numbers = np.random.default_rng(0)
    losses = random_numbers.normal(2.5, 0.3, 40)

    def compared(shift: float) -> list[dict[str, Any]]:
        outcomes = [
            Outcome(
                method,
                losses + random_numbers.normal(shift * number, 0.02, (2, 40)),
                np.full(2, 100.0 * (number + 1)),
                np.full(2, 1e15 * (number + 1)),
            )
            for number, method in enumerate(METHODS)
        ]
        return compare_outcomes(outcomes, "self_instruct")

    methods = compared(0.01)
    for number, row in enumerate(methods):
        share = KindShare(10 + 20 * number, 80)
        values = (share.value, *share.interval)
        row |= dict(zip(("wanted_kind", "wanted_kind_low", "wanted_kind_high"), values, strict=True))
    methods[1]["scores"] = [
        benchmark_score("arc_challenge", "acc_norm", 0.314, 0.01, 1172),
        benchmark_score("mt_bench", "score", None, None, 0),
    ]
    teachers = []
    for seed in (0, 1):
        influence = []
        for number, method in enumerate(METHODS[:2]):
            table = Path(f"seed-{seed}", "methods", method, "training-influence.parquet")
            (folder / table).parent.mkdir(parents=True)
            write_influence(folder / table, f"{method}-{seed}", 40, -2e-4 * number)
            influence.append({"method": method, "table": str(table), "threshold": -4e-4})
        checkpoints = [
            {"step": 8 * n, "margin": 0.3 * n, "held_out_loss": 2.6 - 0.1 * n, "standard_error": 0.02, "gain": 0.1 * n}
            for n in (1, 2)
        ]
        seconds = {"instructions": 1.0 + seed, "responses": 0.25, "influence": 0.5, "teacher": 3.0}
        teachers.append({"seed": seed, "influence": influence, "checkpoints": checkpoints, "seconds": seconds})
    result = {
        "study": "trial",
        "seeds": [0, 1],
        "untrained_loss": 2.7654,
        "kind_classifier": {
            "balanced_accuracy": 0.854,
            "recall": 0.875,
            "false_positives": 0.167,
            "others": "the seeds",
            "objection": None,
        },
        "methods": methods,
        "transfer": [{"student": HOSTILE[0], "methods": compared(-0.02)}],
        "teachers": teachers,
        "equal_response_tokens": {"limits": [1234, 987], "methods": compared(0.005)},
    }
    write_yaml(study, folder / "study.yaml")
    write_json(result, folder / "comparison.json")
    for seed in (0, 1):
        path = folder / f"seed-{seed}" / "methods" / "nomad" / "round-1" / "norm-sim" / "norm-sim.parquet"
        path.parent.mkdir(parents=True)
        rows: list[dict[str, object]] = [{"example_id": str(i), "norm_sim": (i * 37 % 500) / 500} for i in range(500)]
        write_table(table_from_rows(rows, SIMILARITY), path, SIMILARITY)
    return study, result

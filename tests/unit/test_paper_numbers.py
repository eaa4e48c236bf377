"""The table of docs/method.md: the paper's numbers, and the values of the presets."""

import hashlib
import re
from fnmatch import fnmatch
from typing import Any

import yaml

from montessori_core.config import Section, read_experiment
from montessori_core.synthesis.paper_request import PAPER_REQUEST
from support import CONFIGS, ROOT

PRESETS = [read_experiment(CONFIGS / f"{name}.yaml") for name in ("paper-8b", "paper-1b")]
METHOD = ("synthesis", "warmup", "influence", "preferences", "teacher_update", "training")
OURS = (  # sharding and checks, which the paper does not have
    "synthesis.engine",
    "synthesis.engine_options",
    "synthesis.strategy.name",  # self_instruct is the paper's
    "synthesis.completion_prompt",  # the paper has only chat
    "synthesis.filters[[]*].name",
    "synthesis.oversampling",
    "synthesis.max_rounds",
    "*_per_shard",
    "influence.screening.*",
    "influence.sequential",
    "influence.reference_batch_tokens",
)


def leaves(section: Section, path: str = "") -> dict[str, Any]:
    """Return each value of a configuration by its dotted path."""
    found: dict[str, Any] = {}
    for name, value in section:
        if name == "filters":  # by the names of its entries
            for entry in value:
                values = leaves(entry, f"{path}{name}[{entry.name}].")
                found |= {key: list(one) if isinstance(one, tuple) else one for key, one in values.items()}
        else:
            found |= leaves(value, f"{path}{name}.") if isinstance(value, Section) else {f"{path}{name}": value}
    return found


VALUES = [leaves(preset) for preset in PRESETS]
OF_METHOD = [path for path in VALUES[0] if path.partition(".")[0] in METHOD]


def rows() -> list[list[str]]:
    """Return the rows of the table: where, what, paper, presets, [code], remark, test."""
    section = (ROOT / "docs" / "method.md").read_text().partition("## Number by number")[2]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def settings(cell: str) -> list[tuple[str, list[Any]]]:
    """Return the settings that a cell of presets names, and their values in the two presets."""
    return [(path, both(text)) for path, text in re.findall(r"`([\w.*\[\]]+): ([^`]+)`", cell)]


def both(text: str) -> list[Any]:
    """Return the values for 8B and 1.1B."""
    values = [yaml.safe_load(part) for part in text.split(" / ")]
    return values * (2 // len(values))


def paths_of(pattern: str) -> list[str]:
    return [path for path in OF_METHOD if fnmatch(path, pattern)] if "*" in pattern else [pattern]


def test_presets_have_the_numbers_of_the_table() -> None:
    compared = 0
    for row in rows():
        assert len(row) == 7, row
        for pattern, stated in settings(row[3]):
            for path in paths_of(pattern):
                assert [values[path] for values in VALUES] == stated, f"{row[1]}: {path}"
                compared += 1
            assert row[5] or stated == both(row[2]), f"{row[1]}: no remark says why {stated} is not {row[2]}"
    assert compared > 80


def test_table_names_every_setting_of_the_method() -> None:
    named = {path for row in rows() for pattern, _ in settings(row[3]) for path in paths_of(pattern)}
    assert [path for path in OF_METHOD if path not in named and not any(fnmatch(path, ours) for ours in OURS)] == []
    written = yaml.safe_load((CONFIGS / "paper-8b.yaml").read_text())
    for section in written.keys() - {"name", "cluster"}:
        paths = [section] if section == "iterations" else [f"{section}.{name}" for name in written[section]]
        assert set(paths) <= named | {path.partition("[")[0] for path in named}, section


def test_rows_without_a_setting_have_a_remark() -> None:
    assert [row[1] for row in rows() if not settings(row[3]) and not row[5]] == []


def test_paper_request_is_the_published_text() -> None:
    published = "356f8a908790d34cc53451769abd5ad8f4c83cf529c0705c106ea50925654566"  # src/prompt.py at fa9c7db
    assert hashlib.sha256(PAPER_REQUEST.encode()).hexdigest() == published


def test_evaluation_has_the_papers_shots() -> None:
    tasks = read_experiment(CONFIGS / "evaluation.yaml").benchmarks.tasks
    shots = {task.name.partition("_")[0]: task.shots or 0 for task in tasks}
    assert shots == {"arc": 25, "gsm8k": 8, "hellaswag": 8, "gpqa": 0, "mmlu": 0}

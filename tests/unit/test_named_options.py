"""Errors of commands name the commands' options, not fields of a configuration."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from flows.cli.influence import MEASUREMENT_OPTIONS, STEP_OPTIONS
from flows.cli.options import with_options
from flows.cli.validate import OPTIONS as VALIDATE_OPTIONS
from montessori_core.data.tables import INFLUENCE, table_from_rows, write_table
from montessori_core.influence.table import NOTES, schema_with_metadata
from support import ROOT
from support.runs import invoke

GOOD = {"instruction": "Name a river.", "output": "The Rhine."}
TURNS, SYSTEM = (
    {"messages": [{"role": role, "content": "a"} for role in roles]}
    for roles in (("user", "assistant"), ("user", "system", "user", "assistant"))
)
OPTIONS = {"influence": {**MEASUREMENT_OPTIONS, **STEP_OPTIONS}, "validate": VALIDATE_OPTIONS}
SPEAKING = ("config/influence.py", "data", "models", "influence")
"""Modules of the core whose messages a measurement shows."""
SECTIONS = r"student|influence|warmup|reference|cluster"
KEPT = {"reference.safetensors", "student.model"}  # a file, and a remedy that names its command


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("set examples.drop_bad_rows: true to", "set --examples '{path: ..., drop_bad_rows: true}' to"),
        ("examples.path: a.jsonl: 2 rows", "--examples: a.jsonl: 2 rows"),
        ("set reference.split to one of a", "set --reference '{path: ..., split: ...}' to one of a"),
        ("with examples.instruction_field", "with --instruction-field"),
        ("student.max_length=90, but", "--max-length=90, but"),
        ("set influence.state_dtype=bfloat16 or", "set --state-dtype=bfloat16 or"),
        ("of the stage in cluster.resources (", "of the stage in resources of --cluster ("),
        # Names of files, modules and fields that a measurement does not have.
        ("examples.jsonl, line 2", "examples.jsonl, line 2"),
        ("data/reference.path.jsonl", "data/reference.path.jsonl"),
        ("processes of cluster.supervisor", "processes of cluster.supervisor"),
        ("lower preferences.margin", "lower preferences.margin"),
    ],
)
def test_fields_become_options(message: str, shown: str) -> None:
    assert with_options(message, OPTIONS["influence"]) == shown


def messages(path: Path) -> str:
    """Return the string constants of a module, without docstrings and descriptions of settings."""
    tree = ast.parse(path.read_text())
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        described = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Field", "_field")
        if described or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            left_out |= set(ast.walk(node))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in left_out)
    return "\n".join(text for text in constants if isinstance(text, str))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_field_of_a_measurement_has_an_option(name: str) -> None:
    group: Any = typer.main.get_command(app)
    given = {option for parameter in group.commands[name].params for option in parameter.opts}
    core, seen = ROOT / "montessori_core", set()
    for place in SPEAKING:
        for path in [core / place] if place.endswith(".py") else (core / place).rglob("*.py"):
            fields = set(re.findall(rf"(?<![\w./-])(?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*", messages(path)))
            for field in fields - KEPT:
                named = re.findall(r"--[a-z-]+", with_options(field, OPTIONS[name]))
                assert set(named) <= given, f"{path}: {field}"
                # The step of a validation is of first order; it has no options of other estimators.
                assert named or (name == "validate" and field in STEP_OPTIONS), f"{path}: {field}"
                seen.add(field)
    assert {"student.max_length", "influence.reference_batch_tokens", "warmup.learning_rate"} <= seen


def refusal(*arguments: str) -> str:
    code, output = invoke(*arguments, cwd=ROOT)
    assert code == 1, output
    return " ".join(output.split())


def test_errors_of_data_name_options(tiny_llama: Path, tmp_path: Path) -> None:
    student, out = str(tiny_llama), str(tmp_path / "out")

    def rows(name: str, *content: object) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(tmp_path / name)

    good = rows("good.jsonl", *[GOOD] * 9)
    bad, renamed = rows("bad.jsonl", GOOD, {"instruction": 7}), rows("renamed.jsonl", {"question": "a", "answer": "b"})
    system, template, scored = rows("system.jsonl", SYSTEM), tmp_path / "template.jinja", tmp_path / "scored.parquet"
    template.write_text("{% if")
    write_table(table_from_rows([], schema_with_metadata(dict.fromkeys(NOTES, 0.0))), scored, INFLUENCE)
    select = ["select", str(scored), "--k", "1", "--output", f"{out}.jsonl", "--examples"]
    mapping = "'{{path: ..., {}}}'".format
    dropped = mapping("drop_bad_rows: true")
    measure = ["influence", "--student", student, "--out", f"{out}.parquet", "--examples"]
    validate = ["validate", "--student", student, "--out", out, "--examples", good]
    for arguments, message in (
        ([*measure, bad], f"set --examples {dropped}"),
        ([*measure, f"{{path: {bad}, drop_bad_rows: true}}"], f"more than --examples {mapping('max_bad_rows: ...')}"),
        ([*measure, renamed], "name the column that holds it with --instruction-field"),
        ([*measure, system], f"set --examples {mapping('system_turn: ...')} to prepend"),
        ([*measure, "builtin"], "--examples: builtin: the built-in sets"),
        ([*measure, good, "--reference", bad], f"set --reference {dropped}"),
        (
            [*measure, good, "--reference", renamed],
            f"name the column that holds it with --reference {mapping('instruction_field: ...')}",
        ),
        ([*measure, good, "--max-length", "4096"], "--max-length=4096, but max_position_embeddings"),
        ([*measure, good, "--chat-template", str(template)], "or set another one with --chat-template"),
        ([*validate, "--reference", bad], f"set --reference {dropped}"),
        ([*validate, "--warmup", bad], f"set --warmup {dropped}"),
        ([*validate, "--warmup", renamed], "name the column that holds it with --instruction-field"),
        ([*validate, "--reference", f"{{path: {good}, limit: 3}}"], "--reference: "),
        (["train", student, bad, "--output", f"{out}-student"], f"set DATA {dropped}"),
        (["train", student, renamed, "--output", f"{out}-student"], f"with DATA {mapping('instruction_field: ...')}"),
        (["evaluate", student, "--run-root", out, "--chat-template", "absent.jinja"], "--chat-template: absent.jinja"),
        (
            ["evaluate", student, "--run-root", out, "--set", f"evaluation.path={bad}"],
            "set evaluation.drop_bad_rows: true",
        ),
        ([*select, bad], f"set --examples {dropped}"),
        ([*select, renamed], f"with --examples {mapping('instruction_field: ...')}"),
        (["data", "check", bad], "SOURCE '{path: ..., drop_bad_rows: true, max_bad_rows: ...}'"),
        (["data", "check", rows("mixed.jsonl", TURNS, GOOD)], f"with SOURCE {mapping('conversation_field: ...')}"),
        (["data", "check", renamed], f"with SOURCE {mapping('instruction_field: ...')}"),
        (["plan", "--teacher", student, "--quantization", "nf4"], "give --lora-rank"),
        (["plan", "--teacher", student, "--quantization", "int8", "--lora-rank", "4"], "--quantization is not valid"),
    ):
        shown = refusal(*arguments)
        assert message in shown, (arguments, shown)

"""Documentation: shown commands run, named things exist, and the site builds and works offline."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from flows.cli import app
from montessori_core.config import DataFormat, DataSource, Experiment, Study
from montessori_core.data.files import COMPRESSIONS, KINDS
from montessori_core.data.sources import read_tasks
from montessori_core.errors import DataError
from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATION = runpy.run_path(str(ROOT / "docs" / "configuration.py"))
GUARANTEES = runpy.run_path(str(ROOT / "docs" / "guarantees.py"))
PACKAGES = ("flows", "tasks", "cluster", "montessori_core")
SPEAKING = ("flows", "tasks", "cluster", "montessori_report")
"""Packages whose strings people read; those of the core include prompts and regular expressions."""


@pytest.mark.parametrize("page", ["README.md", "docs/influence.md"])
def test_influence_as_a_library_runs_as_documented(page: str, tiny_llama: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    pairs = [(f"Say {n}.", f"I say {n}.") for n in range(4)]
    names: dict[str, Any] = {"student": str(tiny_llama), "good": pairs[:2], "data": pairs[2:]}
    exec(compile(code, page, "exec"), names)
    assert [score.status for score in names["scores"]] == ["ok", "ok"]


def test_links_between_documents_resolve() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_tables_have_headers() -> None:
    # A blank line in the middle of a table ends it, and the rows below are shown as text.
    for page in PAGES:
        fenced = False
        for number, (before, line, after) in enumerate(triples(page.read_text().splitlines()), start=1):
            fenced ^= line.startswith("```")
            if not fenced and line.startswith("|") and not before.startswith("|"):
                assert re.match(r"\|[-:| ]+\|$", after), f"{page.name}:{number}: {line}"


def triples(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields each line between its neighbours."""
    return zip(["", *lines], lines, [*lines[1:], ""], strict=False)


def test_configuration_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == CONFIGURATION["page"](), "docs/configuration.md is out of date; run: python docs/configuration.py"


def test_guarantees_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    assert written == GUARANTEES["page"](), "docs/guarantees.md is out of date; run: python docs/guarantees.py"


def test_guarantees_have_tests() -> None:
    tested = set(GUARANTEES["tested"]())
    names = {page: GUARANTEES["named"](page) for page in GUARANTEES["PAGES"]}
    assert set(names["reliability.md"]) <= tested
    assert tested <= {name for page in names.values() for name in page}
    assert len(tested & set(names["security.md"])) > 15


# Words that make a reader translate.
STUMBLING = ["went on", "go on", "goes on", "at work", "mend", "anew", "be had", "so many", "told apart", "of which"]
STUMBLING += ["what is not", "of one's own", "slope", "worth", "disturb", "pieces", "widen", "bury", "oversight"]
STUMBLING += ["as it were", "behind our back", "in vain", "they lie", "wanted kind"]


def stumbling(text: str) -> list[str]:
    return re.findall(rf"\b(?:{'|'.join(STUMBLING)})\b", " ".join(text.split()), re.IGNORECASE)


def test_pages_are_plain_english() -> None:
    assert {page.name: words for page in PAGES if (words := stumbling(page.read_text()))} == {}


def test_docstrings_are_plain_english() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in (file for package in (*PACKAGES, "montessori_report") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            assert not stumbling(text or ""), f"{path}: {text}"


def test_messages_and_labels_are_plain_english() -> None:
    """Errors, warnings, labels and titles are string constants, or the constant parts of f-strings."""
    for path in (file for package in SPEAKING for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not stumbling(node.value), f"{path}:{node.lineno}: {node.value}"


def test_readme_is_short_and_shows_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    folder = ""
    (tree,) = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown: list[str] = []
    for line in tree.splitlines():
        names = list(takewhile(re.compile(r"[\w.]+/|\w+\.py").fullmatch, line.split()))
        folder = folder if line.startswith(" ") else ""
        shown += [f"{folder}{name}" for name in names]
        folder = folder or names[0]
    assert [path for path in shown if not (ROOT / path).exists()] == []
    modules = {f"{package}/{file.name}" for package in PACKAGES for file in (ROOT / package).glob("[a-z]*.py")}
    assert sorted(modules - set(shown)) == []


def test_environment_page_names_every_variable() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(MONTESSORI_[A-Z_]+)` \|", page, re.MULTILINE)
    folders = (*PACKAGES, "montessori_report", "docker")
    files = [ROOT / "montessori_entry.py", *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    assert sorted(shown) == sorted({name for text in texts for name in re.findall(r"\bMONTESSORI_[A-Z_]+", text)})


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every documented command line, in blocks and in sentences, as the words after `montessori`."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines += [quoted.replace("\n", " ") for quoted in re.findall(r"`([^`]+)`", prose)]
        for line in lines:
            words = re.match(r"(?:\.venv/bin/)?montessori (.+)", line)
            if words:
                yield page.name, shlex.split(words[1], comments=True)


def test_documented_commands_and_options_exist() -> None:
    group: Any = typer.main.get_command(app)
    seen = 0
    for page, words in commands():
        command = group
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        assert words == ["--help"] or not hasattr(command, "commands"), f"{page}: montessori {shlex.join(words)}"
        try:
            command.make_parser(typer.Context(command)).parse_args(list(words))
        except Exception as error:
            pytest.fail(f"{page}: montessori {command.name} {shlex.join(words)}: {error}")
        seen += 1
    assert seen > 50


def test_documented_settings_exist() -> None:
    paths = {kind: {row.path for row in CONFIGURATION["rows_of"](kind)} | {"name"} for kind in (Experiment, Study)}
    paths[Study] |= {f"experiment.{path}" for path in paths[Experiment]}
    for page, words in commands():
        settings = [word.partition("=")[0] for before, word in pairwise(words) if before == "--set"]
        known = paths[Study if words[0] == "compare" else Experiment]
        assert {setting for setting in settings if "..." not in setting} <= known, page


DATA_PAGE = (ROOT / "docs" / "data-and-models.md").read_text()
GOOD_DATA, *_ = re.findall(r"```jsonl\n([^`]*)```", DATA_PAGE)
BAD_DATA = re.findall(r"```jsonl\n([^`]*)```\n\n```text\n([^`]*)\n```", DATA_PAGE)


def test_kinds_and_formats_of_data_are_documented() -> None:
    [row] = re.findall(r"^\| `rows\.jsonl`.*$", DATA_PAGE, re.MULTILINE)
    suffixes = re.findall(r"`(?:rows)?(\.\w+)`", row.partition("a file.")[0])
    assert suffixes == [*KINDS, *COMPRESSIONS]
    formats = re.findall(r"^`(\w+)`[:,]", DATA_PAGE.partition("### Formats")[2].partition("\n### ")[0], re.MULTILINE)
    assert formats == list(get_args(DataFormat))
    field = DataSource.model_fields["path"].description or ""
    assert re.findall(r"(?<=[ (])\.\w+", field.partition("; a glob")[0]) == [*KINDS, *COMPRESSIONS]


def test_good_data_is_read_as_documented(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(GOOD_DATA)
    tasks = read_tasks(DataSource(path=str(tmp_path / "data.jsonl")), "reference", with_response=True)
    assert [task.instruction for task in tasks] == ["Name three rivers. In Asia.", "Add 2 and 2."]
    assert len(BAD_DATA) == 6


def test_documented_formats_are_one_task(tmp_path: Path) -> None:
    rows = re.findall(r"```json\n(.*)\n```", DATA_PAGE)
    path = tmp_path / "row.jsonl"
    tasks = set()
    for row in rows:
        path.write_text(row)
        tasks.update(read_tasks(DataSource(path=str(path)), "reference", with_response=True))
    assert len(rows) == 5
    assert len(tasks) == 1


@pytest.mark.guarantee("broken rows or wrong fields")
@pytest.mark.parametrize(("content", "said"), BAD_DATA, ids=range(len(BAD_DATA)))
def test_bad_data_is_refused_as_documented(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(content)
    with pytest.raises(DataError) as refusal:
        read_tasks(DataSource(path="data.jsonl"), "reference", with_response=True)
    assert str(refusal.value) == said


def test_method_page_names_existing_code() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "method.md").read_text().splitlines() if line.startswith("| ")]
    modules = [name for row in rows for name in re.findall(r"`([\w/.]+)`", row[3])]
    settings = [name.partition(":")[0] for row in rows for name in re.findall(r"`([\w.: *]+)`", row[4])]
    assert len(modules) > 25
    assert len(settings) > 25
    for name in modules:
        assert (ROOT / name).exists() if "/" in name else list(ROOT.glob(f"[a-z]*/**/{name}")), name
    paths = [row.path for kind in (Experiment, Study) for row in CONFIGURATION["rows_of"](kind)]
    known = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, 1 + len(path.split(".")))}
    for name in settings:
        pattern = re.escape(name).replace(r"\*", ".*")
        assert any(re.fullmatch(pattern, one) for one in known), name


def test_documented_tests_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)(?:\[[^]]*\])?`", page.read_text()):
            assert f"def {name}(" in sources, f"{page.name}: {name}"


def test_site_builds_and_works_offline(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    loads = r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^ >]+"
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert len(pages) > len(PAGES)
    assert [found for text in pages.values() for found in re.findall(loads, text)] == []
    assert not any('class="mermaid"' in text for text in pages.values())  # the theme would download a library


def test_citation_agrees_with_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text()

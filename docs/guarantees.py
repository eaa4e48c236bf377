"""Write docs/guarantees.md, which tests check which guarantee: python docs/guarantees.py.

A guarantee is a row of `reliability.md` or `security.md` with a bold name. A test refers to it by that name:
`@pytest.mark.guarantee("disk full")`.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
PAGES = ("reliability.md", "security.md")
_TESTS = PAGE.parent.parent / "tests"
_HEAD = """# Guarantees and their tests

Written by `python docs/guarantees.py` from the marks of the tests (`@pytest.mark.guarantee`); do not edit this page.
*Slow* tests run in `make test-all`, the others in `make test` as well."""


def named(page: str) -> list[str]:
    """Return the guarantees of a page, in its order."""
    return re.findall(r"^\| \*\*(.+?)\*\* \|", (PAGE.parent / page).read_text(encoding="utf-8"), re.MULTILINE)


def tested() -> dict[str, list[str]]:
    """Return the tests of each guarantee that any test is marked with, as Markdown."""
    tests: dict[str, list[str]] = defaultdict(list)
    for path in sorted(_TESTS.rglob("test_*.py")):
        file = path.relative_to(_TESTS.parent)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                marks = [mark for decorator in node.decorator_list for mark in _marks(decorator)]
                # Not the marks of single parameters.
                slow = " (slow)" if "pytest.mark.slow" in map(ast.unparse, node.decorator_list) else ""
                text = f"`{node.name}`{slow} in `{file}`"
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                marks, text = list(_marks(node.value)), f"all of `{file}`"
            else:
                continue
            for name, argument in marks:
                if name == "guarantee":
                    tests[argument].append(text)
    return tests


def _marks(expression: ast.expr) -> Iterator[tuple[str, str]]:
    """Yield name and first argument of the marks in a decorator or in `pytestmark`."""
    calls = {id(node.func): node for node in ast.walk(expression) if isinstance(node, ast.Call)}
    for node in ast.walk(expression):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark":
            call = calls.get(id(node))
            arguments = call.args if call else []
            yield node.attr, str(arguments[0].value) if arguments and isinstance(arguments[0], ast.Constant) else ""


def page() -> str:
    """Return the page's text."""
    tests = tested()
    parts = [_HEAD]
    for source in PAGES:
        lines = [f"## [{source.removesuffix('.md').capitalize()}]({source})", "", "| guarantee | tests |", "|---|---|"]
        lines += [f"| {name} | {'; '.join(tests.get(name, ['-']))} |" for name in named(source)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

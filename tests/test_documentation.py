"""What the documentation shows runs as it stands there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_influence_as_a_library_runs_as_documented(tiny_llama: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "influence.md").read_text(), re.DOTALL)
    pairs = [(f"Say {n}.", f"I say {n}.") for n in range(4)]
    names = {"student": str(tiny_llama), "good": pairs[:2], "data": pairs[2:]}
    exec(compile(code, "docs/influence.md", "exec"), names)
    assert [score.status for score in names["scores"]] == ["ok", "ok"]  # type: ignore[union-attr]


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"

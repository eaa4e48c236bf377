"""The tutorial on one's own data: its commands run as they are shown, and show what the page shows."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from montessori_core.files import read_json
from support import ROOT
from support.runs import call

PAGE = (ROOT / "docs" / "tutorial-data.md").read_text(encoding="utf-8").partition("## With GSM8K")[0]


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands() -> list[list[str]]:
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("montessori ")) for line in lines if line.startswith("montessori ")]


def test_page_shows_the_whole_way() -> None:
    shown = [words[0] for words in commands()]
    assert list(dict.fromkeys(shown)) == ["data", "influence", "select", "train", "evaluate", "export"]
    assert "/work" not in PAGE


@pytest.mark.slow
def test_tutorial_runs_as_shown(smollm2: Path, finished_run: Path, tmp_path: Path) -> None:
    """The export is of another run than the page's: the quickstart takes minutes."""
    (script, *_) = blocks("python")
    code = compile(script, "make_data.py", "exec")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code, {"__name__": "__main__"})
    shutil.copytree(finished_run / "runs" / "tiny", tmp_path / "runs" / "quickstart")
    for words in commands():
        status, output = call(*words, cwd=tmp_path, seconds=1800)
        assert status == 0, f"montessori {shlex.join(words)}\n{output}"
        if words[0] == "data":
            (shown, *_) = blocks("text")
            assert set(shown.split()) <= set(output.split())
    losses = {
        name: read_json(tmp_path / "runs" / f"evaluation-{name}" / "evaluation.json")["held_out_loss"]["mean"]
        for name in ("smollm2-135m", "student", "control")
    }
    assert losses["student"] < losses["smollm2-135m"], losses
    assert (tmp_path / "runs" / "quickstart" / "exports" / "training-messages" / "README.md").exists()

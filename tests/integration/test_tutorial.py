"""The tutorial on one's own data: its commands run as they are shown, and show what the page shows."""

import re
import shlex
from pathlib import Path

import pytest

from montessori_core.files import read_json
from support import ROOT
from support.reports import write_run
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
    assert list(dict.fromkeys(shown)) == [
        "data",
        "influence",
        "select",
        "train",
        "evaluate",
        "export",
        "preview",
        "run",
    ]


@pytest.mark.slow
def test_tutorial_runs_as_shown(smollm2: Path, tmp_path: Path) -> None:
    outputs = run_page(tmp_path)
    (shown, *_) = blocks("text")
    assert set(shown.split()) <= set(outputs[0].split())
    losses = {
        name: read_json(tmp_path / "runs" / name / "evaluation.json")["held_out_loss"]["mean"]
        for name in ("untrained-on-pool", "evaluation-student", "evaluation-control")
    }
    assert losses["evaluation-student"] < losses["untrained-on-pool"], losses
    assert "8 of 24 scored rows" in outputs[2]
    assert (tmp_path / "runs" / "quickstart" / "exports" / "preferences-trl" / "README.md").exists()
    (notes,) = (tmp_path / "runs" / "notes" / "exports").glob("*/data/train.jsonl")
    assert len(notes.read_text().splitlines()) == 24


def run_page(folder: Path) -> list[str]:
    """Run the page's scripts and commands; return what the commands print.

    The exported run is another one: a quickstart takes minutes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script in blocks("python"):
            exec(compile(script, "page", "exec"), {"__name__": "__main__"})
    write_run(folder / "runs" / "quickstart")
    outputs = []
    for words in commands():
        status, output = call(*words, cwd=folder, seconds=1800)
        assert status == 0, f"montessori {shlex.join(words)}\n{output}"
        outputs.append(output)
    return outputs

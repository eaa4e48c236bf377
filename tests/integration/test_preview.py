"""montessori preview: the first examples of a run, and nothing left behind."""

import os
import signal
from pathlib import Path

import pytest
import yaml

from montessori_core.config import read_experiment
from montessori_core.data.tables import INSTRUCTIONS, read_table
from montessori_core.errors import UserError
from support import wait_until
from support.runs import call, configuration, hangups_end_children, left_over, montessori
from tasks.preview import preview_run, write_preview


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs").iterdir()) if (folder / "runs").exists() else []


@pytest.mark.slow
def test_preview_writes_the_first_examples_of_a_run(finished_run: Path, tmp_path: Path) -> None:
    experiment = read_experiment(finished_run / "tiny.yaml")
    with preview_run(experiment, tmp_path / "runs") as (run, warnings):
        assert not warnings
        written = write_preview(run, 4)
    assert hidden(tmp_path) == []
    assert written.candidates[0]["example_id"] == "i1-probing-p000000-s0"
    table = read_table(
        finished_run / "runs" / "tiny" / "iteration-1" / "instructions.parquet", INSTRUCTIONS
    ).to_pylist()
    of_run = {row["example_id"]: row for row in table}
    assert len(written.candidates) == 8
    pairs = [(row, of_run[row["example_id"]]) for row in written.candidates]
    assert all(row["prompt"] == other["prompt"] for row, other in pairs)
    # The last bits of probabilities depend on the batch, and random weights are near many ties.
    assert sum(row["raw_output"] == other["raw_output"] for row, other in pairs) >= 5
    assert len(written.examples) == 4
    assert written.seconds_per_example is not None
    assert written.seconds_per_example < written.seconds


def test_preview_shows_prompts_verdicts_and_time(talking_llama: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, talking_llama)
    refused = "synthesis.filters=[{name: length, max_characters: 20}]"
    code, output = call("preview", str(config), "--examples", "4", "--set", refused, cwd=tmp_path)
    assert code == 0, output
    assert "prompt i1-probing-p000000" in output
    assert "A collection of varied tasks" in output
    assert "length: too long" in output
    assert "8 candidates of 2 prompts" in output
    assert "in all, with starting jobs and loading models" in output
    assert hidden(tmp_path) == []
    assert left_over(tmp_path) == []


def test_preview_refuses_what_a_run_refuses(talking_llama: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, talking_llama)
    code, output = call("preview", str(config), "--set", "seed_pool.path=no.jsonl", cwd=tmp_path)
    assert code == 1
    assert "no.jsonl" in output
    assert hidden(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_interrupted_preview_is_cleaned_up(how: signal.Signals, talking_llama: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, talking_llama)
    content = yaml.safe_load(config.read_text())
    content["synthesis"]["instruction"]["max_tokens"] = 1500  # no time to finish
    config.write_text(yaml.safe_dump(content))
    with hangups_end_children():
        process = montessori("preview", str(config), "--examples", "400", cwd=tmp_path)
    wait_until(lambda: list((tmp_path / "runs").glob(".preview-*/run/preview/*/jobs/node-of-*")), 300, process=process)
    process.send_signal(how)
    process.wait(120)
    if how is not signal.SIGKILL:
        assert hidden(tmp_path) == []
        wait_until(lambda: not left_over(tmp_path), 60)
        return
    (folder,) = (tmp_path / "runs").iterdir()
    other = read_experiment(config, ("seed_pool.path=no.jsonl",))
    for left in ([folder.name], []):  # the next preview ends its jobs; one after an hour removes its folder
        with pytest.raises(UserError, match=r"no\.jsonl"), preview_run(other, tmp_path / "runs"):
            pass
        assert not [command for command in left_over(tmp_path) if "cluster.supervisor" in command]
        assert hidden(tmp_path) == left
        if left:
            os.utime(folder, (1, 1))

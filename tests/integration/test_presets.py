"""The paper's presets with the tiny Llama: only sizes and resources are reduced."""

import json
import shutil
from pathlib import Path

import pytest

from montessori_core.data.tables import EXAMPLES, INFLUENCE, INSTRUCTIONS, PREFERENCES, read_table
from montessori_core.synthesis.paper_request import PAPER_REQUEST
from montessori_core.synthesis.prompts import OPEN
from support import CONFIGS
from support.runs import finish_lean

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SIZES = (
    *("seed_pool={path: builtin}", "reference={path: builtin, limit: 8}", "evaluation={path: builtin, limit: 4}"),
    *("warmup.examples=40", "influence.probing_examples=32", "influence.later_probing_examples=16"),
    *("training.examples=40", "comparison={unmodified_teacher: false, influence_examples: 0}"),
    "cluster={profile: local, resources: {teacher_update: {processes_per_node: 2}}}",
)


@pytest.fixture
def base_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama as a base model, without a chat template."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(("name", "peak"), [("paper-8b", 5e-6), ("paper-1b", 1e-5)])
def test_paper_preset_runs_to_completion(
    name: str, peak: float, explaining_llama: Path, base_llama: Path, tmp_path: Path
) -> None:
    changes = (*SIZES, f"teacher.model={explaining_llama}", f"student.model={base_llama}")
    options = [word for change in changes for word in ("--set", change)]
    finish_lean("run", str(CONFIGS / f"{name}.yaml"), *options, cwd=tmp_path, seconds=1700)
    run = tmp_path / "runs" / name
    for number, probed in ((1, 32), (2, 16)):
        folder = run / f"iteration-{number}"
        candidates = read_table(folder / "instructions.parquet", INSTRUCTIONS).to_pylist()
        accepted = [row for row in candidates if row["rejection"] is None]
        assert len(accepted) > len(candidates) / 10
        assert all(PAPER_REQUEST.strip() in row["prompt"] for row in candidates)
        explained = ["It helps." in row["raw_output"].partition(OPEN)[0] for row in accepted]
        assert sum(explained) > len(accepted) / 2
        assert read_table(folder / "examples.parquet", EXAMPLES).num_rows >= probed

        influence = read_table(folder / "influence.parquet", INFLUENCE).to_pylist()
        assert [row["status"] for row in influence] == ["ok"] * probed
        pairs = read_table(folder / "preferences.parquet", PREFERENCES).to_pylist()
        assert all(pair["chosen_influence_student"] > pair["rejected_influence_student"] for pair in pairs)

        updates = rates_of(folder / "teacher")
        assert len(updates) == -(-len(pairs) // 2)
        assert (max(updates), updates[-1]) == pytest.approx((1e-6, 1e-9))
        steps = rates_of(folder / "student")
        assert steps == pytest.approx([peak, peak / 1000])
    assert rates_of(run / "iteration-1" / "warmup") == pytest.approx([peak / 2, peak])


def rates_of(folder: Path) -> list[float]:
    """Return the learning rate of each optimizer step."""
    log = json.loads((folder / "part-00000" / "training_log.json").read_text())
    return [entry["learning_rate"] for entry in log]

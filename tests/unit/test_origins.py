"""Licences of data sets, as their cards state them."""

from pathlib import Path

import pytest

from montessori_core.config import DataSource, parse_experiment
from montessori_core.data.origins import Origin, origin_of, read_origins, write_origins
from montessori_core.data.sources import read_sources, read_tasks
from tasks.run import open_run


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Rows", "mit"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: []\n---\n", None),
        ("---\nlicense: [mit, 3]\n---\n", None),
        ("---\nlicense: <script>\n---\n", None),
        ("---\nlicense: [a: b: c\n---\n", None),
        ("# Words about a license: mit\n", None),
    ],
)
def test_licence_is_that_of_the_folder(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "train.jsonl").write_text('{"instruction": "Name a colour.", "output": "Red."}\n')
    for path in (tmp_path, tmp_path / "train.jsonl", tmp_path / "*.jsonl"):
        origins: dict[str, Origin] = {}
        read_tasks(DataSource(path=str(path)), "reference", True, None, origins)
        assert origins == {"reference": Origin(licence)}


def test_sets_without_a_card_state_no_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    assert origin_of(str(tmp_path)).licence_text == "not stated"
    assert origin_of("s3://bucket/rows.jsonl") == Origin(None)
    assert origin_of("group/absent", "1" * 40) == Origin(None, "1" * 40)
    assert origin_of("builtin/maths") == Origin("apache-2.0")


def test_run_records_the_origins_once(tiny_llama: Path, tmp_path: Path) -> None:
    folder, documents = tmp_path / "rows", tmp_path / "documents"
    for path, licence in ((folder, "cc0-1.0"), (documents, "mit")):
        path.mkdir()
        (path / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Words\n")
    rows = (f'{{"instruction": "Name colour {n} of the rainbow.", "output": "Red {n}."}}' for n in range(12))
    (folder / "train.jsonl").write_text("\n".join(rows))
    (documents / "birds.txt").write_text("A robin sings in the morning from the top of a tall old tree.")
    strategy = {"name": "grounded", "documents": str(documents)}
    model = {"model": str(tiny_llama)}
    experiment = parse_experiment(
        {
            "teacher": model,
            "student": {**model, "max_length": 128},
            "reference": {"path": str(folder)},
            "synthesis": {"strategy": strategy},
            "teacher_update": {"max_length": 128},
        },
        "test",
    )
    origins: dict[str, Origin] = {}
    read_sources(experiment, None, origins)
    assert origins["reference"] == Origin("cc0-1.0")
    run, _ = open_run(experiment, tmp_path / "run")
    expected = {**origins, "documents": Origin("mit")}
    assert read_origins(run.folder / "data_sets.json") == expected
    (folder / "README.md").unlink()
    open_run(experiment, tmp_path / "run")
    assert read_origins(run.folder / "data_sets.json") == expected
    write_origins({"reference": Origin(None, "1" * 40)}, run.folder / "data_sets.json")
    assert read_origins(run.folder / "data_sets.json") == {**expected, "reference": Origin(None, "1" * 40)}

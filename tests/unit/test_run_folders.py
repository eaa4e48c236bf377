"""Which folders are runs: a user's files of the same names are neither taken for one nor overwritten."""

import json
import shutil
from contextlib import chdir, suppress
from pathlib import Path

import pytest
import yaml

from cluster.lock import only_driver
from flows.cli.options import with_paths_from
from flows.cli.run import continued_run
from flows.evaluation import evaluated_experiment, open_evaluation
from flows.study import open_study
from montessori_core.config import read_experiment, read_study
from montessori_core.errors import UserError
from support.full_disk import full_after
from support.runs import configuration, invoke
from tasks.resume import study_of
from tasks.run import open_run

COMMENT = "# written by hand\n"


def write_project(folder: Path, model: Path) -> dict[Path, bytes]:
    """Write a user's project: a configuration and a data folder with the names that a run has; return its files."""
    (folder / "sources").mkdir(parents=True)
    (folder / "sources" / "reference.jsonl").write_text(
        json.dumps({"instruction": "Name a river.", "output": "Rhine."})
    )
    written = configuration(folder, model)
    (folder / "config.yaml").write_text(COMMENT + written.read_text())
    written.unlink()
    return files_of(folder)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_project_is_no_run(tiny_llama: Path, tmp_path: Path) -> None:
    """Its configuration starts a run in the folder of runs."""
    files = write_project(tmp_path, tiny_llama)
    new = tmp_path / "runs" / "tiny"
    new.mkdir(parents=True)
    with only_driver(new):
        code, output = invoke("run", "config.yaml", cwd=tmp_path)
    assert (code, "runs/tiny: this run already has a driver" in output) == (1, True), output
    assert files_of(tmp_path).items() >= files.items()
    assert not (tmp_path / "driver.lock").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["run", "project/config.yaml", "--run-root", ".", "--name", "project"],
        ["resume", "project"],
        ["retry", "project"],
    ],
    ids=["run", "resume", "retry"],
)
def test_project_is_not_overwritten_by_a_run(command: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    files = write_project(tmp_path / "project", tiny_llama)
    code, output = invoke(*command, cwd=tmp_path)
    assert (code, "config.yaml is not that of a run, and is not overwritten" in " ".join(output.split())) == (1, True)
    assert files_of(tmp_path / "project") == files


@pytest.mark.parametrize("name", ["sources/reference.jsonl", "models/student/config.json", "models.json"])
def test_new_run_and_evaluation_overwrite_no_files(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The folder is a project whose configuration has another name."""
    file = tmp_path / "project" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    experiment = read_experiment(configuration(tmp_path, tiny_llama))
    evaluation = evaluated_experiment(experiment.model_dump(mode="json"), str(tiny_llama), "project", "test")
    refusal = f"{name.split('/')[0]} is not that of a run, and is not overwritten: choose another name or --run-root"
    for open_folder in (
        lambda: open_run(experiment, tmp_path / "project"),
        lambda: open_evaluation(evaluation, tmp_path / "project"),
    ):
        with pytest.raises(UserError, match=refusal):
            open_folder()
        assert files_of(tmp_path / "project") == {file: b"{}"}


def test_run_continues_wherever_its_opening_ended(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was opened by a release that wrote no opened.yaml."""
    experiment = read_experiment(configuration(tmp_path, tiny_llama))
    for writes in range(20):
        folder = tmp_path / str(writes) / "run"
        with full_after(writes, monkeypatch), suppress(UserError):
            open_run(experiment, folder)
            break
        open_run(experiment, folder)
        assert continued_run(folder / "config.yaml", None, None, ()) == folder
    assert writes > 4
    (folder / "opened.yaml").unlink()
    assert continued_run(folder / "config.yaml", None, None, ()) == folder
    open_run(experiment, folder)


def test_configuration_of_a_run_continues_it(tiny_llama: Path, tmp_path: Path) -> None:
    """Also if the run was copied, which keeps its name in the configuration, and wherever the command is started."""
    open_run(read_experiment(configuration(tmp_path, tiny_llama)), tmp_path / "run")
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(tmp_path / "run", copy)
    shutil.copy(copy / "config.yaml", tmp_path / "config.yaml")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.yaml").symlink_to(copy / "config.yaml")
    begun, here = copy / "config.yaml", tmp_path
    for directory, file, root, name, overrides, expected in (
        (here, begun, None, None, ("preferences.max_pairs=3",), copy),
        (here, begun.relative_to(here), Path("elsewhere"), None, (), copy),
        (copy, Path("config.yaml"), Path(".."), None, (), copy),
        (copy, Path("config.yaml"), Path(), None, (), None),
        (here, begun, None, None, ("name=tiny",), copy),
        (here, begun, None, None, ("name=another",), None),
        (here, begun, None, "tiny", ("name=tiny",), None),
        (here, begun, Path("other"), None, (), None),
        (here, here / "config.yaml", None, None, (), None),
        (here, here / "linked" / "config.yaml", None, None, (), None),
    ):
        with chdir(directory):
            assert continued_run(file, root, name, overrides) == expected, (file, root, name, overrides)


def write_study(folder: Path, model: Path, name: str) -> Path:
    """Write a study by hand; return its file."""
    folder.mkdir(exist_ok=True)
    content = {"name": name, "experiment": configuration(folder, model).name, "seeds": [1]}
    file = folder / "study.yaml"
    file.write_text(COMMENT + yaml.safe_dump(content))
    return file


def test_study_written_by_hand_is_not_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    """Seed tasks beside it are no seeds of a study that has begun."""
    file = write_study(tmp_path / "project", tiny_llama, "project")
    (tmp_path / "project" / "seed-tasks.jsonl").touch()
    before = files_of(tmp_path)
    code, output = invoke("compare", "project/study.yaml", "--run-root", ".", cwd=tmp_path)
    assert (code, "study.yaml is not that of a study that has begun" in " ".join(output.split())) == (1, True), output
    assert files_of(tmp_path) == before
    open_study(read_study(file), tmp_path / "runs" / "project")
    open_study(read_study(file), tmp_path / "runs" / "project")


def test_study_written_beside_runs_has_none_of_them(tiny_llama: Path, tmp_path: Path) -> None:
    write_study(tmp_path, tiny_llama, "mine")
    assert study_of(tmp_path / "runs" / "tiny") is None
    new = tmp_path / "runs" / "tiny"
    new.mkdir(parents=True)
    with only_driver(new):
        code, output = invoke("run", "tiny.yaml", cwd=tmp_path)
    assert (code, "runs/tiny: this run already has a driver" in output) == (1, True), output


@pytest.mark.parametrize("setting", ["benchmarks.mt_bench=questions.jsonl", "benchmarks={mt_bench: questions.jsonl}"])
def test_paths_of_options_are_of_the_users_directory(setting: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The run or study was started in another one, which has a file of the same name."""
    started = tmp_path / "started"
    study = write_study(started, tiny_llama, "study")
    (started / "questions.jsonl").write_text('{"question_id": 1, "category": "writing", "turns": ["Sing.", "Stop."]}')
    with chdir(started):
        open_run(read_experiment(Path("tiny.yaml")), Path("runs/tiny"))
        open_study(read_study(study), Path("runs/study"))
    runs = started / "runs"
    for command, section in (
        (["run", f"{runs}/tiny/config.yaml"], ""),
        (["compare", f"{runs}/study/study.yaml"], "experiment."),
    ):
        for_judge, files = f"--set={section}judge={{model: judge}}", f"--set={section}{setting}"
        code, output = invoke(*command, for_judge, files, cwd=tmp_path)
        assert (code, f"benchmarks.mt_bench: {tmp_path}/questions.jsonl: not found" in " ".join(output.split())) == (
            1,
            True,
        )


def test_names_in_options_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    texts = ["transfer=[{model: student}, {model: group/absent}]", "name=student", "preferences.max_pairs=3", "odd"]
    changed = f'transfer=[{{"model": "{here}/student"}}, {{"model": "group/absent"}}]'
    assert with_paths_from(here, texts) == [changed, *texts[1:]]
    assert with_paths_from(tmp_path, texts) == texts

"""A raised version recomputes the stages of its program, and nothing else."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from pydantic import BaseModel

from cluster.fanout import fan_out
from cluster.stage import Stage
from montessori_core import programs
from montessori_core.config import Resources, TeacherUpdate, Warmup, Zero
from montessori_core.files import hash_json, hash_path, read_json, write_json
from montessori_core.program import Program, load
from support import squares
from support.logged_programs import ADDING, DOUBLING, LogSettings
from support.row_programs import as_shards
from support.squares import CLUSTER

folder = squares.forking_folder
DECLARED: list[Program[Any]] = [value for value in vars(programs).values() if isinstance(value, Program)]


def key_of(program: Program[Any]) -> str:
    sections = {name: Zero(**values) for name, values in program.key_values.items()}
    stage = Stage.of(program, program.settings.model_construct(**sections), Path("stage"), {}, {})
    return stage.key(pa.table({"n": [1]}))


def compute(folder: Path, doubling: Program[LogSettings], adding: Program[LogSettings]) -> list[str]:
    """Run a stage of each program, one after the other; return the names of those that were computed."""
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    settings, resources = LogSettings(log=str(log)), Resources(cpus_per_process=1)
    first = Stage.of(doubling, settings, folder / "doubled", {}, {})
    [part] = fan_out(first, as_shards([{"n": 1}, {"n": 2}]), resources, CLUSTER)
    second = Stage.of(adding, settings, folder / "added", {"doubled": part}, {"doubled": hash_path(part)})
    [part] = fan_out(second, as_shards([{"n": 3}]), resources, CLUSTER)
    assert part.read_text() == "12"
    return log.read_text().split() if log.exists() else []


def test_new_version_recomputes_only_its_program(folder: Path) -> None:
    assert compute(folder, DOUBLING, ADDING) == ["doubling", "adding"]
    raised = replace(DOUBLING, version=2)
    assert compute(folder, raised, ADDING) == ["doubling"]  # with the same result, so that later stages are kept
    assert compute(folder, raised, replace(ADDING, version=2)) == ["adding"]
    moved = [replace(program, entry="moved:open") for program in (raised, replace(ADDING, version=2))]
    assert compute(folder, *moved) == []


@pytest.mark.parametrize("program", DECLARED, ids=lambda program: program.name)
def test_key_has_name_and_version_but_no_module(program: Program[Any]) -> None:
    assert key_of(replace(program, entry="elsewhere:open")) == key_of(program)
    assert key_of(replace(program, version=program.version + 1)) != key_of(program)
    assert key_of(replace(program, name="another")) != key_of(program)


def sections(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield a settings type and those of its fields."""
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from sections(field.annotation)
    for part in get_args(kind):
        yield from sections(part)


@pytest.mark.parametrize("program", DECLARED, ids=lambda program: program.name)
def test_optional_settings_are_off_by_default(program: Program[Any]) -> None:
    for section in sections(program.settings):
        for name, field in section.model_fields.items():
            if type(None) in get_args(field.annotation):
                assert field.default is None, f"{section.__name__}.{name}: a node would not read None"


def test_new_option_changes_key_if_on() -> None:
    class Settings(BaseModel):
        variables: dict[str, int | None] = {}

    class WithOption(Settings):
        option: int | None = None

    def key(settings: Settings) -> str:
        program = Program("test", 1, "", type(settings), dict, "training")
        return Stage.of(program, settings, Path("stage"), {}, {}).key(pa.table({"n": [1]}))

    assert key(WithOption()) == key(Settings())
    assert key(WithOption(option=1)) != key(Settings())
    assert key(Settings(variables={"one": None})) != key(Settings())


@pytest.mark.parametrize("program", [programs.SFT, programs.DPO], ids=["sft", "dpo"])
def test_key_excludes_offload(program: Program[Any]) -> None:
    """A training that ran out of memory continues its run with `zero.offload`, and finished ones are kept."""
    given = {"sft": {"max_length": 64, "save_moments": True}, "dpo": {"prompt_style": "chat"}}[program.name]
    recipe = {"sft": Warmup().shared(), "dpo": TeacherUpdate()}[program.name]

    def stage(**zero: Any) -> Stage:
        settings = program.settings(**given, recipe=recipe, zero=Zero(**zero), seed=0)
        return Stage.of(program, settings, Path("stage"), {}, {})

    table = pa.table({"n": [1]})
    plain, offloaded = stage(stage=3), stage(stage=3, offload="optimizer")
    content = [plain.program, plain.version, plain.settings, {}, table.to_pydict()]
    assert offloaded.key(table) == plain.key(table) == hash_json(content)  # as before keys excluded it
    assert offloaded.settings["zero"]["offload"] == "optimizer"
    assert stage(stage=2).key(table) != plain.key(table)


def test_training_described_by_an_earlier_version_keeps_its_key(tmp_path: Path) -> None:
    """Its jobs may still be queued, and would otherwise train for a key that no driver asks for."""
    settings = programs.Sft(
        max_length=64, save_moments=False, recipe=Warmup().shared(), zero=Zero(offload="optimizer"), seed=0
    )
    stage = Stage.of(programs.SFT, settings, tmp_path, {}, {})
    stage.write(as_shards([{"n": 1}]))
    description = read_json(tmp_path / "stage.json")
    assert description is not None
    del description["key_values"]
    write_json(description, tmp_path / "stage.json")
    assert Stage.read(tmp_path).key(stage.read_rows(0)) == stage.key(stage.read_rows(0))


@pytest.mark.parametrize("program", DECLARED, ids=lambda program: program.name)
def test_key_values_replace_existing_settings(program: Program[Any]) -> None:
    for section, values in program.key_values.items():
        settings = program.settings.model_fields[section].annotation
        assert isinstance(settings, type)
        settings.model_validate(values)


def test_declared_programs_have_unique_names() -> None:
    assert len({program.name for program in DECLARED}) == len(DECLARED)


@pytest.mark.parametrize("program", DECLARED, ids=lambda program: program.name)
def test_entry_of_program_exists(program: Program[Any]) -> None:
    assert callable(load(program.entry))

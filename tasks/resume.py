"""How to resume what a folder holds: a run, a study, or another command's work.

The commands evaluate, train, influence and validate record themselves in their folder.
"""

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.records import Record, read_record
from montessori_core import layout
from montessori_core.config import Cluster
from montessori_core.errors import UserError
from montessori_core.files import hash_json, read_json, write_json

_log = logging.getLogger(__name__)

STUDY = "study.yaml"
RUN_ROOT = "MONTESSORI_RUN_ROOT"
"""Environment variable: folder of runs started from Prefect. `montessori up` sets it; a worker needs it."""
_COMMAND = "command.json"
_DECIDES = "decides.json"
_KINDS = {
    "evaluate": "an evaluation",
    "train": "a training",
    "influence": "a measurement of influence",
    "validate": "a validation of influence",
}


class Command(Record):
    """The command whose work a folder holds.

    Attributes:
        words: after `montessori`, the name of the command first.
        directory: working directory, from which paths in `words` are read.
        model: the model that is evaluated, trained or measured.
        result: absolute path that exists when the command has finished.
        cluster: the section of a configuration.
        unused: names of folders of earlier options, which have none of its stages.
    """

    words: list[str]
    directory: str
    model: str
    result: str
    cluster: dict[str, object]
    unused: list[str] = Field(default_factory=list)

    @property
    def kind(self) -> str:
        """What the folder holds, such as 'an evaluation'."""
        return _KINDS[self.words[0]]

    def __str__(self) -> str:
        """Return the line that resumes the command in a shell here."""
        line = shlex.join(["montessori", *self.words])
        return line if self.directory == os.getcwd() else f"cd {shlex.quote(self.directory)} && {line}"


def record_command(
    folder: Path, words: Sequence[str], model: str, result: Path, cluster: Cluster, unused: Sequence[str] = ()
) -> None:
    """Record in a folder the command whose work it holds; see `Command`."""
    command = Command(
        words=list(words),
        directory=os.getcwd(),
        model=model,
        result=str(result.absolute()),
        cluster=cluster.model_dump(mode="json"),
        unused=list(unused),
    )
    write_json(command.model_dump(mode="json"), folder / _COMMAND)


def run_root_option() -> str:
    """Return what names the folder of runs, for messages: the option, or in a flow run of Prefect the variable."""
    return RUN_ROOT if "PREFECT__FLOW_RUN_ID" in os.environ else "--run-root"


def remove_stale(folder: Path, decides: Mapping[str, Any], results: Sequence[Path]) -> None:
    """Remove results of other settings or inputs, which would pass for those of this command until it has finished.

    Args:
        folder: of the command's work; of an earlier version, it has no record, and results are kept.
        decides: settings and hashes of inputs that decide the results, as plain data.
        results: what the command writes at its end.
    """
    record = folder / _DECIDES
    before, now = read_json(record), hash_json(decides)
    if before not in (None, now):
        for path in filter(Path.exists, results):
            _log.warning(f"{path}: removed, it was of other settings or data; it is computed again")
            path.unlink()
    write_json(now, record)


def command_of(folder: Path) -> Command | None:
    """Return the command whose work a folder holds; None for runs, studies and other folders."""
    return read_record(folder / _COMMAND, Command)


def refuse_command_folder(folder: Path) -> None:
    """Raise a UserError if a folder is neither a run nor a study, but holds another command's work."""
    command = command_of(folder)
    if command is not None:
        raise UserError(f"{folder} holds {command.kind}, not a run; resume it with: {command}")


def is_opened(folder: Path) -> bool:
    """Return whether a folder holds a run that was opened; a user's project may have a config.yaml and sources/, too."""
    return (folder / layout.CONFIG).exists() and _has_records(folder)


def _has_records(folder: Path) -> bool:
    """Return whether a folder has a file that the opening of a run alone writes."""
    if (folder / layout.OPENED).exists():
        return True
    provenance = read_json(folder / layout.PROVENANCE)  # earlier releases wrote no `opened`
    return isinstance(provenance, dict) and "teacher_sha256" in provenance


def refuse_other_files(folder: Path) -> None:
    """Raise a UserError if a new run or evaluation would overwrite files in its folder, such as those of a project."""
    interrupted = (folder / layout.DRIVER_LOCK).exists() or _has_records(folder)
    written = (layout.SOURCES, layout.MODELS, layout.MODEL_COMMITS, layout.ORIGINS, layout.PROVENANCE)
    for name in (layout.CONFIG, *(() if interrupted else written)):
        if (folder / name).exists():
            raise UserError(
                f"{folder}: its {name} is not that of a run, and is not overwritten: choose another name or "
                f"{run_root_option()}"
            )


def seeds_of(study: Path) -> list[Path]:
    """Return the folders of the seeds of a study that have been opened; none of a study that has not begun."""
    return list(filter(is_opened, sorted(study.glob("seed-*"))))


def study_of(folder: Path) -> Path | None:
    """Return the folder of the study of a seed, of another student of a seed, or of the study itself; None for other runs.

    A study's file may be beside runs that are no seeds.
    """
    folder = folder.resolve()
    for place in (folder, *folder.parents[:2]):
        seed = (*folder.relative_to(place).parts, "")[0]
        if (place / STUDY).exists() and (place == folder or re.fullmatch(r"seed-\d+", seed)):
            return place
    return None


def command_to_compare(study: Path) -> list[str]:
    """Return the words after `montessori` of the command that resumes a study in a folder."""
    return ["compare", str(study / STUDY), "--run-root", str(study.parent)]


def command_to_evaluate(model: str, folder: Path) -> list[str]:
    """Return the words after `montessori` of the command that resumes the evaluation of a model in a folder."""
    config = ["--config", str(folder / layout.CONFIG)]
    return ["evaluate", model, *config, "--run-root", str(folder.parent), "--name", folder.name]


def resume_command(folder: Path, options: str = "") -> str:
    """Return the command that resumes a run, the study it belongs to, or the work of another command."""
    command = command_of(folder)
    if command is not None:
        return str(command)
    study = study_of(folder)
    words = ["resume", str(folder)] if study is None else command_to_compare(study)
    return f"{shlex.join(['montessori', *words])}{options}"


def enter_directory(run: Path) -> None:
    """Change to the directory from which a run was opened, if this user can: paths of its models may be relative."""
    directory = (read_json(run / layout.PROVENANCE) or {}).get("driver", {}).get("directory")
    if directory is not None:
        with suppress(OSError):
            os.chdir(directory)


def refusal_of_changes(folder: Path, changed: Sequence[str], may_change: str = "") -> UserError:
    """Return the error for a run, study or evaluation whose name is used again with other settings.

    Args:
        folder: of the run or the evaluation.
        changed: the settings that differ, one a line.
        may_change: a sentence on the settings that may change.
    """
    command, study = command_of(folder), study_of(folder)
    if command is not None:
        what, name = command.kind.removeprefix("an "), "--name"
    elif study is not None:
        what, name = "study", "name (in its file, or with --set name=NAME)"
    else:
        what, name = "run", "--name"
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        remedy = (
            f"Set another name among the parameters of the flow run for the new configuration, or resume the {what} "
            "unchanged: retry its first flow run, or start one with the same parameters"
        )
    else:
        resume = resume_command(folder)
        remedy = f"Use another {name} for the new configuration, or resume the {what} unchanged: {resume}"
    lines = "\n  ".join(changed)
    sentences = " ".join(filter(None, (may_change, remedy)))
    return UserError(f"{folder}: this {what} was started with another configuration:\n  {lines}\n{sentences}")

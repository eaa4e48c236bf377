"""Options and checks that several commands share."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.status import stages_of
from flows.cli.console import console
from montessori_core.config import (
    Cluster,
    DataSource,
    Experiment,
    Student,
    parse,
    parse_experiment,
    parse_yaml,
    read_cluster,
    read_yaml,
    without_other_revision,
)
from montessori_core.config.yaml import apply_overrides
from montessori_core.errors import ConfigError, UserError
from montessori_core.presets import find_configuration
from tasks.resume import enter_directory
from tasks.run import Run

RunFolder = Annotated[Path, typer.Argument(help="Folder of the run.", metavar="RUN_DIR")]
DrivenFolder = Annotated[
    Path,
    typer.Argument(
        help="Folder of the run, study or evaluation, or of other work, such as FILE.parts.", metavar="RUN_DIR"
    ),
]
Device = Annotated[
    str, typer.Option(help="Where to compute: cpu, cuda, cuda:N, or auto: a GPU if this machine has one, else the CPU.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one field; may be repeated.")
]
ClusterFile = Annotated[
    Path | None, typer.Option(help="Cluster file (YAML) that replaces the configuration's cluster section.")
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(help="Jinja file with the chat template, or 'chatml'; by default the model's own, or the paper's."),
]
ChatTemplateVariables = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="MAPPING",
        help="Variables of the chat template (YAML), e.g. '{enable_thinking: false}'.",
    ),
]
StageName = Annotated[
    str | None, typer.Option("--stage", help="Stage, as named by status; by default the last that started.")
]

TEMPLATE_OPTIONS = {
    "student.chat_template": "--chat-template",
    "student.chat_template_kwargs": "--chat-template-kwargs",
}
"""See `names_options`."""

_PATH = re.compile(
    r"(?:.*\.)?(?:(?P<file>benchmarks\.(?:task_folder|alpaca_eval(?:_difficulty)?|mt_bench(?:_references)?))"
    r"|transfer\.(?:model|chat_template)|(?:generation_)?python)"
)
"""Settings that may change in a run or a study that has begun: a `file`, or a file or a name."""
_FIELD = re.compile(r"(?<![\w./-])(?P<section>[a-z_]+)\.(?P<field>[a-z_]+(?:\.[a-z_]+)*)(?P<value>: \w+)?")


@contextmanager
def names_options(options: Mapping[str, str]) -> Iterator[None]:
    """Name the options of a command in its errors, in place of fields of a configuration that it does not read.

    Args:
        options: see `with_options`.
    """
    try:
        yield
    except UserError as error:
        raise UserError(with_options(str(error), options)) from error


def with_options(message: str, options: Mapping[str, str]) -> str:
    """Return a message with options in place of fields.

    Args:
        message: the message.
        options: the option of each field, such as 'student.max_length'; or of a section: of a data set, that takes a path or
            a mapping, and of `cluster`, that takes a file.
    """

    def option_of(match: re.Match[str]) -> str:
        section, field, value = match["section"], match["field"], match["value"] or ""
        if (option := options.get(f"{section}.{field}")) is not None:
            return option + value
        option, fields = options.get(section), Cluster if section == "cluster" else DataSource
        if option is None or field.partition(".")[0] not in fields.model_fields:  # or the name of a file
            return match[0]
        if field == "path":
            return option + value
        if section == "cluster":
            return f"{field} of {option}{value}"
        return f"{option} '{{path: ..., {field}{value or ': ...'}}}'"

    return _FIELD.sub(option_of, message)


def on_cluster(experiment: Experiment, cluster: Path | None, config: Path, overrides: Sequence[str]) -> Experiment:
    """Replace the cluster section of an experiment by a cluster file.

    Raises:
        UserError: an override sets a part of the section.
    """
    if cluster is None:
        return experiment
    _refuse_cluster_settings(overrides, cluster)
    content = experiment.model_dump(mode="json") | {"cluster": read_cluster(cluster).model_dump(mode="json")}
    return parse_experiment(content, f"{config} with {cluster}")


def enter_started(folder: Path, overrides: Sequence[str], cluster: Path | None) -> tuple[list[str], Path | None]:
    """Go to the directory where the run in a folder was started; return overrides and cluster file as they are meant here."""
    here, cluster = Path.cwd(), cluster and find_configuration(cluster, "clusters").resolve()
    enter_directory(folder)
    return with_paths_from(here, overrides), cluster


def with_paths_from(directory: Path, overrides: Sequence[str]) -> list[str]:
    """Return overrides with absolute paths in place of those relative to a directory, which the command has left."""
    return list(overrides) if directory.samefile(".") else [_with_paths_from(directory, text) for text in overrides]


def _with_paths_from(directory: Path, override: str) -> str:
    key, separator, text = override.partition("=")
    value = parse_yaml(text, f"--set {override}") if separator else None
    absolute = _absolute(directory, key.strip(), value)
    return override if absolute == value else f"{key}={json.dumps(absolute, ensure_ascii=False)}"


def _absolute(directory: Path, key: str, value: Any) -> Any:
    """Return the value of a field with absolute paths, also in sections and lists."""
    if isinstance(value, dict):
        return {name: _absolute(directory, f"{key}.{name}", entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_absolute(directory, key, entry) for entry in value]
    match = _PATH.fullmatch(key) if isinstance(value, str) else None
    path = directory / os.path.expanduser(value) if match else directory
    return str(path) if match and (match["file"] or path.exists()) else value


def read_content(
    config: Path, student: str, overrides: Sequence[str], cluster: Path | None
) -> tuple[dict[str, Any], str]:
    """Read a configuration for a command with a `student` that uses a part of it; also return its name for errors.

    Raises:
        UserError: a file cannot be read or is not YAML, the cluster file is not valid, or an override sets a part of it.
    """
    content = without_other_revision(read_yaml(find_configuration(config)), student)
    apply_overrides(content, tuple(overrides))
    if cluster is None:
        return content, str(config)
    _refuse_cluster_settings(overrides, cluster)
    return content | {"cluster": read_cluster(cluster).model_dump(mode="json")}, f"{config} with {cluster}"


def _refuse_cluster_settings(overrides: Sequence[str], cluster: Path) -> None:
    for override in overrides:
        if re.match(r"(experiment\.)?cluster\b", override):
            raise UserError(f"--set {override}: --cluster {cluster} replaces the section cluster; set it in that file")


def data_source(text: str, option: str, **fields: str) -> DataSource:
    """Read an option that names a data set: a path, or a mapping with the fields of `DataSource` (YAML).

    Args:
        text: value of the option.
        option: its name, for errors.
        fields: values of fields that a mapping may replace.

    Raises:
        ConfigError: the mapping is not valid.
    """
    content = parse_yaml(text, option) if text.lstrip().startswith("{") else {"path": text}
    return parse(DataSource, {**fields, **content}, option)


def student_with_template(model: str, max_length: int, template: Path | None, variables: str | None) -> Student:
    """Return the student that options describe.

    Args:
        model, max_length: see `config.Student`.
        template: value of --chat-template.
        variables: value of --chat-template-kwargs.

    Raises:
        ConfigError: an option is not valid.
    """
    content = {"model": model, "max_length": max_length, **template_settings(template, variables)}
    return parse(Student, content, "--student")


def template_settings(template: Path | None, variables: str | None) -> dict[str, Any]:
    """Return the fields `chat_template` and `chat_template_kwargs` that options set.

    Raises:
        ConfigError: the variables are not a mapping.
    """
    settings: dict[str, Any] = {} if template is None else {"chat_template": str(template)}
    if variables is not None:
        settings["chat_template_kwargs"] = parse_yaml(variables, "--chat-template-kwargs")
        if not isinstance(settings["chat_template_kwargs"], dict):
            raise ConfigError(f"--chat-template-kwargs {variables}: write a mapping, e.g. '{{enable_thinking: false}}'")
    return settings


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        console.print("warning:", style="yellow", end=" ")
        console.print(warning, soft_wrap=True)


def stage_folder(run: Run, name: str | None) -> Path:
    """Return the folder of a run's stage; without a name, of the last that started.

    Raises:
        UserError: no such stage.
    """
    folders = stages_of(run.folder)
    if not folders:
        raise UserError(f"{run.folder}: no stage has started")
    if name is None:
        return folders[-1]
    names = [str(folder.relative_to(run.folder)) for folder in folders]
    if name not in names:
        raise UserError(f"{run.folder}: no stage {name!r}; its stages are {', '.join(names)}")
    return run.folder / name

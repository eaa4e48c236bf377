"""The base class of a configuration's sections, and readable validation errors."""

import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from montessori_core.config.secrets import secrets_in
from montessori_core.errors import ConfigError
from montessori_core.formatting import closest_name

_TIME = re.compile(r"(?:(?P<days>[0-9]+)-)?(?P<parts>[0-9]+(?::[0-9]+){0,2})")


def _read_time(value: Any) -> Any:
    """Return the minutes of a time as sbatch reads it, rounded up; anything else is returned unchanged."""
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    numbers = [int(part) for part in match["parts"].split(":")]
    if match["days"] is None and len(numbers) < 3:
        numbers = [0, *numbers]  # minutes, or minutes:seconds; after days the first number is hours
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return (int(match["days"] or 0) * 24 + hours) * 60 + minutes + -(-seconds // 60)


Count = Annotated[int, Field(ge=1)]
Minutes = Annotated[int, Field(ge=1), BeforeValidator(_read_time)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable."""
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
_shortener = reprlib.Repr()
_shortener.maxlevel, _shortener.maxstring, _shortener.maxother = 2, 100, 100
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"


def _reject_parent_folder(name: str) -> str:
    if ".." in name:
        raise ValueError("a run name must not contain '..'")
    return name


FolderName = Annotated[str, AfterValidator(_reject_parent_folder)]


class Section(BaseModel):
    """A part of the configuration: immutable; an unknown key or a secret is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        for name, value in self:
            if secret := next(secrets_in(name, value), None):
                raise ValueError(
                    f"{secret}: looks like a secret, but a configuration is stored, shown in reports and published; remove "
                    "it, and put it into an environment variable where the driver starts (the key of an API into the one "
                    "that key_variable names, a token of the hub into HF_TOKEN)"
                )
        return self


Configuration = TypeVar("Configuration", bound=Section)


def parse(kind: type[Configuration], content: dict[str, Any], source: str) -> Configuration:
    """Validate plain data; `source` names it in errors.

    Raises:
        ConfigError: it is not valid; the message names every invalid field.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [f"{source} is not valid:"]
        lines += [
            f"  {_field_path(problem['loc'])}: {_describe(problem, kind)}"
            for problem in error.errors()
            if problem["type"] != "default_factory_not_called"  # of a field that depends on an invalid one
        ]
        raise ConfigError("\n".join(lines)) from error


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Return the fields in which two plain configurations differ, one `path: before -> after` line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in sorted(before.keys() | after.keys()):
            lines += differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if before == after else [f"{path}: {before!r} -> {after!r}"]


def refuse_names(given: Mapping[str, Any], remedies: Mapping[str, str], field: str) -> None:
    """Refuse names in a user's mapping that the program or another field sets.

    Args:
        given: the mapping.
        remedies: what to do instead, by refused name.
        field: name of the mapping's field.

    Raises:
        ValueError: a name is refused; the message has its remedy.
    """
    for name, remedy in remedies.items():
        if name in given:
            raise ValueError(f"{field}.{name}: {remedy}")


def _field_path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(whole configuration)"


def _describe(problem: Any, root: type[Section]) -> str:
    kind = problem["type"]
    message: str = problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key; remove it or correct its spelling{_suggest_key(problem['loc'], root)}"
    if kind == "missing":
        return "missing; this field has no default"
    if kind == "string_pattern_mismatch" and problem["ctx"]["pattern"].endswith(RUN_NAME):
        message = "a name has letters, digits, '.', '_' and '-', at most 80, and begins with a letter or digit"
    if isinstance(problem["input"], dict | BaseModel):
        return message
    if any(secrets_in("", {str(part): problem["input"] for part in problem["loc"]})):
        return message
    return f"{message}; got {_shortener.repr(problem['input'])}"


def _suggest_key(location: tuple[int | str, ...], root: type[Section]) -> str:
    sections = [root]
    for part in location[:-1]:
        if len(sections) > 1:  # in a list of sections that are chosen by name: a position, then a name
            sections = [kind for kind in sections if kind.model_fields["name"].default == part] or sections
        elif sections and (field := sections[0].model_fields.get(str(part))):  # else a position or a mapping's key
            sections = _sections_in(field.annotation)
    if len(sections) != 1:
        return ""
    fields = sections[0].model_fields
    return closest_name(str(location[-1]), fields) or f" (known: {', '.join(fields)})"


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections among the types of an annotation, such as those of a list's entries."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _sections_in(part)]

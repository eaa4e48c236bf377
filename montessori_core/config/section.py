"""What all sections of a configuration have in common, and how mistakes in one are told."""

import reprlib
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from montessori_core.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxstring, _shown.maxother = 2, 100, 100
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"


def _no_way_up(name: str) -> str:
    if ".." in name:
        raise ValueError("a run name must not contain '..'")
    return name


FolderName = Annotated[str, AfterValidator(_no_way_up)]


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


Configuration = TypeVar("Configuration", bound=Section)


def parse(kind: type[Configuration], content: dict[str, Any], source: str) -> Configuration:
    """Validate plain data; `source` names it in errors.

    Raises:
        ConfigError: it does not fit; every field at fault is named.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [f"{source} does not fit:"]
        lines += [f"  {_field_path(problem['loc'])}: {_sentence(problem, kind)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Fields in which two plain configurations differ, one `path: before -> after` line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in sorted(before.keys() | after.keys()):
            lines += differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if before == after else [f"{path}: {before!r} -> {after!r}"]


def _field_path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(whole configuration)"


def _sentence(problem: Any, root: type[Section]) -> str:
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key; remove it or correct its spelling{_suggestion(problem['loc'], root)}"
    if kind == "missing":
        return "missing; this field has no default"
    if kind == "string_pattern_mismatch" and problem["ctx"]["pattern"] == RUN_NAME:
        message = "a name has letters, digits, '.', '_' and '-', at most 80, and begins with a letter or digit"
    return (
        f"{message}; got {_shown.repr(problem['input'])}"
        if not isinstance(problem["input"], dict | BaseModel)
        else message
    )


def _suggestion(location: tuple[int | str, ...], root: type[Section]) -> str:
    import difflib

    model: Any = root
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, Section) else None
        if field is None:
            return ""
        model = field.annotation
    if not (isinstance(model, type) and issubclass(model, Section)):
        return ""
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(model.model_fields)})"

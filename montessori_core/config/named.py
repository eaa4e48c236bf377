"""Sections that are chosen by a name: a name alone stands for the section with its default settings."""

from collections.abc import Callable
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

from montessori_core.config.section import Section

OWN = "module:NAME"
"""Tag of a custom entry, which is named by its module."""


def tag_of(names: tuple[str, ...]) -> Callable[[Any], str]:
    """Return the function that finds the tag of a section among shipped `names`."""

    def tag(section: Any) -> str:
        name = section["name"] if isinstance(section, dict) else section.name
        return str(name) if name in names else OWN

    return tag


def read_named(kind: str, names: tuple[str, ...]) -> Callable[[Any], Any]:
    """Return the function that reads a name as a section with default settings and refuses an unknown name.

    Args:
        kind: what is named, for errors: 'filter'.
        names: those that are shipped.
    """

    def read(value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, dict):
            name = value.get("name")
            if name not in names and not (isinstance(name, str) and ":" in name):
                available = f"available: {', '.join(names)}, or your own as module:NAME"
                raise ValueError(
                    f"no {kind} {name!r}; {available}" if "name" in value else f"name is missing; {available}"
                )
        elif not isinstance(value, Section):
            raise ValueError(f"a {kind} is a name, or a mapping with a name and settings")
        return value

    return read


class NamesAlone:
    """Allow a name alone in the JSON schema, and write `anyOf`, which Prefect's form can show, in place of `oneOf`."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [*handler(schema)["oneOf"], {"type": "string", "title": "Name"}]}

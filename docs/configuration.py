"""Write docs/configuration.md from the models that validate a configuration: python docs/configuration.py."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from montessori_core.config import Experiment, Section, Study

PAGE = Path(__file__).with_suffix(".md")
_HEAD = """# Configuration

Made from `montessori_core/config/` by `python docs/configuration.py`; do not edit this page.

A configuration is YAML, checked as a whole before anything runs: an unknown key, a wrong type or a value out of range is
refused with its path. `--set PATH=VALUE` changes one field (values are YAML, too), and
`--set 'cluster.resources.*.FIELD=VALUE'` that of all stages but judging. A run writes its resolved `config.yaml` with every
default spelled out. `[]` in a path stands for each entry of a list, `[NAME]` for an entry of this name; `null` means not set.

## Presets

A command takes the path of a configuration or the name of a shipped preset; a file of that name wins.

| preset | for | what it is |
|---|---|---|
| `quickstart` | `montessori run` | an iteration on a laptop: a small teacher learns what helps a smaller student to code |
| `paper-1b`, `paper-8b` | `montessori run` | the paper's settings, for a cluster of H100 nodes |
| `evaluation` | `montessori evaluate` | the paper's tasks |
| `quickstart` | `montessori compare` | three methods and seeds, with the quickstart's experiment |
| `laptop` | `montessori compare` | seven methods and controls, five seeds; hours on a laptop |
| `slurm` | `--cluster` | a cluster file to start from |
| `workstation` | `--cluster` | this machine, with a GPU for each job |

To change more than a few fields, copy a preset from `montessori_core/presets/`. Where the package is installed, this prints
the folder: `python -c "from montessori_core.presets import PRESETS; print(PRESETS)"`.

## Fields

Models and data sets are described in [data-and-models.md](data-and-models.md), prompts and filters in
[synthesis.md](synthesis.md), the `cluster` section in [cluster.md](cluster.md), studies
in [comparing.md](comparing.md). Most defaults are the paper's
numbers; [method.md](method.md) lists the others."""
_NUMBERS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Row:
    """One field.

    Attributes:
        path: dotted, `[]` for each entry of a list.
        kind: what it may be.
        default: in YAML.
        description: what it means.
        section: what the section is that it holds, if it holds one.
        same_as: path of an earlier section with the same fields and defaults.
    """

    path: str
    kind: str
    default: str
    description: str
    section: str | None = None
    same_as: str = ""


def rows_of(kind: type[Section]) -> list[Row]:
    """Return every field of a configuration, those of its sections included, in the order in which they are declared."""
    schema = kind.model_json_schema()
    return list(_rows(schema, schema["$defs"], "", {}))


def _rows(section: dict[str, Any], known: dict[str, Any], prefix: str, given: dict[str, Any]) -> Iterator[Row]:
    """Yield the fields of a section; `given` are values that the section's own default gives them."""
    for name, field in section["properties"].items():
        if "const" in field:
            continue  # the name by which an entry of a list is chosen
        path = f"{prefix}{name}"
        inner, many = _section_in(field, known)
        entries = _named_entries(field, known)
        default = given.get(name, field.get("default", ...))
        own = default if isinstance(default, dict) else {}
        if default is not ...:
            shown = f"`{_yaml(default)}`"
        else:  # a default that is another field's has its description say so
            shown = "must be given" if name in section.get("required", ()) else ""
        if inner is None or many or entries:
            yield Row(path, _kind(field), shown, field["description"])
        else:
            meaning = field.get("description", inner["description"])  # left out by pydantic where they are the same
            yield Row(path, _kind(field), "" if own else shown, meaning, inner["description"])
        for entry in entries:
            label = entry["properties"]["name"].get("default", "module:NAME")
            yield Row(f"{path}[{label}]", "section", "", entry["description"], entry["description"])
            yield from _rows(entry, known, f"{path}[{label}].", {})
        if inner is not None and not entries and inner["title"] != Experiment.__name__:
            yield from _rows(inner, known, f"{path}[]." if many else f"{path}.", own)


def _section_in(field: dict[str, Any], known: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """Return the section that a field holds, None if it holds none, and whether it holds a list of them."""
    if "$ref" in field:
        return known[field["$ref"].rpartition("/")[2]], False
    for option in field.get("anyOf", []):
        if "$ref" in option:
            return _section_in(option, known)
    if "$ref" in field.get("items", {}):
        return _section_in(field["items"], known)[0], True
    return None, False


def _named_entries(field: dict[str, Any], known: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sections among which a name chooses, that of a field or of a list's entry."""
    options = [option for option in field.get("items", field).get("anyOf", []) if "$ref" in option]
    # Of a single one, the other option is null: a section that may be absent.
    return [known[option["$ref"].rpartition("/")[2]] for option in options] if len(options) > 1 else []


def _kind(field: dict[str, Any]) -> str:
    if len([option for option in field.get("anyOf", []) if "$ref" in option]) > 1:
        return "name, or section with a name"
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if "$ref" in field:
        return "section"
    if "enum" in field:
        return ", ".join(f"`{_yaml(value)}`" for value in field["enum"])
    if field["type"] == "array":
        named = any("$ref" in option for option in field["items"].get("anyOf", []))
        return "list of: name, or section with a name" if named else f"list of: {_kind(field['items'])}"
    if field["type"] == "object":
        return "mapping"
    if field["type"] == "null":
        return "`null`"
    bounds = [f"{sign} {field[bound]}" for bound, sign in _BOUNDS.items() if bound in field]
    bounds += [f"`{field['pattern']}`"] if "pattern" in field else []
    return ", ".join([_NUMBERS[field["type"]], *bounds])


def _yaml(value: Any) -> str:
    style = '"' if value == "\n" else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=1000, sort_keys=False)
    return str(text).removesuffix("...\n").strip()


def page() -> str:
    """Return the page's text."""
    rows = _without_repeats(rows_of(Experiment))
    plain = [row for row in rows if "." not in row.path and row.section is None]
    parts = [_HEAD, "## Experiment", _table(plain)]
    for top in rows:
        if "." in top.path or top.section is None:
            continue
        absent = " Not set by default." if top.default == "`null`" else ""
        parts.append(f"### `{top.path}`")
        if top.same_as:
            parts.append(f"{top.description}{absent} The same fields as `{top.same_as}`.")
            continue
        repeats = top.section.startswith(top.description.rstrip("."))
        parts.append(f"{top.section}{absent}" if repeats else f"{top.description}{absent} {top.section}")
        parts.append(_table([row for row in rows if row.path.startswith(f"{top.path}.")]))
    parts += ["## Study", "`montessori compare` reads a study: methods on equal terms, over several seeds."]
    parts.append(_table(_without_repeats(rows_of(Study))))
    return "\n\n".join(parts) + "\n"


def _without_repeats(rows: list[Row]) -> list[Row]:
    """Return the rows without fields of a section that equals an earlier one; the section's own row names that."""
    kept: list[Row] = []
    seen: dict[tuple[Row, ...], str] = {}
    repeated = ""
    for row in rows:
        if repeated and row.path.startswith(f"{repeated}."):
            continue
        if row.section is not None:
            inside = (one for one in rows if one.path.startswith(f"{row.path}."))
            fields = tuple(replace(one, path=one.path.removeprefix(row.path)) for one in inside)
            earlier = seen.setdefault(fields, row.path) if fields else row.path
            if earlier != row.path:
                row, repeated = replace(row, same_as=earlier), row.path
        kept.append(row)
    return kept


def _table(rows: list[Row]) -> str:
    lines = ["| field | may be | default | what it is |", "|---|---|---|---|"]
    for row in rows:
        kind = f"{row.kind}, as `{row.same_as}`" if row.same_as else row.kind
        cells = (f"`{row.path}`", kind, row.default, row.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

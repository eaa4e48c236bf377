"""Read and write configurations as YAML 1.2."""

import re
from pathlib import Path
from typing import Any

import yaml

from montessori_core.config.resources import StageResources
from montessori_core.config.section import Section
from montessori_core.errors import ConfigError
from montessori_core.files import commit

# Plain scalars of YAML 1.2's core schema (section 10.3.2). PyYAML reads YAML 1.1, where 12:00:00 is 43200 and no is false.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),  # of YAML 1.1: many configurations use it
}


def apply_overrides(content: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Set `section.key=value` in plain data.

    `cluster.resources.*` stands for every stage that loads a model: all but judging.

    Raises:
        ConfigError: an override cannot be applied.
    """
    for override in overrides:
        _apply_override(content, override)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
        raise ConfigError(
            f"{path}: cannot be read ({getattr(error, 'strerror', error)}); give the path of a configuration file, in UTF-8"
        ) from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, see docs/configuration.md")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Read plain data from YAML; `source` names it in errors.

    Raises:
        ConfigError: it is not YAML, or a mapping has a duplicate key; the message says where.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply for a configuration") from error


class _Loader(yaml.SafeLoader):
    """Load plain data of YAML 1.2. A duplicate key is an error: PyYAML would silently drop the first."""

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} occurs twice", problem_mark=key.start_mark)
                keys.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int | str):
                str(value).encode()  # fails for thousands of digits and lone surrogates, which cannot be written again
            return value
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # e.g. the date 2026-02-30
            raise yaml.MarkedYAMLError(
                problem=f"not a valid value ({error}); put text in quotes", problem_mark=node.start_mark
            ) from error


def write_yaml(section: Section, path: Path) -> None:
    """Write any part of a configuration, including all defaults."""
    with commit(path) as temporary:
        temporary.write_text(dump_yaml(section.model_dump(mode="json")), encoding="utf-8")


def dump_yaml(content: Any) -> str:
    """Return plain data as YAML, in its order."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


class _Dumper(yaml.SafeDumper):
    """Quote strings that hold Unicode's other line breaks, so that they are read back unchanged."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Dumper.add_representer(str, _Dumper.represent_str)
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
    # In addition to those of YAML 1.1: a text that either version reads as something else is quoted.
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _apply_override(content: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value, e.g. --set warmup.learning_rate=1e-5")
    try:
        value = parse_yaml(text, f"--set {override}")
    except ConfigError as error:
        raise ConfigError(f"{error}; if it is a text, put it in quotes: --set '{dotted}=\"...\"'") from error
    for path in _paths(keys):
        node = content
        for key in path[:-1]:
            child = node.get(key)
            if not (child is None or isinstance(child, dict)):
                raise ConfigError(f"--set {override}: {key} is a value, not a section")
            # Copy: sections that share a YAML anchor are the same object.
            node[key] = dict(child or {})
            node = node[key]
        node[path[-1]] = value


def _paths(keys: list[str]) -> list[list[str]]:
    """Return the paths that keys stand for."""
    if "*" not in keys or keys[: keys.index("*")][-2:] != ["cluster", "resources"]:
        return [keys]
    place = keys.index("*")
    return [[*keys[:place], stage, *keys[place + 1 :]] for stage in StageResources.model_fields if stage != "judging"]

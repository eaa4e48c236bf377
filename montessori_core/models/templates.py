"""A model with another chat template: a folder of links to its files. Works without torch, for the driver."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from montessori_core.config import Student, Teacher
from montessori_core.errors import UserError
from montessori_core.files import commit, hash_json, read_json, write_json
from montessori_core.models.fetch import fingerprint
from montessori_core.models.fingerprints import FINGERPRINT

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser

TEMPLATE = "chat_template.jinja"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without a system turn of its own; for a tokenizer that adds a begin token, it follows that token."""
LLAMA3_STYLE_TEMPLATE = (
    # Paper, Figure 7: for models without a chat template.
    "{% if messages[0]['role'] == 'system' %}{% set offset = 1 %}{% else %}{% set offset = 0 %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == offset) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_NAMED = {"chatml": CHATML}


class _Generation(Extension):
    """The tag `generation` of transformers, which marks the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares an instance variable

    def parse(self, parser: "Parser") -> "list[Node]":
        """Parse the tag's block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_template(folder: Path, setting: str) -> None:
    """Check the syntax of the chat template in a model's folder; a folder without one passes.

    Args:
        folder: the model.
        setting: its section of the configuration, for errors.

    Raises:
        UserError: Jinja cannot parse it.
    """
    file = folder / TEMPLATE
    _check_syntax(_own_template(folder), str(file if file.exists() else folder / "tokenizer_config.json"), setting)


def _check_syntax(template: str, name: str, setting: str) -> None:
    # The environment of transformers.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        environment.compile(template)  # finds unknown filters too
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template in {name} has a syntax error in line {error.lineno}: {error.message}; correct it, or set "
            f"another one with {setting}.chat_template"
        ) from error


def configured_template(folder: Path, section: Teacher | Student, setting: str) -> str | None:
    """Return the chat template that a section of the configuration sets for its model, with its variables.

    The variables become assignments at the beginning of the template, so that every later use of the model, and every model
    trained from it, has them.

    Args:
        folder: the model.
        section: the section.
        setting: its name in the configuration.

    Returns:
        The template; None if the section sets neither a template nor variables, so that the model's own is used.

    Raises:
        UserError: the template cannot be read, has a syntax error, or does not have one of the variables.
    """
    variables = section.chat_template_kwargs
    if section.chat_template is None and not variables:
        check_template(folder, setting)
        return None
    template = _own_template(folder)
    if section.chat_template in _NAMED:
        template = ("{{ bos_token }}" if _adds_begin_token(folder) else "") + _NAMED[section.chat_template]
    elif section.chat_template is not None:
        template = _read_template(section.chat_template, setting)
    if unknown := [name for name in variables if not name.isidentifier() or name not in template]:
        raise UserError(f"{setting}.chat_template_kwargs: the chat template has no variable {unknown[0]!r}")
    _check_syntax(template, section.chat_template or str(folder), setting)
    return "".join(f"{{% set {name} = {json.dumps(value)} %}}" for name, value in variables.items()) + template


def _adds_begin_token(folder: Path) -> bool:
    """Return whether a model's tokenizer begins a text with its begin token.

    transformers does as tokenizer.json says, whatever add_bos_token is.
    """
    begin = (read_json(folder / "tokenizer_config.json") or {}).get("bos_token")
    name = begin["content"] if isinstance(begin, dict) else begin
    processor = (read_json(folder / "tokenizer.json") or {}).get("post_processor") or {}
    firsts = [step["single"][0] for step in processor.get("processors", [processor]) if step.get("single")]
    return name in [first["SpecialToken"]["id"] for first in firsts if "SpecialToken" in first]


def _read_template(file: str, setting: str) -> str:
    path = Path(file).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{setting}.chat_template: {path} cannot be read ({error}); give a Jinja file, or {' or '.join(_NAMED)}"
        ) from error


def _own_template(folder: Path) -> str:
    """Return the chat template in a model's folder; an empty text if there is none."""
    if (folder / TEMPLATE).exists():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    template = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):  # named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return str(template or "")


def with_template(folder: Path, template: str, target: Path) -> Path:
    """Write a folder with links to a model's files and another chat template; return it.

    Args:
        folder: the model.
        template: its chat template.
        target: the folder to write; one that has the same model and template, and no broken link, is kept.
    """
    recorded = {"sha256": hash_json([fingerprint(folder), template])}
    if read_json(target / FINGERPRINT) == recorded and all(file.exists() for file in target.iterdir()):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with commit(target, durable=False) as temporary:
        temporary.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.name not in (TEMPLATE, FINGERPRINT):
                (temporary / file.name).symlink_to(file.resolve())
        (temporary / TEMPLATE).write_text(template, encoding="utf-8")
        write_json(recorded, temporary / FINGERPRINT, durable=False)
    return target

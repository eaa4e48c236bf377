"""The header of a card: README.md of a model or a data set, as the Hugging Face hub has it."""

import re
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
LONGEST_CARD = 1 << 20
"""Bytes of a card that is read."""
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")


def read_header(card: Path) -> dict[str, Any]:
    """Return the YAML header of a card; an empty mapping if there is none."""
    if not card.is_file() or card.stat().st_size > LONGEST_CARD:
        return {}
    return parse_header(card.read_text(encoding="utf-8", errors="replace"))


def parse_header(card: str) -> dict[str, Any]:
    """Return the YAML header of the text of a card; an empty mapping if there is none."""
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        content = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_licence(declared: object) -> bool:
    """Return whether a value of a header can be the identifier of a licence."""
    return isinstance(declared, str) and _IDENTIFIER.fullmatch(declared) is not None

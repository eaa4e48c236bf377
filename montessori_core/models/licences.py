"""Licences of models, where they are known: of embedded models, and in the card of a model's folder."""

import re
from pathlib import Path
from typing import Any

import yaml

from montessori_core.errors import UserError
from montessori_core.models.adapters import adapted_model, is_adapter
from montessori_core.models.embedded import EMBEDDED, PrunedModel
from montessori_core.models.fetch import cached_model, local_path

CARD = "README.md"
_PERMISSIVE, _TERMS = "apache-2.0", "gemma"  # of the embedded models, by the hub's identifiers
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
LONGEST_CARD = 1 << 20
"""Bytes of a card that is read."""


def licence_of(model: str, revision: str | None = None) -> str | None:
    """Return the identifier of a configured model's licence; None if it is not known.

    An adapter has its base model's. Nothing is downloaded: of a model on the hub, the card in the cache is read.

    Args:
        model: embedded model, folder or id on the hub.
        revision: of an id on the hub.
    """
    if model in EMBEDDED:
        embedded = EMBEDDED[model]
        if isinstance(embedded, PrunedModel):
            return licence_of(embedded.source)
        return _TERMS if embedded.terms else _PERMISSIVE
    try:
        path = Path(local_path(model))
        folder = path if path.is_dir() else cached_model(model, revision)
        if folder is None:
            return None
        declared = _header(folder / CARD).get("license")
        if declared is None and is_adapter(folder):
            return licence_of(adapted_model(folder))
    except (UserError, OSError):
        return None
    return declared if isinstance(declared, str) and _IDENTIFIER.fullmatch(declared) else None


def _header(card: Path) -> dict[str, Any]:
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

"""Where a data set is from: its licence and its commit on the hub, where they are stated."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_core.data.cards import CARD, is_licence, read_header
from montessori_core.data.files import kind_of
from montessori_core.data.shards import is_url
from montessori_core.files import read_json, write_json

_BUILT_IN = "apache-2.0"


@dataclass(frozen=True)
class Origin:
    """The origin of a data set.

    Attributes:
        licence: identifiers of its licences, e.g. 'mit' or 'mit, cc-by-4.0'; None if none is stated.
        commit: of a data set on the hub, the commit that was read; None of others.
    """

    licence: str | None
    commit: str | None = None

    @property
    def licence_text(self) -> str:
        """The licence, for people."""
        return self.licence or "not stated"


def origin_of(path: str, commit: str | None = None) -> Origin:
    """Return the origin of a data set, or of documents, that were read.

    The licence is that in the card of a local folder or of the folder of a local file; of a data set on the hub, that in its
    card, which was downloaded with it. Nothing is downloaded here.

    Args:
        path: as in a configuration.
        commit: of a data set on the hub.
    """
    if commit is not None:
        return Origin(_licence_in(_hub_card(path, commit)), commit)
    local = Path(os.path.expanduser(path))
    if local.parts[:1] == ("builtin",) and not kind_of(path):
        return Origin(_BUILT_IN)
    if is_url(path):
        return Origin(None)
    return Origin(_licence_in((local if local.is_dir() else local.parent) / CARD))


def write_origins(origins: Mapping[str, Origin], path: Path) -> None:
    """Write the origins of data sets, by name; those of others in the file are kept."""
    if origins:
        write_json({**(read_json(path) or {}), **{name: vars(origin) for name, origin in origins.items()}}, path)


def read_origins(path: Path) -> dict[str, Origin]:
    """Read the file of `write_origins`; empty if there is none."""
    return {name: Origin(**content) for name, content in (read_json(path) or {}).items()}


def _hub_card(data_set: str, commit: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(data_set, CARD, repo_type="dataset", revision=commit)
    return Path(card) if isinstance(card, str) else None


def _licence_in(card: Path | None) -> str | None:
    """Return the licences that a card declares; the hub allows one or a list."""
    try:
        declared = read_header(card).get("license") if card is not None else None
    except (OSError, ValueError):
        return None
    licences: list[Any] = declared if isinstance(declared, list) else [declared]
    return ", ".join(licences) if licences and all(map(is_licence, licences)) else None

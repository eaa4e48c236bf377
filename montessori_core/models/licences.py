"""Licences of models, where they are known: of embedded models, and in the card of a model's folder."""

from pathlib import Path

from montessori_core.data.cards import CARD, is_licence, read_header
from montessori_core.errors import UserError
from montessori_core.models.adapters import adapted_model, is_adapter
from montessori_core.models.embedded import EMBEDDED, PrunedModel
from montessori_core.models.fetch import cached_model, local_path

_PERMISSIVE, _TERMS = "apache-2.0", "gemma"  # of the embedded models, by the hub's identifiers


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
        declared = read_header(folder / CARD).get("license")
        if declared is None and is_adapter(folder):
            return licence_of(adapted_model(folder))
    except (UserError, OSError):
        return None
    return declared if is_licence(declared) else None

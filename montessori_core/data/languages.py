"""The language of a text, by py3langid's model of 139 languages."""

from functools import cache
from typing import Any

_SURE = 0.5  # lowest probability of a language that counts


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def known_languages() -> frozenset[str]:
    """Return the ISO 639 codes of the languages that the model knows."""
    return frozenset(_identifier().labels)


def language_of(text: str) -> str | None:
    """Return the language of a text as an ISO 639 code, such as 'en'; None if none is more likely than all others together.

    Texts of few words, formulas and code often have none.
    """
    language, probability = _identifier().classify(text)
    return str(language) if probability >= _SURE else None

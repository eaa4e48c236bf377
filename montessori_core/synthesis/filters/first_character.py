"""The filter `first_character`: an instruction starts with a letter or a digit."""

import unicodedata

from montessori_core.config.filters import FirstCharacterFilter
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

NO_LETTER = "starts with neither letter nor digit"
_OPENING = ("Ps", "Pi", "Pf")  # brackets and quotation marks; German and Swedish open with » and ”


def _open(settings: FirstCharacterFilter, context: Context) -> Reject:
    ascii = context.english if settings.ascii is None else settings.ascii

    def reject(candidate: Candidate) -> str | None:
        text = candidate.instruction
        if ascii:
            return None if text[:1].isascii() and text[:1].isalnum() else NO_LETTER
        first = next((character for character in text if not _is_opening(character)), "")
        return None if first.isalnum() else NO_LETTER

    return reject


def _is_opening(character: str) -> bool:
    return character in "\"'¿¡" or unicodedata.category(character) in _OPENING


FIRST_CHARACTER = Filter(
    "first_character", "Instructions that start with a letter or a digit.", _open, FirstCharacterFilter
)

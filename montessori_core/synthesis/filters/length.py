"""The filter `length`: characters and words of an instruction."""

from montessori_core.config.filters import LengthFilter
from montessori_core.data.words import words
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

TOO_SHORT = "too short"
TOO_LONG = "too long"


def _open(settings: LengthFilter, context: Context) -> Reject:
    counts_words = settings.min_words is not None or settings.max_words is not None

    def reject(candidate: Candidate) -> str | None:
        characters = len(candidate.instruction)
        number = len(words(candidate.instruction)) if counts_words else 0
        if characters < settings.min_characters or number < (settings.min_words or 0):
            return TOO_SHORT
        if characters > (settings.max_characters or characters) or number > (settings.max_words or number):
            return TOO_LONG
        return None

    return reject


LENGTH = Filter("length", "Instructions of a length in characters or words.", _open, LengthFilter)

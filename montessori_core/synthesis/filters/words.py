"""The filter `words`: a list of words and phrases, by default that of the authors' code."""

from montessori_core.config.filters import WordsFilter
from montessori_core.data.words import words
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

LISTED_WORD = "has a listed word"


def _open(settings: WordsFilter, context: Context) -> Reject:
    phrases = [_between_blanks(phrase) for phrase in settings.words]

    def reject(candidate: Candidate) -> str | None:
        text = _between_blanks(candidate.instruction)
        return LISTED_WORD if any(phrase in text for phrase in phrases) else None

    return reject


def _between_blanks(text: str) -> str:
    return f" {' '.join(words(text))} "


WORDS = Filter("words", "Instructions without certain words.", _open, WordsFilter)

"""The filter `language`: an instruction is in a listed language, or too short to classify."""

from montessori_core.config import LanguageFilter
from montessori_core.data.languages import known_languages, language_of
from montessori_core.errors import ConfigError
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

OTHER_LANGUAGE = "in another language"


def _open(settings: LanguageFilter, context: Context) -> Reject:
    for language in settings.languages:
        if language not in known_languages():
            names = ", ".join(sorted(known_languages()))
            raise ConfigError(f"synthesis.filters: language: languages: no language {language!r}; known are {names}")

    def reject(candidate: Candidate) -> str | None:
        language = language_of(candidate.instruction)
        return OTHER_LANGUAGE if language not in (None, *settings.languages) else None

    return reject


LANGUAGE = Filter("language", "Instructions in certain languages, such as en or de.", _open, LanguageFilter)

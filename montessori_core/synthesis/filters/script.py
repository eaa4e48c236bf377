"""The filter `script`: the letters of an instruction are of certain scripts, such as Latin or Han."""

import unicodedata
from functools import cache

from montessori_core.config.filters import ScriptFilter
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject

OTHER_SCRIPT = "in another script"
# The first word of a letter's name in Unicode, where it is not the script's.
_SCRIPTS = {"cjk": "han", "ideographic": "han", "hiragana": "kana", "katakana": "kana"}


@cache
def script_of(letter: str) -> str:
    """Return the script of a letter, in lower case; '' if it has no name."""
    first, *others = unicodedata.name(letter, "").lower().replace("-", " ").split() or [""]
    if first in ("fullwidth", "halfwidth") and others:
        return _SCRIPTS.get(others[0], others[0])
    return _SCRIPTS.get(first, first)


def _open(settings: ScriptFilter, context: Context) -> Reject:
    def reject(candidate: Candidate) -> str | None:
        scripts = [script_of(letter) for letter in candidate.instruction if letter.isalpha()]
        share = sum(script in settings.scripts for script in scripts) / max(len(scripts), 1)
        return OTHER_SCRIPT if scripts and share < settings.min_share else None

    return reject


SCRIPT = Filter("script", "Instructions in certain scripts, such as han or latin.", _open, ScriptFilter)

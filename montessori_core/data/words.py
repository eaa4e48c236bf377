"""Words of a text in any script, for similarity and overlap.

For ASCII text they are those of `rouge_score.tokenize`: lower case, runs of letters and digits. In other scripts letters
keep their marks (accents, vowel signs); scripts without spaces between words (Chinese, Japanese, Thai, ...) give a word a
character.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_UNSPACED = (  # Unicode blocks; Korean has spaces
    *(range(0x0E00, 0x0F00), range(0x1000, 0x10A0), range(0x1780, 0x1800), range(0x19E0, 0x1A00)),  # Thai to Khmer
    *(range(0x2E80, 0x2FE0), range(0x3005, 0x3008), range(0x3021, 0x302A)),  # radicals, iteration marks
    *(range(0x3040, 0x3130), range(0x31A0, 0x3200), range(0x3400, 0x4DC0), range(0x4E00, 0xA4D0)),  # kana, Han, Yi
    *(range(0xA9E0, 0xAA00), range(0xAA60, 0xAAE0), range(0xF900, 0xFB00), range(0xFF66, 0xFFA0)),
    range(0x1AFF0, 0x1B170),
    range(0x20000, 0x32400),
)
_MARKED = range(0x300, 0x1F000)  # code points with marks, except variation selectors


def _spans(codes: Iterable[int]) -> Iterator[str]:
    """Yield ranges of a regular expression's class for code points in order."""
    start = last = -1
    for code in chain(codes, [-1]):
        if start >= 0 and code != last + 1:
            yield f"\\U{start:08x}-\\U{last:08x}"
            start = -1
        if start < 0:
            start = code
        last = code


@cache
def _word() -> re.Pattern[str]:
    """Return the pattern of a word in any script; it takes 30 ms, which few programs need."""
    marks = "".join(_spans(code for code in _MARKED if unicodedata.category(chr(code)).startswith("M")))
    wide = "".join(f"\\U{block.start:08x}-\\U{block.stop - 1:08x}" for block in _UNSPACED)
    wide_letter, letter = rf"(?=[{wide}])[^\W_{marks}]", rf"(?![{wide}])[^\W_{marks}]"
    return re.compile(rf"{wide_letter}[{marks}]*|{letter}(?:{letter}|[{marks}])*")


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _word().findall(unicodedata.normalize("NFC", text).lower())

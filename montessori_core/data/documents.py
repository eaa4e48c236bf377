"""Read documents (text, Markdown, PDF) and cut them into passages."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from montessori_core.data.sources import Task
from montessori_core.data.words import words
from montessori_core.errors import DataError, UserError

KINDS = (".txt", ".md", ".markdown", ".pdf")
_FEWEST_WORDS = 8  # of a passage; shorter ends of a document are left out
_MOST_BYTES = 64 * 2**20
_MOST_FILES = 100_000
_PARAGRAPHS = re.compile(r"\n[ \t]*\n\s*")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


def read_passages(path: str, most_words: int) -> list[Task]:
    """Read documents as passages: tasks whose instruction is the passage, with the id `file#number`.

    Args:
        path: a document, a folder (with its subfolders), or a glob.
        most_words: maximum number of words in a passage.

    Raises:
        DataError: a document cannot be read, or there is none with text.
        UserError: a PDF needs a package that is not installed.
    """
    files = _find(path)
    passages = [
        Task(f"{name}#{number}", passage)
        for name, file in files.items()
        for number, passage in enumerate(split_passages(_read(file), most_words), 1)
    ]
    if not passages:
        raise DataError(
            f"synthesis.strategy.documents: {path}: no passage of at least {_FEWEST_WORDS} words in {len(files)} documents; "
            "give documents with text (a scanned PDF has none)"
        )
    return passages


def _find(path: str) -> dict[str, Path]:
    """Return documents by name, sorted.

    Raises:
        DataError: there are none.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        files = {file.relative_to(given).as_posix(): file for file in given.rglob("*")}
        files = {name: file for name, file in files.items() if "/." not in f"/{name}"}  # without hidden ones
    elif given.exists() or not glob.has_magic(path):
        files = {given.name: given}
    else:
        files = {name: Path(name) for name in glob.glob(str(given), recursive=True)}
    files = {name: file for name, file in sorted(files.items()) if file.suffix.lower() in KINDS and file.is_file()}
    if not files:
        raise DataError(
            f"synthesis.strategy.documents: {path}: no document there; give a file, folder or glob of {', '.join(KINDS)}"
        )
    if len(files) > _MOST_FILES:
        raise DataError(f"synthesis.strategy.documents: {path}: more than {_MOST_FILES:,} documents; give fewer")
    return files


def _read(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise DataError(f"{file}: {size / 2**20:,.0f} MiB, more than {_MOST_BYTES // 2**20}; split the document")
        if file.suffix.lower() == ".pdf":
            return _read_pdf(file)
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); convert or remove the file") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the file") from error


def _read_pdf(file: Path) -> str:
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise UserError(
            f"{file}: PDF needs the package pypdf on the driver; install it: pip install 'montessori[documents]'"
        ) from error
    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(file).pages)
    except Exception as error:  # pypdf raises many kinds on damaged and encrypted files
        raise DataError(
            f"{file}: not a readable PDF ({type(error).__name__}: {error}); decrypt, repair or remove it"
        ) from error


def split_passages(text: str, most_words: int) -> list[str]:
    """Cut a text into passages: whole paragraphs as far as they fit, else sentences, else words. Passages do not overlap."""
    passages: list[str] = []
    current: list[str] = []
    length = 0
    # NUL bytes and lone surrogates, which PDFs can have, cannot be stored.
    for part in _parts(text.replace("\x00", "").encode(errors="ignore").decode(), most_words):
        count = len(words(part))
        if current and length + count > most_words:
            passages.append("\n\n".join(current))
            current, length = [], 0
        current.append(part)
        length += count
    passages += ["\n\n".join(current)] if current else []
    return [passage for passage in passages if len(words(passage)) >= _FEWEST_WORDS]


def _parts(text: str, most_words: int) -> Iterator[str]:
    """Yield paragraphs; of those that are too long, sentences or words."""
    for paragraph in _PARAGRAPHS.split(text.strip()):
        if len(words(paragraph)) <= most_words:
            if paragraph.strip():
                yield paragraph.strip()
            continue
        part = ""
        for sentence in _SENTENCES.split(paragraph):
            joined = f"{part} {sentence}".strip()
            if part and len(words(joined)) > most_words:
                yield part
                joined = sentence
            while (end := _end_of_words(joined, most_words)) < len(joined):
                yield joined[:end].strip()
                joined = joined[end:].strip()
            part = joined
        if part.strip():
            yield part.strip()


def _end_of_words(text: str, count: int) -> int:
    """Return a position before which a text has at most `count` words, at a space if there is one; else its end.

    The search begins with the first characters, as many as words: a text may have megabytes.
    """
    low, high = 0, count
    while len(words(text[:high])) <= count:
        if high >= len(text):
            return len(text)
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(words(text[:middle])) <= count else (low, middle)
    space = text.rfind(" ", 0, low)
    return space if space > 0 else low

"""A cache of the answers of models behind an API, with what they cost."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from montessori_core.errors import UserError
from montessori_core.judging.responses import Answer


class AnswerCache:
    """Answers and spending, in one SQLite file that several processes may use.

    All methods raise a UserError if the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path.parent}: the cache of answers cannot be created ({error.strerror}); set MONTESSORI_CACHE to a folder "
                "that you may write to"
            ) from error
        self._path = path
        with self._open() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            connection.execute("CREATE TABLE IF NOT EXISTS spending (account TEXT, dollars REAL)")

    def get(self, key: str) -> Answer | None:
        """Return the cached answer, or None."""
        with self._open() as connection:
            row = connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return Answer(**json.loads(row[0])) if row else None

    def put(self, key: str, answer: Answer, account: str, dollars: float) -> None:
        """Store an answer and its price."""
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(asdict(answer))))
            connection.execute("INSERT INTO spending VALUES (?, ?)", (account, dollars))

    def spent(self, account: str) -> float:
        """Return the dollars spent on an account."""
        with self._open() as connection:
            row = connection.execute("SELECT SUM(dollars) FROM spending WHERE account = ?", (account,)).fetchone()
        return float(row[0] or 0.0)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=60.0)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise UserError(
                f"{self._path}: the cache of answers cannot be used ({error}); check whether its disk is full or read-only, "
                "and remove the file if it is damaged"
            ) from error

"""The cache of answers: an append-only SQLite file, one row per canonical question."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sae.explain.llm.chat import Response

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, answer TEXT NOT NULL, time REAL NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS never_changed BEFORE UPDATE ON answers
    BEGIN SELECT RAISE(ABORT, 'answers are never changed'); END;
CREATE TRIGGER IF NOT EXISTS never_deleted BEFORE DELETE ON answers
    BEGIN SELECT RAISE(ABORT, 'answers are never deleted'); END;
"""


class AnswerCache:
    """Answers by the key of their question; the first answer stays.

    Every answer is on the disk when `put` returns, so a killed run asks nothing twice but what was
    under way. Several processes may use one file.
    """

    def __init__(self, path: Path, *, replay: bool = False) -> None:
        """Open the file; without `replay` it is made where it is missing.

        Raises:
            FileNotFoundError: If it is missing and is to be replayed.
            ValueError: If the file is no cache of answers.
        """
        if replay and not path.is_file():
            raise FileNotFoundError(f"{path} must be a file to be replayed, got none")
        if not replay:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        mode = "ro" if replay else "rwc"
        uri = f"{path.resolve().as_uri()}?mode={mode}"
        with self._named():
            self._file = sqlite3.connect(uri, uri=True, timeout=30.0)
            if not replay:
                self._file.executescript(_SCHEMA)
            self._file.execute("SELECT key, question, answer FROM answers LIMIT 0")

    def get(self, key: str) -> Response | None:
        """The stored answer, or None."""
        with self._named():
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            return None if row is None else Response(**json.loads(row[0]))

    def put(self, key: str, question: str, response: Response) -> None:
        """Store an answer durably, unless there is one."""
        answer = json.dumps(asdict(response), sort_keys=True)
        row = (key, question, answer, time.time())
        with self._named(), self._file:
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)

    def __len__(self) -> int:
        """Number of answers."""
        with self._named():
            return self._file.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{self.path} must be a cache of answers that can be used, got {error}; "
                "name another llm.cache_path"
            ) from error

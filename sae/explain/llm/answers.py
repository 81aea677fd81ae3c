"""The store of answers: an append-only SQLite file, one row per canonical question.

Beside the answers stand what all calls took (`Ledger`), what the server refused, and what was
learned of the fields that it takes.
"""

import contextlib
import json
import sqlite3
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from activations_cache.journal import seal, unseal
from sae.explain.llm.budget import Ledger, usable
from sae.explain.llm.chat import CallFailedError, Response

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, answer TEXT NOT NULL, time REAL NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS never_changed BEFORE UPDATE ON answers
    BEGIN SELECT RAISE(ABORT, 'answers are never changed'); END;
CREATE TRIGGER IF NOT EXISTS never_deleted BEFORE DELETE ON answers
    BEGIN SELECT RAISE(ABORT, 'answers are never deleted'); END;
CREATE TABLE IF NOT EXISTS refusals (
    key TEXT PRIMARY KEY, reason TEXT NOT NULL, words TEXT NOT NULL, time REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS learned (client TEXT PRIMARY KEY, form TEXT NOT NULL) STRICT;
"""


_PLAIN = '{"finish": '
"""How an answer of an older version begins."""


class AnswerCache:
    """Answers by the key of their question; the first answer stays.

    Every answer is on the disk when `put` returns, so a killed run asks nothing twice but what was
    under way. Several processes of one machine may use one file.
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
        self._is_replayed = replay
        mode = "ro" if replay else "rwc"
        uri = f"{path.resolve().as_uri()}?mode={mode}"
        with usable(self.path):
            self._file = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None)
            if not replay:
                self._file.execute("PRAGMA journal_mode=WAL")  # a commit is one write, not three
                self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.executescript(_SCHEMA)
            self._file.execute("SELECT key, question, answer FROM answers LIMIT 0")
            self.ledger = Ledger(None if replay else self._file, path)
            """What all calls through this file took; nothing is called to replay it."""
            tables = "SELECT count(*) FROM sqlite_master WHERE name = 'refusals'"
            self._has_refusals = bool(self._file.execute(tables).fetchone()[0])

    def get(self, key: str) -> Response | None:
        """The stored answer, or None."""
        with usable(self.path):
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            name = f"the answer {key} in {self.path}"
            return None if row is None else Response(**_record(row[0], name))

    def put(self, key: str, question: str, response: Response) -> None:
        """Store an answer durably, unless there is one."""
        answer = seal(asdict(response)).decode()
        row = (key, question, answer, time.time())
        with usable(self.path):
            self._file.execute("PRAGMA synchronous=FULL")  # what was bought outlives a power cut
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)
            self._file.execute("PRAGMA synchronous=NORMAL")

    def refused(self, key: str) -> CallFailedError | None:
        """What the server said when it last refused the question."""
        if not self._has_refusals:  # a file of an older version
            return None
        with usable(self.path):
            found = "SELECT reason, words FROM refusals WHERE key = ?"
            row = self._file.execute(found, (key,)).fetchone()
            return None if row is None else CallFailedError(*row)

    def put_refusal(self, key: str, error: CallFailedError) -> None:
        """Keep a refusal for the replay; a later run asks again."""
        row = (key, error.reason, error.detail, time.time())
        with usable(self.path):
            self._file.execute("INSERT OR REPLACE INTO refusals VALUES (?, ?, ?, ?)", row)

    def learned(self, client: str) -> dict[str, Any]:
        """What an earlier process learned of a service."""
        with usable(self.path):
            found = "SELECT form FROM learned WHERE client = ?"
            row = self._file.execute(found, (client,)).fetchone()
            name = f"what {client} takes in {self.path}"
            return {} if row is None else unseal(row[0].encode(), name)

    def learn(self, client: str, form: dict[str, Any]) -> None:
        """Keep that for the next process."""
        row = (client, seal(form).decode())
        with usable(self.path):
            self._file.execute("INSERT OR REPLACE INTO learned VALUES (?, ?)", row)

    def __len__(self) -> int:
        """Number of answers."""
        with usable(self.path):
            return self._file.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Close the file; the last process to do so leaves nothing beside it."""
        if not self._is_replayed:
            with contextlib.suppress(sqlite3.Error):  # another process uses it
                self._file.execute("PRAGMA busy_timeout=0")
                self._file.execute("PRAGMA journal_mode=DELETE")
        self._file.close()


def _record(answer: str, name: str) -> dict[str, Any]:
    """The fields of a stored answer; those of older versions have no checksum."""
    if answer.startswith(_PLAIN):
        return json.loads(answer)
    return unseal(answer.encode(), name)

"""The store of calls: every answer, and what all calls took.

It is an append-only SQLite file with one row per canonical question. Next to the answers stand the
ledger, what the server refused, and what was learned of the fields that it takes.

What a call takes is estimated before the first, reserved in the ledger before each, and settled
after it. The ledger is on the disk, so a limit holds over all processes that use one store, whether
they run at once, one after the other, or were killed. A call that was reserved and never settled
counts as it was reserved.
"""

import asyncio
import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from activations_cache.journal import seal, unseal
from monosema.checks import MonosemaError
from sae.explain.config import LLMConfig
from sae.explain.llm.chat import AnswerToken, CallFailedError, Request, Response

CHARACTERS_PER_TOKEN = 3.0
"""English has about 4; fewer makes the reservation err on the safe side."""


class Cost(NamedTuple):
    """Calls and tokens."""

    requests: int = 0
    """Calls."""
    input_tokens: int = 0
    """Tokens sent."""
    output_tokens: int = 0
    """Tokens received."""

    def plus(self, other: "Cost") -> "Cost":
        """Sum."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def tokens(self) -> int:
        """Tokens in both directions."""
        return self.input_tokens + self.output_tokens

    def usd(self, config: LLMConfig) -> float:
        """At the config's prices."""
        sent = self.input_tokens * config.usd_per_million_input
        return (sent + self.output_tokens * config.usd_per_million_output) / 1e6


def most(request: Request) -> Cost:
    """The most that one call is expected to take."""
    sent = math.ceil(request.n_characters / CHARACTERS_PER_TOKEN) + 8 * len(request.messages)
    return Cost(1, sent, request.max_tokens)


def estimate(requests: Iterable[Request]) -> Cost:
    """The most that these calls are expected to take in all, if none has to be made again."""
    total = Cost()
    for request in requests:
        total = total.plus(most(request))
    return total


_SCHEMA = """
CREATE TABLE IF NOT EXISTS spent (
    one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL, input INTEGER NOT NULL,
    output INTEGER NOT NULL, usd REAL NOT NULL, largest_output INTEGER NOT NULL,
    input_ratio REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS reserved (
    id INTEGER PRIMARY KEY, name TEXT, input INTEGER NOT NULL, output INTEGER NOT NULL,
    usd REAL NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS reserved_name ON reserved (name) WHERE name IS NOT NULL;
INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0, 0.0, 0, 1.0);
"""
_SUM = """
SELECT spent.requests + count(reserved.id), spent.input + ifnull(sum(reserved.input), 0),
    spent.output + ifnull(sum(reserved.output), 0), spent.usd + ifnull(sum(reserved.usd), 0.0)
FROM spent LEFT JOIN reserved ON 1 WHERE spent.one = 1
"""


@contextlib.contextmanager
def usable(name: object) -> Iterator[None]:
    """Name the store in the errors of SQLite."""
    try:
        yield
    except (sqlite3.Error, json.JSONDecodeError, TypeError) as error:
        raise MonosemaError(
            f"{name} must be a cache of answers that can be used, got {error}; "
            "name another llm.cache_path"
        ) from error


class Ledger:
    """All calls that were ever reserved or made through one store."""

    def __init__(self, file: sqlite3.Connection | None = None, name: object = "memory") -> None:
        """Keep the book in a file's tables, or in memory.

        Args:
            file: The open store; it commits each statement unless told otherwise.
            name: Its path, for errors.
        """
        self._file = file or sqlite3.connect(":memory:", isolation_level=None)
        self._name = name
        self._file.executescript(_SCHEMA)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One change, with no other process between its parts."""
        with usable(self._name), self._file:
            self._file.execute("BEGIN IMMEDIATE")
            yield

    def total(self) -> tuple[Cost, float]:
        """Calls, tokens and money, those under way or lost by a kill at what they reserved."""
        with usable(self._name):
            *counts, usd = self._file.execute(_SUM).fetchone()
        return Cost(*counts), usd

    def largest(self) -> tuple[int, float]:
        """The longest answer that was billed, and the most that a prompt exceeded its estimate."""
        with usable(self._name):
            return self._file.execute("SELECT largest_output, input_ratio FROM spent").fetchone()

    def reserve(self, wanted: Cost, config: LLMConfig, name: str | None = None) -> tuple[int, bool]:
        """Write down a call before it is sent.

        Args:
            wanted: The most that it is expected to take.
            config: Prices and limits.
            name: Of a call whose answer may come in a later process; it is reserved once.

        Returns:
            The number of the reservation, and whether it was not there before.

        Raises:
            CallFailedError: With reason "budget", if a limit would be exceeded.
        """
        with self._transaction():
            if name is not None and (number := self._named(name)) is not None:
                return number, False
            total, usd = self.total()
            after = total.plus(wanted)
            limits = (
                ("max_usd", usd + wanted.usd(config)),
                ("max_tokens", after.tokens),
                ("max_requests", after.requests),
            )
            for limit_name, value in limits:
                limit = getattr(config, limit_name)
                if limit is not None and value > limit:
                    raise CallFailedError("budget", f"{limit_name}={limit} would be exceeded")
            row = (name, wanted.input_tokens, wanted.output_tokens, wanted.usd(config))
            added = self._file.execute(
                "INSERT INTO reserved (name, input, output, usd) VALUES (?, ?, ?, ?)", row
            )
            assert added.lastrowid is not None
            return added.lastrowid, True

    def _named(self, name: str) -> int | None:
        row = self._file.execute("SELECT id FROM reserved WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def settle(self, number: int, took: Cost, usd: float, *, ratio: float = 1.0) -> None:
        """Replace a reservation by what the call took."""
        with self._transaction():
            self._file.execute("DELETE FROM reserved WHERE id = ?", (number,))
            self._file.execute(
                "UPDATE spent SET requests = requests + ?, input = input + ?, output = output + ?,"
                " usd = usd + ?, largest_output = max(largest_output, ?),"
                " input_ratio = max(input_ratio, ?)",
                (*took, usd, took.output_tokens, ratio),
            )


class Reservation(NamedTuple):
    """A call that may be sent."""

    number: int
    """Its row."""
    expected: Cost
    """By the length of the question and of the answer that is asked for."""
    held: Cost
    """What is set aside: more, where earlier calls were billed more than expected."""
    is_new: bool
    """Whether no earlier process reserved it."""


class Budget:
    """Reserves before a call and settles after it; `spent` is of this process alone."""

    def __init__(self, config: LLMConfig, ledger: Ledger | None = None) -> None:
        """Keep prices and limits, and the ledger; None keeps one in memory."""
        self.config = config
        self.ledger = ledger or Ledger()
        self.spent = Cost()
        """Of the calls that this process made."""
        self._n_under_way, self._ended = 0, asyncio.Event()

    def reserve(self, request: Request, name: str | None = None) -> Reservation:
        """Set aside the most that a call can take, by the largest that was billed so far.

        Raises:
            CallFailedError: With reason "budget", if that would exceed a limit.
        """
        expected = most(request)
        longest, ratio = self.ledger.largest()
        held = Cost(
            1, math.ceil(expected.input_tokens * ratio), max(expected.output_tokens, longest)
        )
        number, is_new = self.ledger.reserve(held, self.config, name)
        return Reservation(number, expected, held, is_new)

    async def begin(self, request: Request, name: str | None = None) -> Reservation:
        """Reserve as `reserve` does; while calls under way hold what is left, wait for their end.

        What a call holds is more than it will take, so a limit that seems reached may not be.

        Raises:
            CallFailedError: With reason "budget", if nothing is under way that could free some.
        """
        while True:
            try:
                reserved = self.reserve(request, name)
            except CallFailedError:
                if not self._n_under_way:
                    raise
                await self._ended.wait()
            else:
                self._n_under_way += 1
                return reserved

    def end(self) -> None:
        """Say that a call that was begun is over, whatever became of it."""
        self._n_under_way -= 1
        self._ended.set()
        self._ended = asyncio.Event()

    def settle(self, reserved: Reservation, response: Response) -> None:
        """Replace a reservation by what the call took; endpoints that do not say are estimated."""
        written = math.ceil(len(response.text) / CHARACTERS_PER_TOKEN)
        received = response.output_tokens or min(written, reserved.expected.output_tokens)
        sent = response.input_tokens or reserved.expected.input_tokens
        self._take(reserved, Cost(1, sent, received), sent / max(1, reserved.expected.input_tokens))

    def lose(self, reserved: Reservation, *, was_sent: bool) -> None:
        """Give back a reservation of a call that failed; what was sent may have been charged."""
        self._take(reserved, Cost(1, reserved.expected.input_tokens if was_sent else 0, 0), 1.0)

    def release(self, reserved: Reservation) -> None:
        """Give back a reservation of a call that was not made."""
        self.ledger.settle(reserved.number, Cost(), 0.0)

    def _take(self, reserved: Reservation, took: Cost, ratio: float) -> None:
        self.spent = self.spent.plus(took)
        self.ledger.settle(reserved.number, took, took.usd(self.config), ratio=ratio)


_ANSWERS_SCHEMA = """
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
                self._file.executescript(_ANSWERS_SCHEMA)
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
            return None if row is None else _response(_record(row[0], name))

    def put(self, key: str, question: str, response: Response) -> None:
        """Store an answer durably, unless there is one."""
        record = asdict(response)
        if not response.tokens:
            del record["tokens"]
        answer = seal(record).decode()
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
            result = "SELECT reason, words FROM refusals WHERE key = ?"
            row = self._file.execute(result, (key,)).fetchone()
            return None if row is None else CallFailedError(*row)

    def put_refusal(self, key: str, error: CallFailedError) -> None:
        """Keep a refusal for the replay; a later run asks again."""
        row = (key, error.reason, error.detail, time.time())
        with usable(self.path):
            self._file.execute("INSERT OR REPLACE INTO refusals VALUES (?, ?, ?, ?)", row)

    def learned(self, client: str) -> dict[str, Any]:
        """What an earlier process learned of a service."""
        with usable(self.path):
            result = "SELECT form FROM learned WHERE client = ?"
            row = self._file.execute(result, (client,)).fetchone()
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


def _response(record: dict[str, Any]) -> Response:
    tokens = (AnswerToken(text, tuple(map(tuple, some))) for text, some in record.get("tokens", ()))
    return Response(**{**record, "tokens": tuple(tokens)})


def _record(answer: str, name: str) -> dict[str, Any]:
    """The fields of a stored answer; those of older versions have no checksum."""
    if answer.startswith(_PLAIN):
        return json.loads(answer)
    return unseal(answer.encode(), name)

"""Questions in batch files, as OpenAI and `vllm run-batch` take them, and their answers.

    requests-0001.jsonl  {"custom_id": KEY, "method": "POST", "url": ..., "body": {...}} a line
    answers-*.jsonl      {"custom_id": KEY, "response": {"status_code": 200, "body": {...}}} a line

Labelling goes in rounds: labels are asked for, then what scores them, then what could not be read.
Each run of the same command takes in the answers that are there, and writes the questions that have
none yet into new files; a question stands in one file only, however often the command is run.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monosema.checks import MonosemaError
from sae.explain.config import LLMConfig
from sae.explain.llm.chat import (
    CallFailedError,
    Request,
    Response,
    canonical,
    key_of,
)
from sae.explain.llm.form import PRESETS, Refused, form_of, is_overflow, words_of
from sae.explain.llm.openai_client import body, read_completion, turns

LINES_PER_FILE = 50_000
BYTES_PER_FILE = 190_000_000
"""OpenAI's limits are 50,000 lines and 200 MB."""

_URL = "/v1/chat/completions"


class BatchClient:
    """Writes questions down, and answers those whose answers lie there.

    What a service refused is asked again once the settings give the question another form; what
    failed for other reasons is asked again in any case.
    """

    is_deferred = True
    """A question counts from when it is written down until its answer comes, over many runs."""

    def __init__(self, config: LLMConfig) -> None:
        """Read the files that are there.

        Args:
            config: Where they are, and how requests look.

        Raises:
            ValueError: If a line is not what it should be.
        """
        assert config.batch_dir is not None
        self.directory = Path(config.batch_dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.form = form_of(config)
        """Which fields are sent."""
        self._config = config
        self._asked: dict[str, str] = {}  # key to a hash of the last body
        self._open: Counter[str] = Counter()  # times asked without an answer of any kind
        self._good: dict[str, Any] = {}
        self._bad: dict[str, Any] = {}
        for record in self._records("requests", "body"):
            self._asked[record["custom_id"]] = _digest(record["body"])
            self._open[record["custom_id"]] += 1
        for record in self._records("answers", "response"):
            key, response = record["custom_id"], record["response"] or {}
            self._open[key] -= 1
            is_good = response.get("status_code") == 200 and not record.get("error")
            (self._good if is_good else self._bad)[key] = record
        self._number = len([*self.directory.glob("requests-*.jsonl")])
        self._n_lines = self._n_bytes = 0
        self.n_written = 0
        """Questions that this process wrote down."""

    @property
    def name(self) -> str:
        """Endpoint and model, as for calls: answers in the store serve both."""
        base = self._config.base_url or PRESETS[self._config.kind].base_url
        return f"{(base or 'https://api.openai.com/v1').rstrip('/')} {self._config.model}"

    async def complete(self, request: Request) -> Response:
        """Answer from the files, or write the question down.

        Raises:
            CallFailedError: With reason "pending" if it is written down, or why it has no answer.
        """
        key = key_of(canonical(self.name, request))
        if key in self._good:
            answer = self._good[key]["response"].get("body")
            return read_completion(answer, self.form.wire(request))
        fields = {"model": self._config.model, "messages": turns(request, self.form)}
        fields |= body(self.form, request, self._config)
        if self._open[key] <= 0:
            refusal = _refusal(self._bad.get(key))
            if refusal is not None and self._asked.get(key) == _digest(fields):
                raise refusal
            self._write(key, fields)
        where = f"{self.directory}/requests-*.jsonl"
        raise CallFailedError("pending", f"questions in {where} await answers-*.jsonl beside them")

    def _write(self, key: str, fields: dict[str, Any]) -> None:
        record = {"custom_id": key, "method": "POST", "url": _URL, "body": fields}
        line = (json.dumps(record, sort_keys=True) + "\n").encode()
        is_full = self._n_lines == LINES_PER_FILE or self._n_bytes + len(line) > BYTES_PER_FILE
        if self._n_lines == 0 or is_full:
            self._number, self._n_lines, self._n_bytes = self._number + 1, 0, 0
        with (self.directory / f"requests-{self._number:04d}.jsonl").open("ab") as file:
            file.write(line)
        self._n_lines, self._n_bytes = self._n_lines + 1, self._n_bytes + len(line)
        self._asked[key], self._open[key] = _digest(fields), 1
        self.n_written += 1

    def _records(self, kind: str, field: str) -> Iterator[dict[str, Any]]:
        """All records of the files of a kind; the last line of a killed run may be cut."""
        for path in sorted(self.directory.glob(f"{kind}*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                record = _record(line, field)
                if record is not None:
                    yield record
                elif kind == "requests" and number == len(lines) and line.strip():
                    path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
                elif line.strip():
                    rule = f"must be JSON with custom_id and {field}"
                    raise MonosemaError(
                        f"{path}:{number} {rule}, got {line[:80]!r}; fetch it again"
                    )


def _record(line: bytes, field: str) -> dict[str, Any] | None:
    """A line of a batch file; None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_right = isinstance(record, dict) and isinstance(record.get("custom_id"), str)
    return record if is_right and field in record else None


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _refusal(record: dict[str, Any] | None) -> CallFailedError | None:
    """Why the service refused a question; None: it did not, and the question is asked again."""
    response = (record or {}).get("response") or {}
    status = response.get("status_code")
    if status not in (400, 413, 422):
        return None
    words, param = words_of(response.get("body"))
    is_long = is_overflow(Refused(status, words, param))
    return CallFailedError("context" if is_long else "request", f"{status}: {words[:300]}")

"""The form of a request: which fields a service takes, by its kind and by what it refused.

Services differ in the name of the longest answer; many refuse a temperature, a seed or a schema. A
preset says what a kind of service takes. Whatever a service refuses all the same is left out from
then on, once, and the store remembers it for the next process.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from sae.explain.config import LLMConfig
from sae.explain.llm.chat import Request


class Preset(NamedTuple):
    """What a kind of service takes."""

    base_url: str | None
    """Where it listens unless the config says where; None: OpenAI's own."""
    length: str
    """Its name for the longest answer."""
    schema: bool
    """Whether answers are held to a JSON schema, which the servers of one's own can do."""
    needs_key: bool = False
    """Whether a key must be in the environment."""
    left_out: tuple[str, ...] = ()
    """Fields that it refuses."""


PRESETS: Mapping[str, Preset] = {
    "openai": Preset(None, "max_completion_tokens", schema=False, needs_key=True),
    "openrouter": Preset("https://openrouter.ai/api/v1", "max_tokens", False, True),
    "mistral": Preset("https://api.mistral.ai/v1", "max_tokens", False, True, ("seed",)),
    "vllm": Preset("http://127.0.0.1:8000/v1", "max_tokens", True),
    "llama.cpp": Preset("http://127.0.0.1:8080/v1", "max_tokens", True),
    "ollama": Preset("http://127.0.0.1:11434/v1", "max_tokens", True),
}
"""By `llm.kind`; "local", transformers in this process, sends nothing."""

_PROBABILITIES = ("logprobs", "top_logprobs")
_SUSPECTS = ("response_format", "seed", "temperature", "reasoning_effort", *_PROBABILITIES)
_LEAST = 16
SYSTEM = "system"
"""Among the fields left out: instructions stand in the user's turn, where there is no other."""
_LENGTHS = ("max_tokens", "max_completion_tokens")
_OVERFLOW = re.compile(
    r"context[ _-]?(length|window|size|limit)|maximum context|available context|exceed_context|"
    r"(prompt|input|request|messages?)\b.{0,40}\b(too (long|large)|exceeds?)\b|"
    r"too many (input )?tokens|(input|prompt)s?\W{0,3} ?tokens?\b.{0,60}(must be|<=)|"
    r"reduce the length|max(imum)?[ _](model|sequence|input|prompt)[ _]len|n_ctx|num_ctx|"
    r"longer than the (model|maximum)|token limit|string_above_max_length",
    re.I,
)
_RANGE = re.compile(
    r"too (large|small|big|high|low)|at (most|least)|(less|greater|more) than|[<>]=?|exceed|"
    r"maximum|minimum|up to|range|between|below|above",
    re.I,
)
_TOO_SMALL = re.compile(r"at least|below|minimum|greater than|>=|too small", re.I)
_NO_SYSTEM = re.compile(
    r"roles must alternate|\bsystem['\"` ]+(role|message|prompt|instruction)s?\b.{0,40}"
    r"(not|n't|unsupported)|(unsupported|unknown|invalid) role\W+system",
    re.I,
)
_MODERATED = re.compile(r"content|polic|flagged|moderat|safety|harm", re.I)


class Refused(NamedTuple):
    """What a service said to a request, HTTP 400, 413 or 422."""

    status: int
    """Of the answer."""
    words: str
    """All it said."""
    param: str
    """The field that it names by itself, or nothing."""


def is_overflow(refused: Refused) -> bool:
    """Whether a question is longer than the model's context."""
    return refused.status == 413 or bool(_OVERFLOW.search(refused.words))


@dataclass
class Form:
    """What is sent to one service; it changes when the service refuses a field."""

    length: str | None = "max_tokens"
    """Name of the longest answer; None: none is sent."""
    left_out: list[str] = field(default_factory=list)
    """Fields that are not sent."""
    longest: int | None = None
    """More tokens than this are not asked for."""
    room: int = 0
    """Tokens that are always asked for: thoughts need them before the answer begins."""
    is_proven: bool = False
    """Whether the service has answered a request of this form."""
    gives_probabilities: bool = False
    """Whether it has answered one that asked for probabilities."""
    notes: list[str] = field(default_factory=list)
    """What was changed and why, in the service's words."""
    before: list[str] | None = None
    """`left_out` before fields were suspected."""
    suspects: list[list[str]] = field(default_factory=list)
    """What is left out next, if the service goes on to refuse without naming a field."""

    def alternatives(self, request: Request) -> int:
        """Tokens whose probabilities are asked for; 0 once the service refused to give them."""
        return 0 if set(_PROBABILITIES) & set(self.left_out) else request.alternatives

    def wire(self, request: Request) -> int:
        """The longest answer that is asked for."""
        wanted = max(request.max_tokens, self.room)
        return wanted if self.longest is None else min(wanted, self.longest)

    def recall(self, known: Mapping[str, Any]) -> None:
        """Take over what an earlier process learned."""
        for name, value in known.items():
            if name in self.__dataclass_fields__:
                setattr(self, name, value)

    def learned(self) -> dict[str, Any]:
        """What the next process should know."""
        return asdict(self)

    def learn(self, sent: Mapping[str, Any], refused: Refused) -> str:
        """Change what the service refuses.

        Args:
            sent: The fields of the request.
            refused: What the service said.

        Returns:
            What changed; nothing if the refusal is of the question itself.
        """
        name = _named(sent, refused)
        if SYSTEM not in self.left_out and _NO_SYSTEM.search(refused.words):
            name = SYSTEM
        elif not name and refused.param.split(".")[0] in ("messages", "model"):
            return ""
        if name in _LENGTHS:
            note = self._length_note(sent, refused)
        elif name:
            self.left_out.append(name)
            note = f"{name} is left out"
        else:
            note = self._suspect(sent, refused)
        if note:
            self.is_proven = False
            self.notes.append(f"{note}: {refused.words[:200]}")
        return note

    def shrink(self, sent: Mapping[str, Any]) -> str:
        """Ask for shorter answers where a long one does not fit into the context."""
        asked = next((sent[name] for name in _LENGTHS if name in sent), 0)
        if asked <= 1024:
            return ""
        self.longest = asked // 2
        self.notes.append(f"at most {self.longest} tokens are asked for: the context is full")
        return self.notes[-1]

    def _suspect(self, sent: Mapping[str, Any], refused: Refused) -> str:
        """Leave out one field after another, then all, until a first answer comes.

        A form that was answered is not at fault, nor is one whose words were found offensive.
        """
        if _MODERATED.search(refused.words):
            return ""
        if self.is_proven and "logprobs" in sent and not self.gives_probabilities:
            self.left_out.append("logprobs")
            return "logprobs is left out"
        if self.is_proven:
            return ""
        if self.before is None:
            self.before = [*self.left_out]
            ours = [name for name in _SUSPECTS if name in sent]
            self.suspects = [[name] for name in ours] + ([ours] if len(ours) > 1 else [])
        elif not self.suspects:  # it was none of them
            self.left_out, self.is_proven = self.before, True
            return ""
        if not self.suspects:
            return ""
        names = self.suspects.pop(0)
        self.left_out = [*self.before, *names]
        return f"{', '.join(names)} is left out"

    def _length_note(self, sent: Mapping[str, Any], refused: Refused) -> str:
        name = next(one for one in _LENGTHS if one in sent)
        if _RANGE.search(refused.words):
            numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", refused.words)]
            larger = [n for n in numbers if sent[name] < n < 10**6]
            if larger and _TOO_SMALL.search(refused.words):
                self.room = max(larger)
                return f"{name} is at least {self.room}"
            if smaller := [n for n in numbers if _LEAST <= n < sent[name]]:
                self.longest = max(smaller)
                return f"{name} is at most {self.longest}"
        self.left_out.append(name)
        self.length = next((one for one in _LENGTHS if one not in self.left_out), None)
        return f"{name} is left out" if self.length is None else f"{self.length} stands for {name}"


def _named(sent: Mapping[str, Any], refused: Refused) -> str:
    """The field of ours that a refusal speaks of."""
    ours = [name for name in (*_LENGTHS, *_SUSPECTS) if name in sent]
    by_itself = refused.param.split(".")[0]
    if by_itself in ours:
        return by_itself
    if by_itself in ("reasoning", "text"):
        by_itself = {"reasoning": "reasoning_effort", "text": "response_format"}[by_itself]
        return by_itself if by_itself in ours else ""
    if re.fullmatch(r"max\w*tokens\w*", by_itself):  # its name for it, not ours
        return next((name for name in _LENGTHS if name in sent), "")
    if by_itself in ("messages", "model"):
        return ""
    words = refused.words.replace("-", "_").lower()
    places = {
        name: match.start()
        for name in ours
        if (match := re.search(rf"(?<![a-z_]){name.replace('_', '[_ ]')}(?![a-z_])", words))
    }
    if "json_schema" in words and "response_format" in ours:
        places.setdefault("response_format", words.index("json_schema"))
    return min(places, key=places.__getitem__) if places else ""


def form_of(config: LLMConfig) -> Form:
    """The form that a config and its preset give."""
    preset = PRESETS[config.kind]
    length = preset.length
    if config.kind == "openai" and config.base_url is not None:
        length = "max_tokens"  # a service that imitates OpenAI's, by its older name
    if config.length_field != "auto":
        length = None if config.length_field == "none" else config.length_field
    left_out = [*preset.left_out, *config.leave_out]
    if not uses_schema(config):
        left_out.append("response_format")
    return Form(length=length, left_out=left_out, room=config.answer_tokens or 0)


def uses_schema(config: LLMConfig) -> bool:
    """Whether answers are held to a JSON schema."""
    if config.response_format == "auto":
        return PRESETS[config.kind].schema
    return config.response_format == "json_schema"


def words_of(body: object) -> tuple[str, str]:
    """What an error's body says, in one line, and the field that it names."""
    if isinstance(body, list):  # some services wrap it
        body = body[0] if len(body) == 1 else {"detail": body}
    if not isinstance(body, dict):
        return _line(body), ""
    inner = body.get("error", body)
    if not isinstance(inner, dict):
        return _line(inner), ""
    param = inner.get("param")
    detail = inner.get("detail", inner.get("message", body.get("message")))
    if isinstance(detail, dict):
        detail = detail.get("detail", detail)
    if isinstance(detail, list) and detail and all(isinstance(one, dict) for one in detail):
        names = [_place(one.get("loc")) for one in detail]
        param = param or names[0]
        said = zip(names, detail, strict=True)
        detail = "; ".join(f"{name}: {one.get('msg', one)}" for name, one in said)
    words = _line(inner if detail is None else detail)
    metadata = inner.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    if raw:  # a service in front of another repeats what that one said
        words += f" ({_line(raw)})"
    return words, param if isinstance(param, str) else ""


def _place(loc: object) -> str:
    parts = loc if isinstance(loc, list) else [loc or ""]
    return ".".join(str(part) for part in parts if part != "body")


def _line(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return " ".join(text.split())[:2000]

"""A chat model behind any OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, hosted ones."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import openai

from sae.explain.config import LLMConfig
from sae.explain.judges import N_TEXTS, allowed, read_question
from sae.explain.llm.chat import (
    AdaptedError,
    AnswerToken,
    CallFailedError,
    EndpointError,
    Request,
    Response,
    UnavailableError,
    wanted_wait,
)
from sae.explain.llm.form import PRESETS, SYSTEM, Form, Refused, form_of, is_overflow, words_of

_NO_SERVICE = (401, 402, 403, 404)
_REFUSED = (400, 413, 422)
_BUSY = (429, 498, 503, 529)
_AGAIN = (408, 409, 425)
_CUT = {"length", "max_tokens", "model_length", "max_output_tokens", "token_limit"}
_BUSY_WORDS = ("rate_limit", "rate limit", "too many requests", "overloaded", "resource_exhausted")


class OpenAIClient:
    """Calls by the `openai` package, without its own retries: the caller does those."""

    def __init__(self, config: LLMConfig) -> None:
        """Make the client; nothing is called.

        Raises:
            EndpointError: If the environment has no key and one is wanted.
        """
        preset = PRESETS[config.kind]
        is_keyless = config.api_key == "none" or (config.api_key == "auto" and not preset.needs_key)
        key = "none" if is_keyless else None  # None: the package asks OPENAI_API_KEY
        limit = config.max_answer_bytes

        async def capped(response: Any) -> None:
            response.stream = _capped(response.stream, limit)

        hooks = {"response": [capped]}
        try:
            self._openai = openai.AsyncOpenAI(
                api_key=key,
                base_url=config.base_url or preset.base_url,
                max_retries=0,
                timeout=config.timeout_s,
                default_headers={"accept-encoding": "identity"},  # so that what is counted is read
                http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
            )
        except openai.OpenAIError as error:
            raise EndpointError(
                "the environment must have OPENAI_API_KEY, got none; set it, or api_key: none for "
                "an endpoint that takes none"
            ) from error
        self._config = config
        self._key = self._openai.api_key
        self.form = form_of(config)
        """Which fields are sent; it changes when the service refuses one."""

    @property
    def name(self) -> str:
        """Endpoint and model."""
        return f"{str(self._openai.base_url).rstrip('/')} {self._config.model}"

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        fields, n_changes = body(self.form, request, self._config), len(self.form.notes)
        asked = self.form.wire(request)
        try:
            raw = await self._openai.chat.completions.with_raw_response.create(
                model=self._config.model,
                messages=turns(request, self.form),  # pyright: ignore[reportArgumentType]
                extra_body=fields,
            )
            response = read_completion(json.loads(raw.content), asked)
        except _ServiceError as error:
            raise self._failure(error, fields, n_changes) from None
        except openai.APIStatusError as error:
            said = error.response.headers
            failed = _ServiceError(error.status_code, error.body or _text(error), said)
            raise self._failure(failed, fields, n_changes) from None
        except openai.APIConnectionError as error:
            raise UnavailableError("transport", self._line(error), was_sent=True) from None
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # cut, or too deep
            detail = f"an answer that is no JSON: {self._line(error)}"
            raise UnavailableError("transport", detail, was_sent=True) from None
        self.form.is_proven = True
        self.form.gives_probabilities |= "logprobs" in fields
        return response

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    def _failure(
        self, error: "_ServiceError", fields: Mapping[str, Any], n_changes: int
    ) -> Exception:
        words, param = words_of(error.body)
        status, line = error.status, self._hidden(f"{error.status}: {words}")
        if status in _BUSY or (error.is_busy and status not in _NO_SERVICE):
            if "insufficient_quota" not in json.dumps(error.body, default=str):
                headers = {**_passed_on(error.body), **error.headers}
                wait = wanted_wait(headers, json.dumps(error.body, default=str))
                return UnavailableError("rate", line, retry_after=wait)
            status = 402  # no credit: waiting does not help
        if status == 403 and "moderation" in words.lower():
            status = 400
        if status in _NO_SERVICE:
            return EndpointError(f"{self.name} must serve this key and model, got {line}")
        if status in _REFUSED:
            return self._refusal(Refused(status, words, param), line, fields, n_changes)
        if status >= 500 or status in _AGAIN:
            wait = wanted_wait(error.headers, words)
            return UnavailableError("transport", line, retry_after=wait)
        return CallFailedError("request", line)

    def _refusal(
        self, refused: Refused, line: str, fields: Mapping[str, Any], n_changes: int
    ) -> Exception:
        """Change the form, if that is at fault; else it is the question."""
        if len(self.form.notes) > n_changes:  # another call's refusal has changed it meanwhile
            return AdaptedError(line)
        if is_overflow(refused):
            note = self.form.shrink(fields)
            return AdaptedError(line) if note else CallFailedError("context", line)
        note = self.form.learn(fields, refused)
        return AdaptedError(line) if note else CallFailedError("request", line)

    def _line(self, error: Exception) -> str:
        """An error and its cause in one line; the package alone says "Connection error"."""
        cause = "" if error.__cause__ is None else f": {error.__cause__}"
        return self._hidden(" ".join(f"{error}{cause}".split()) or type(error).__name__)

    def _hidden(self, line: str) -> str:
        """Servers are known to repeat the key."""
        return line.replace(self._key, "***")[:300]


class _ServiceError(Exception):
    """What a service said instead of an answer, by its status or inside an answer of status 200."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str]) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers
        self.is_busy = False


def _passed_on(body: object) -> dict[str, str]:
    """The headers that a service in front of another repeats in its body."""
    inner = body.get("error", body) if isinstance(body, dict) else None
    metadata = inner.get("metadata") if isinstance(inner, dict) else None
    headers = metadata.get("headers") if isinstance(metadata, dict) else None
    return {str(k).lower(): str(v) for k, v in headers.items()} if isinstance(headers, dict) else {}


def _text(error: openai.APIStatusError) -> str:
    return error.response.text if error.response.is_closed else str(error)


def _capped(stream: Any, limit: int) -> Any:
    """A stream of bytes that fails once it is longer than the limit."""
    http = import_module(type(stream).__module__.partition(".")[0])  # httpx, or what followed it

    class _Capped(http.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            n = 0
            async for chunk in stream:
                n += len(chunk)
                if n > limit:
                    raise openai.OpenAIError(f"more than max_answer_bytes={limit:,} bytes")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    return _Capped()


def turns(request: Request, form: Form) -> list[dict[str, str]]:
    """The conversation as the API takes it, and the model."""
    first, *others = request.messages
    messages = request.messages
    if SYSTEM in form.left_out and first.role == "system" and others:
        said = f"{first.content}\n\n{others[0].content}"
        messages = (replace(others[0], content=said), *others[1:])
    return [{"role": m.role, "content": m.content} for m in messages]


def body(form: Form, request: Request, config: LLMConfig) -> dict[str, Any]:
    """A request's fields beside the model and the messages."""
    fields: dict[str, Any] = {"temperature": request.temperature, "seed": request.seed}
    if form.length is not None:
        fields[form.length] = form.wire(request)
    if config.reasoning_effort is not None:
        fields["reasoning_effort"] = config.reasoning_effort
    schema = None if "response_format" in form.left_out else schema_of(request)
    if schema is not None:
        named = {"name": "answer", "strict": True, "schema": schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    if n_alternatives := form.alternatives(request):
        fields |= {"logprobs": True, "top_logprobs": n_alternatives}
    accepted = {name: value for name, value in fields.items() if name not in form.left_out}
    return accepted | config.extra_body


def schema_of(request: Request) -> dict[str, Any] | None:
    """The JSON schema of an answer that the readers read; None: any text."""
    task, _, items = read_question(request)
    known = allowed(task, len(items))
    if task.startswith("explain"):
        name, value = "label", {"type": "string"}
    elif known is not None:
        n, low, high = known
        one = {"type": "integer", "minimum": low, "maximum": high}
        name, value = "numbers", {"type": "array", "items": one, "minItems": n, "maxItems": n}
    elif task == "texts":
        some = {"items": {"type": "string"}, "minItems": N_TEXTS, "maxItems": N_TEXTS}
        name, value = "texts", {"type": "array", **some}
    else:
        return None
    return {
        "type": "object", "properties": {name: value}, "required": [name],
        "additionalProperties": False,
    }  # fmt: skip


def read_completion(answer: Any, limit: int) -> Response:
    """Read a chat completion; what is not one is a failure of the endpoint.

    Args:
        answer: The decoded body.
        limit: Tokens that were asked for: an answer of exactly so many was cut, whatever it says.

    Raises:
        UnavailableError: If it is none.
        _ServiceError: If it is an error in the place of one.
    """
    _raise_inner(answer)
    try:
        choice, usage = answer["choices"][0], answer.get("usage")
        _raise_inner(choice)
        message, finish = choice["message"], choice.get("finish_reason")
        text = _content(message.get("content"))
        refused = bool(message.get("refusal")) or finish == "content_filter"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        detail = f"an answer that is no chat completion, {type(error).__name__}"
        raise UnavailableError("transport", detail, was_sent=True) from None
    sent, received = _billed(usage)
    if refused:
        return Response("", "refusal", sent, received)
    is_cut = str(finish).lower() in _CUT or received == limit
    tokens = _tokens(choice.get("logprobs"))
    return Response(text, "length" if is_cut else "stop", sent, received, tokens)


def _raise_inner(body: Any) -> None:
    """An error inside an answer of status 200, by its own code."""
    inner = body.get("error") if isinstance(body, dict) else None
    if not inner:
        return
    named = inner if isinstance(inner, dict) else {}
    code = next((named[k] for k in ("code", "status", "status_code", "type") if named.get(k)), "")
    status = int(code) if str(code).isdecimal() and 400 <= int(code) < 600 else 500
    said = json.dumps(inner, default=str).lower()
    if status == 500 and ("invalid_request" in said or "context_length" in said):
        status = 400
    error = _ServiceError(status, body, {})
    error.is_busy = status == 500 and any(word in said for word in _BUSY_WORDS)
    raise error


def _tokens(given: Any) -> tuple[AnswerToken, ...]:
    """The tokens of an answer with their probabilities; none where they have another form."""
    try:
        return tuple([
            AnswerToken(
                str(one["token"]),
                tuple(
                    (str(other["token"]), float(other["logprob"]))
                    for other in (one, *(one.get("top_logprobs") or ()))
                ),
            )
            for one in given["content"]
        ])
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _content(content: Any) -> str:
    """The text of an answer; of several parts those that are text, and none of the thoughts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if content is None or isinstance(content, str):
        return content or ""
    raise TypeError(f"content must be text, got {type(content).__name__}")


def _billed(usage: Any) -> tuple[int, int]:
    """Tokens sent and received; some services count thoughts in the total alone."""
    known = usage if isinstance(usage, dict) else {}
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    sent, received, total = (
        int(value) if isinstance(value := known.get(name), int | float) and 0 <= value < 1e12 else 0
        for name in names
    )
    return sent, max(received, total - sent)

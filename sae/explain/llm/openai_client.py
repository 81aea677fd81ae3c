"""A chat model behind any OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, hosted ones."""

import json
from typing import Any

import openai

from sae.explain.config import LLMConfig
from sae.explain.llm.chat import (
    CallFailedError,
    EndpointError,
    Request,
    Response,
    UnavailableError,
)

_NO_SERVICE = (401, 402, 403, 404)
_AGAIN = (408, 409, 425)


class OpenAIClient:
    """Calls by the `openai` package, without its own retries: the caller does those."""

    def __init__(self, config: LLMConfig) -> None:
        """Make the client; nothing is called.

        Raises:
            EndpointError: If the environment has no key and one is wanted.
        """
        key = "none" if config.api_key == "none" else None  # None: the package asks OPENAI_API_KEY
        try:
            self._openai = openai.AsyncOpenAI(
                api_key=key, base_url=config.base_url, max_retries=0, timeout=config.timeout_s
            )
        except openai.OpenAIError as error:
            raise EndpointError(
                "the environment must have OPENAI_API_KEY, got none; set it, or api_key: none for "
                "an endpoint that takes none"
            ) from error
        self._model = config.model
        self._key = self._openai.api_key

    @property
    def name(self) -> str:
        """Endpoint and model."""
        return f"{str(self._openai.base_url).rstrip('/')} {self._model}"

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        try:
            raw = await self._openai.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": m.role, "content": m.content} for m in request.messages],  # pyright: ignore[reportArgumentType]
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                seed=request.seed,
            )
            return _response(json.loads(raw.content))
        except openai.APIStatusError as error:
            raise self._of_status(error) from None
        except openai.APIConnectionError as error:
            raise UnavailableError("transport", self._line(error), was_sent=True) from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: JSON that was cut
            detail = f"an answer that is no JSON: {self._line(error)}"
            raise UnavailableError("transport", detail, was_sent=True) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    def _of_status(self, error: openai.APIStatusError) -> Exception:
        status, line = error.status_code, self._line(error)
        if status in _NO_SERVICE or error.code == "insufficient_quota":
            return EndpointError(f"{self.name} must serve this key and model, got {status}: {line}")
        if status == 429:
            return UnavailableError("rate", line, retry_after=_retry_after(error))
        if status >= 500 or status in _AGAIN:
            return UnavailableError("transport", line, retry_after=_retry_after(error))
        return CallFailedError("request", line)

    def _line(self, error: Exception) -> str:
        """An error in one line; servers are known to repeat the key."""
        line = " ".join(str(error).split()) or type(error).__name__
        return line.replace(self._key, "***")[:300]


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:  # absent, or a date
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _response(body: Any) -> Response:
    """Read a chat completion; what is not one is a failure of the endpoint."""
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        refused = bool(message.get("refusal")) or finish == "content_filter"
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        detail = f"an answer that is no chat completion, {type(error).__name__}"
        raise UnavailableError("transport", detail, was_sent=True) from None
    if refused:
        return Response("", "refusal", *tokens)
    return Response(str(text or ""), "length" if finish == "length" else "stop", *tokens)

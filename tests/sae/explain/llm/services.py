"""One table of services as they behave: what each refuses, promises, hides and bills."""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What a service sends back."""

    status: int
    body: object
    headers: Mapping[str, str] = {}


@dataclass
class State:
    """What a service remembers of its callers."""

    n: int = 0
    n_in_window: int = 0
    began: float = field(default_factory=time.time)
    seen: list[dict[str, Any]] = field(default_factory=list)


Behaviour = Callable[[dict[str, Any], State], Reply | None]
"""A fault, or None where the service answers as it should."""


def text_of(body: Mapping[str, Any]) -> str:
    """The right answer: the marked topic of a label's question, a 1 for each text that has it."""
    user = body["messages"][-1]["content"]
    marked = re.search("<< ?(topic[a-z]+)>>", user)
    if "LABEL" in body["messages"][0]["content"]:
        return f"LABEL: the word {marked[1]}" if marked else "LABEL: nothing"
    word = re.search("^Label: .* (.*)$", user, re.MULTILINE)[1]
    items = [line for line in user.split("\n") if re.match(r"\d+: ", line)]
    return json.dumps([int(word in line) for line in items])


def completion(text: object, finish: str = "stop", **usage: int) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    counted = {"prompt_tokens": 50, "completion_tokens": 20} | usage
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": counted}


def error(message: str, **more: object) -> dict[str, Any]:
    """An error as OpenAI words it."""
    return {"error": {"message": message, **more}}


def _limit(body: Mapping[str, Any]) -> int:
    return body.get("max_completion_tokens") or body.get("max_tokens") or 10**6


def _answer(body: Mapping[str, Any], text: object, **usage: int) -> Reply:
    return Reply(200, completion(text, **usage))


# Fields that are refused.


def reasoning_model(body: dict[str, Any], state: State) -> Reply | None:
    if "max_tokens" in body:
        said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        said += "'max_completion_tokens' instead."
        return Reply(400, error(said, param="max_tokens", code="unsupported_parameter"))
    if body.get("temperature", 1) != 1:
        said = "Unsupported value: 'temperature' does not support 0 with o3-2025-04-16."
        return Reply(400, error(said, param="temperature", code="unsupported_value"))
    return None


def strict_gateway(body: dict[str, Any], state: State) -> Reply | None:
    known = {"model", "messages", "temperature", "max_tokens"}
    extra = [name for name in body if name not in known]
    said = {"type": "extra_forbidden", "msg": "Extra inputs are not permitted"}
    detail = [said | {"loc": ["body", name]} for name in extra]
    return Reply(422, {"detail": detail}) if extra else None


def terse_gateway(body: dict[str, Any], state: State) -> Reply | None:
    return Reply(400, {"error": "Bad Request"}) if "seed" in body else None


def terse_and_fussy(body: dict[str, Any], state: State) -> Reply | None:
    is_fussy = "seed" in body or "temperature" in body
    return Reply(400, {"message": "invalid request body"}) if is_fussy else None


def old_server(body: dict[str, Any], state: State) -> Reply | None:
    if "max_completion_tokens" in body:
        said = "Unrecognized request argument supplied: max_completion_tokens"
        return Reply(400, error(said, type="invalid_request_error"))
    return None


def shortest_answer(body: dict[str, Any], state: State) -> Reply | None:
    if _limit(body) < 256:
        said = (
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 256, but got "
        )
        return Reply(400, error(said + f"{_limit(body)} instead.", param="max_tokens"))
    return None


def longest_answer(body: dict[str, Any], state: State) -> Reply | None:
    if _limit(body) > 100:
        said = (
            f"max_tokens is too large: {_limit(body)}. This model supports at most 100 completion "
        )
        return Reply(400, error(said + "tokens.", param="max_tokens"))
    return None


def no_schema(body: dict[str, Any], state: State) -> Reply | None:
    if "response_format" in body:
        said = "Invalid value: 'json_schema' is not supported by this model; use 'text'"
        return Reply(400, error(said, type="invalid_request_error"))
    return None


def no_system_turn(body: dict[str, Any], state: State) -> Reply | None:
    if body["messages"][0]["role"] == "system":
        return Reply(400, {"object": "error", "message": "System role not supported", "code": 400})
    return None


# Too many calls, and overload.


def _window(state: State, n: int, seconds: float) -> float:
    """Seconds until the next call is allowed, at most n in each window; 0: it is now."""
    if time.time() - state.began >= seconds:
        state.began, state.n_in_window = time.time(), 0
    state.n_in_window += 1
    return 0.0 if state.n_in_window <= n else state.began + seconds - time.time()


def reset_moment(body: dict[str, Any], state: State) -> Reply | None:
    if left := _window(state, 12, 0.5):
        moment = str(int((time.time() + left) * 1000))
        headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": moment}
        return Reply(429, error("Rate limit exceeded: free-models-per-min", code=429), headers)
    return None


def reset_by_kind(body: dict[str, Any], state: State) -> Reply | None:
    if left := _window(state, 9, 0.4):
        headers = {
            "x-ratelimit-remaining-requests": "0", "x-ratelimit-remaining-tokens": "4000",
            "x-ratelimit-reset-requests": f"{int(1000 * left) + 1}ms",
            "x-ratelimit-reset-tokens": "6h0m0s",
        }  # fmt: skip
        return Reply(429, error("Rate limit reached", code="rate_limit_exceeded"), headers)
    return None


def date_to_wait_for(body: dict[str, Any], state: State) -> Reply | None:
    if state.n == 5:
        when = formatdate(time.time() + 1, usegmt=True)
        return Reply(429, {"message": "API rate limit exceeded"}, {"Retry-After": when})
    return None


def said_in_words(body: dict[str, Any], state: State) -> Reply | None:
    if left := _window(state, 8, 0.4):
        said = f"Rate limit reached for m. Please try again in {int(1000 * left) + 1}ms."
        return Reply(429, error(said, code="rate_limit_exceeded"))
    return None


def said_in_details(body: dict[str, Any], state: State) -> Reply | None:
    if left := _window(state, 8, 0.4):
        details = [
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{left:.3f}s"}
        ]
        inner = {"code": 429, "message": "Quota exceeded", "status": "RESOURCE_EXHAUSTED"}
        return Reply(429, [{"error": inner | {"details": details}}])
    return None


def never_says_when(body: dict[str, Any], state: State) -> Reply | None:
    return Reply(429, error("slow down")) if _window(state, 10, 0.5) else None


def loading(body: dict[str, Any], state: State) -> Reply | None:
    busy = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
    return Reply(503, {"error": busy}) if time.time() - state.began < 0.6 else None


def overloaded(body: dict[str, Any], state: State) -> Reply | None:
    busy = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    return Reply(529, busy) if 4 < state.n < 9 else None


# Thoughts before the answer.


def thinks_first(body: dict[str, Any], state: State) -> Reply | None:
    if _limit(body) < 620:
        return Reply(200, completion(None, "length", completion_tokens=_limit(body)))
    return None


def thinks_in_parts(body: dict[str, Any], state: State) -> Reply | None:
    thoughts = {"type": "thinking", "thinking": [{"type": "text", "text": "LABEL: a draft [0]"}]}
    if _limit(body) < 900:
        return Reply(200, completion([thoughts], "model_length"))
    return _answer(body, [thoughts, {"type": "text", "text": text_of(body)}])


def cut_without_saying(body: dict[str, Any], state: State) -> Reply | None:
    if _limit(body) < 400:
        return _answer(body, "LABEL: the word topi", completion_tokens=_limit(body))
    return None


def open_thoughts(body: dict[str, Any], state: State) -> Reply | None:
    draft = "Maybe\nLABEL: a draft\nor [0, 0, 0, 0], no.\n</think>\n\n"
    return _answer(body, draft + text_of(body))


def tagged_thoughts(body: dict[str, Any], state: State) -> Reply | None:
    draft = "<think>LABEL: one draft</think>Hm.<think>LABEL: another [1, 1]</think>"
    return _answer(body, draft + text_of(body))


def channels(body: dict[str, Any], state: State) -> Reply | None:
    draft = "<|channel|>analysis<|message|>LABEL: a draft<|end|><|start|>assistant"
    return _answer(body, f"{draft}<|channel|>final<|message|>{text_of(body)}")


def endless_thoughts(body: dict[str, Any], state: State) -> Reply | None:
    return _answer(body, "<think>\nLABEL: a draft\n[1, 1, 1, 1, 1, 1, 1, 1]\nOr rather")


# Errors inside answers, and bodies that are none.


def busy_inside(body: dict[str, Any], state: State) -> Reply | None:
    return Reply(200, error("Rate limit exceeded", code=429)) if state.n in (3, 4) else None


def failed_inside(body: dict[str, Any], state: State) -> Reply | None:
    return Reply(200, {"error": "upstream connect error"}) if state.n % 5 == 2 else None


def failed_choice(body: dict[str, Any], state: State) -> Reply | None:
    if state.n % 5 == 2:
        inner = {"code": 502, "message": "Provider disconnected"}
        return Reply(200, {"choices": [{"error": inner, "finish_reason": "error"}]})
    return None


def brackets(body: dict[str, Any], state: State) -> Reply | None:
    return Reply(200, b"[" * 100_000) if state.n % 5 == 2 else None


def huge_bodies(body: dict[str, Any], state: State) -> Reply | None:
    return Reply(200, b" " * 5_000_000) if state.n % 7 == 2 else None


# Prompts that do not fit.


def _size(body: Mapping[str, Any]) -> int:
    return sum(len(message["content"]) for message in body["messages"]) // 4


def small_context(body: dict[str, Any], state: State) -> Reply | None:
    size = _size(body) + _limit(body)
    if size > 310:
        said = "This model's maximum context length is 310 tokens. However, you requested "
        return Reply(400, error(f"{said}{size} tokens.", code="context_length_exceeded"))
    return None


def small_slot(body: dict[str, Any], state: State) -> Reply | None:
    if _size(body) > 200:
        said = f"request ({_size(body)} tokens) exceeds the available context size (200 tokens)"
        inner = {"code": 400, "message": said, "type": "exceed_context_size_error", "n_ctx": 200}
        return Reply(400, {"error": inner})
    return None


def small_sum(body: dict[str, Any], state: State) -> Reply | None:
    if _size(body) + _limit(body) > 310:
        said = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 310. Given: "
        said += f"{_size(body)} `inputs` tokens and {_limit(body)} `max_new_tokens`"
        return Reply(422, {"error": said, "error_type": "validation"})
    return None


def large_payload(body: dict[str, Any], state: State) -> Reply | None:
    return Reply(413, b"<html>Request Entity Too Large</html>") if _size(body) > 200 else None


# Forms of an answer.


def fenced_json(body: dict[str, Any], state: State) -> Reply | None:
    text = text_of(body)
    if text.startswith("LABEL"):
        text = json.dumps({"label": text.removeprefix("LABEL: ")})
    return _answer(body, f"```json\n{text}\n```")


def full_width(body: dict[str, Any], state: State) -> Reply | None:
    return _answer(body, text_of(body).replace(": ", "\uff1a").replace(", ", "\uff0c"))


def next_line(body: dict[str, Any], state: State) -> Reply | None:
    return _answer(body, "- **" + text_of(body).replace("LABEL: ", "LABEL:**\n\n"))


def schema_alone(body: dict[str, Any], state: State) -> Reply | None:
    """A server that holds answers to the schema, and writes nothing else."""
    schema = body["response_format"]["json_schema"]["schema"]
    name, text = schema["required"][0], text_of(body)
    value = text.removeprefix("LABEL: ") if name == "label" else json.loads(text)
    if name == "numbers":
        assert schema["properties"][name]["minItems"] == len(value)
    return _answer(body, json.dumps({name: value}))


# Bills.


def bills_thoughts(body: dict[str, Any], state: State) -> Reply | None:
    return _answer(body, text_of(body), completion_tokens=3000)


def bills_in_total(body: dict[str, Any], state: State) -> Reply | None:
    return _answer(body, text_of(body), total_tokens=3050)


def bills_prompts(body: dict[str, Any], state: State) -> Reply | None:
    return _answer(body, text_of(body), prompt_tokens=3000)


# Scoring that is refused.


def _is_label(body: Mapping[str, Any]) -> bool:
    return "LABEL" in body["messages"][0]["content"]


def filtered_scores(body: dict[str, Any], state: State) -> Reply | None:
    said = "Prompt was flagged by the content filter of the deployment"
    return None if _is_label(body) else Reply(400, error(said, code="content_filter"))


def invalid_scores(body: dict[str, Any], state: State) -> Reply | None:
    said = [
        {"loc": ["body", "messages", 0], "msg": "messages must alternate", "type": "value_error"}
    ]
    return None if _is_label(body) else Reply(422, {"detail": said})


def scores_refused_inside(body: dict[str, Any], state: State) -> Reply | None:
    said = error("messages: at least one turn is required", code=400)
    return None if _is_label(body) else Reply(200, said)


ALL_RIGHT: dict[str, tuple[Behaviour, dict[str, Any]]] = {
    "b01 a reasoning model": (reasoning_model, {}),
    "b01 a strict gateway": (strict_gateway, {}),
    "b01 a terse gateway": (terse_gateway, {}),
    "b01 a terse gateway that refuses two fields": (terse_and_fussy, {}),
    "b01 a server of before max_completion_tokens": (
        old_server, {"length_field": "max_completion_tokens"},
    ),
    "b01 a least length": (shortest_answer, {}),
    "b01 a largest length": (longest_answer, {}),
    "b01 no schema": (no_schema, {"kind": "vllm"}),
    "b01 no system turn": (no_system_turn, {"kind": "vllm"}),
    "b02 a reset in milliseconds": (reset_moment, {}),
    "b02 resets by kind": (reset_by_kind, {}),
    "b02 a date": (date_to_wait_for, {}),
    "b02 words": (said_in_words, {}),
    "b02 details": (said_in_details, {}),
    "b02 nothing said": (never_says_when, {"backoff_s": 0.02}),
    "b02 a model that loads": (loading, {"kind": "llama.cpp", "backoff_s": 0.01}),
    "b02 overload": (overloaded, {"backoff_s": 0.01}),
    "b04 thoughts come first": (thinks_first, {}),
    "b04 thoughts in parts": (thinks_in_parts, {}),
    "b04 cut without saying so": (cut_without_saying, {}),
    "b05 thoughts without a begin": (open_thoughts, {}),
    "b05 thoughts twice": (tagged_thoughts, {}),
    "b05 channels": (channels, {}),
    "b06 busy inside an answer": (busy_inside, {"backoff_s": 0.01}),
    "b06 failed inside an answer": (failed_inside, {}),
    "b06 failed inside a choice": (failed_choice, {}),
    "b06 brackets": (brackets, {}),
    "b06 huge bodies": (huge_bodies, {}),
    "b07 a small context": (small_context, {}),
    "b07 a small slot": (small_slot, {"kind": "llama.cpp"}),
    "b07 a small sum": (small_sum, {}),
    "b07 a large payload": (large_payload, {}),
    "b08 fenced JSON": (fenced_json, {}),
    "b08 full-width signs": (full_width, {}),
    "b08 a bullet and the next line": (next_line, {}),
    "vLLM by its schema": (schema_alone, {"kind": "vllm"}),
    "llama.cpp by its schema": (schema_alone, {"kind": "llama.cpp"}),
    "Ollama by its schema": (schema_alone, {"kind": "ollama"}),
}  # fmt: skip
"""Services that serve well once one knows how: behaviour, and settings of llm."""

BILLS = {
    "b22 thoughts": bills_thoughts,
    "b22 thoughts in the total alone": bills_in_total,
    "b22 prompts": bills_prompts,
}
"""Services that bill more than was asked for."""

SCORES_REFUSED = {
    "b27 a filter": (filtered_scores, "flagged by the content filter"),
    "b27 a strict schema": (invalid_scores, "messages must alternate"),
    "b27 a refusal inside an answer": (scores_refused_inside, "at least one turn"),
}
"""Services that label and refuse every question of a scorer, and their words."""

"""Labels from each service of the table: all of them, their true reasons, what was billed."""

import asyncio
import dataclasses
import json

import pytest

from sae.explain.config import LLMConfig
from sae.explain.explainers import LLMExplainer
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import EndpointError, wanted_wait
from sae.explain.llm.openai_client import OpenAIClient
from sae.explain.llm.store import AnswerCache
from sae.explain.pipeline import ExplainPlan, explain_all
from sae.explain.question_scorers import Detection
from sae.explain.results import summarise
from tests.sae.explain.llm.services import (
    ALL_RIGHT,
    BILLS,
    SCORES_REFUSED,
    Reply,
    error,
    reasoning_model,
    small_context,
    writes,
)

PLAN = ExplainPlan(LLMExplainer(n_windows=8), (Detection(8),), min_windows=2, n_controls=0)


def label(latents, url, path=None, plan=PLAN, **settings):
    """Label through a fresh client, and the store at `path`."""
    quick = {"timeout_s": 20.0, "backoff_s": 0.005, "api_key": "none", **settings}
    config = LLMConfig(model="m", base_url=url, **quick)

    async def run():
        cache = None if path is None else AnswerCache(path)
        client = OpenAIClient(config)
        caller = Caller(client, config, cache)
        try:
            result = await explain_all(latents, plan, caller)
            return result, caller, summarise(result, caller)
        finally:
            await client.close()
            if cache is not None:
                cache.close()

    return asyncio.run(run())


@pytest.mark.parametrize("name", ALL_RIGHT)
def test_every_latent_is_labelled_and_scored(name, serve, latent_of, topic_of):
    behaviour, settings = ALL_RIGHT[name]
    latents = [latent_of(number, n=16) for number in range(7)]
    with serve(behaviour=behaviour) as endpoint:
        result, caller, summary = label(latents, endpoint.url, **settings)
    assert [f.status for f in result] == ["done"] * 7
    assert [f.explanation.text for f in result] == [f"the word {topic_of(n)}" for n in range(7)]
    assert [f.scores[0].value for f in result] == [1.0] * 7
    assert [f.scores[0].n_failed for f in result] == [0] * 7
    assert summary["questions_lost"] == {}
    assert summary["n_open"] == 0
    assert caller.budget.spent.requests == endpoint.state.n
    if name.startswith("b01"):  # learned once, by one call for each change
        assert 0 < caller.failures["adapted"] == len(caller.form.notes) <= 4
        assert len(summary["first_words"]) == len(caller.form.notes)
    if name.startswith("b07"):
        assert summary["outcomes"]["shortened"] > 0
        assert all(f.outcomes["shortened"] > 0 for f in result)


@pytest.mark.parametrize("name", BILLS)
def test_bills_beyond_what_was_asked_for_stay_within_one_answer(name, serve, latent_of, tmp_path):
    latents = [latent_of(number, n=16) for number in range(20)]
    with serve(behaviour=BILLS[name]) as endpoint:
        for _ in range(3):  # the next process goes on counting, and knows what is billed
            _, caller, summary = label(
                latents, endpoint.url, tmp_path / "a.sqlite", max_tokens=20_000
            )
    total, _ = Caller(
        caller.client, caller.config, AnswerCache(tmp_path / "a.sqlite")
    ).budget.ledger.total()
    assert 14_000 < total.tokens <= 20_000 + 3_050
    assert total.requests == endpoint.state.n <= 7
    assert summary["cost"]["all_runs"]["tokens"] == total.tokens
    assert summary["failed_by_reason"]["budget"] > 10


@pytest.mark.parametrize("name", SCORES_REFUSED)
def test_refused_scores_say_why_and_stop_the_run(name, serve, latent_of):
    behaviour, words = SCORES_REFUSED[name]
    with serve(behaviour=behaviour) as endpoint:
        result, caller, summary = label([latent_of(n, n=16) for n in range(2)], endpoint.url)
        assert [f.status for f in result] == ["done"] * 2
        for f in result:
            assert words in f.scores[0].reason
            assert f.scores[0].lost == f.lost == {"request": f.outcomes["request"]}
        assert words in summary["first_words"]["request"]
        assert summary["questions_lost"] == {"request": sum(f.lost["request"] for f in result)}
        assert caller.failures["request"] == summary["questions_lost"]["request"]
        with pytest.raises(
            EndpointError, match="got 10 equal refusals from the first on: 4"
        ) as stop:
            label([latent_of(n, n=16) for n in range(40)], endpoint.url)
    assert words in str(stop.value)
    assert "\n" not in str(stop.value)


def test_thoughts_without_an_end_are_no_answer(serve, latent_of):
    with serve(
        behaviour=writes(lambda text: f"<think>\nLABEL: a draft\n[1, 1]\n{text}")
    ) as endpoint:
        result, _, summary = label([latent_of(1)], endpoint.url)
    assert (result[0].status, result[0].explanation) == ("failed", None)
    assert result[0].lost == {"parse": 1}
    assert summary["outcomes"] == {"parse": 3}


def test_what_a_service_refuses_is_known_to_the_next_process(serve, latent_of, tmp_path):
    path = tmp_path / "a.sqlite"
    with serve(behaviour=reasoning_model) as endpoint:
        _, first, _ = label([latent_of(1)], endpoint.url, path)
        before = endpoint.state.n
        _, second, _ = label([latent_of(1), latent_of(2)], endpoint.url, path)
    assert (first.failures["adapted"], second.failures["adapted"]) == (2, 0)
    assert endpoint.state.n - before == second.budget.spent.requests == 4  # those of latent 2
    assert all(
        "max_tokens" not in body and "temperature" not in body for body in endpoint.state.seen[2:]
    )


def test_settings_that_no_preset_has(serve, latent_of):
    with serve() as endpoint:
        label(
            [latent_of(1)], endpoint.url, answer_tokens=4000, reasoning_effort="low",
            leave_out=("seed",), extra_body={"chat_template_kwargs": {"enable_thinking": False}},
            response_format="json_schema", length_field="max_completion_tokens",
        )  # fmt: skip
    body = endpoint.state.seen[0]
    assert set(body) == {
        "model", "messages", "temperature", "max_completion_tokens", "reasoning_effort",
        "response_format", "chat_template_kwargs",
    }  # fmt: skip
    assert body["max_completion_tokens"] == 4000
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["label"]


def test_a_question_that_fits_in_no_form_is_lost_for_that_reason(serve, latent_of):
    def tiny_context(body, state):
        return Reply(400, error("the prompt is too long: maximum context length is 3 tokens"))

    with serve(behaviour=tiny_context) as endpoint:
        result, _, summary = label([latent_of(n) for n in range(3)], endpoint.url)
    assert {f.status for f in result} == {"failed"}
    assert summary["failed_by_reason"] == {"context": 3}
    assert result[0].reason.startswith("context: 400: the prompt is too long")


def test_replay_repeats_shortened_and_refused_questions(serve, latent_of, tmp_path):
    def filters(body, state):
        if "topicc" in body["messages"][-1]["content"]:
            return Reply(400, error("flagged as unsafe", code="content_filter"))
        return small_context(body, state)

    latents, path = [latent_of(n, n=16) for n in range(4)], tmp_path / "a.sqlite"
    with serve(behaviour=filters) as endpoint:
        first, _, _ = label(latents, endpoint.url, path)
        config = LLMConfig(model="m", base_url=endpoint.url, api_key="none", cache_mode="replay")
        before = endpoint.state.n
        cache = AnswerCache(path, replay=True)
        again = asyncio.run(explain_all(latents, PLAN, Caller(OpenAIClient(config), config, cache)))
        cache.close()
    assert [f.status for f in first] == ["done", "done", "failed", "done"]
    assert [json.dumps(dataclasses.asdict(f)) for f in again] == [
        json.dumps(dataclasses.asdict(f)) for f in first
    ]
    assert endpoint.state.n == before


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(429, error("no"), {"retry-after": "7200"}), "got a wait of 7,200 s: 429: no"),
        (Reply(429, error("busy")), "must be free after 2 waits, .* the last: rate: 429: busy"),
        (Reply(429, error("pay", code="insufficient_quota")), "must serve this key and model"),
        (Reply(200, error("No credit", code=402)), "key and model, got 402: No credit"),
        (Reply(404, error("model 'm' not found")), "got 404: model 'm' not found"),
    ],
)  # fmt: skip
def test_what_waiting_does_not_help_stops_in_one_line(reply, message, serve, latent_of):
    with serve(behaviour=lambda body, state: reply) as endpoint:
        with pytest.raises(EndpointError, match=message) as stop:
            label([latent_of(n) for n in range(9)], endpoint.url, retries=2)
        assert endpoint.state.n <= 3
    assert "\n" not in str(stop.value)


def test_a_wait_is_shown(serve, latent_of):
    def busy_once(body, state):
        return Reply(429, error("too many"), {"retry-after-ms": "200"}) if state.n == 2 else None

    shown = []
    latents = [latent_of(n) for n in range(3)]
    with serve(behaviour=busy_once) as endpoint:
        config = LLMConfig(model="m", base_url=endpoint.url, api_key="none", backoff_s=0.001)
        caller = Caller(OpenAIClient(config), config)
        report = lambda done, total, unit: shown.append(unit)  # noqa: E731
        asyncio.run(explain_all(latents, PLAN, caller, report))
    waits = [unit for unit in shown if "waiting 0 s, the service is busy: 429: too many" in unit]
    assert waits
    assert waits[0].startswith("latents explained · ")


@pytest.mark.parametrize(
    ("headers", "words", "seconds"),
    [
        ({"retry-after": "5"}, "", 5.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, "", 1.5),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, "", 30.0),
        ({"x-ratelimit-reset": "1700000020000"}, "", 20.0),
        ({"x-ratelimit-reset": "1700000007"}, "", 7.0),
        (
            {
                "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0.5s",
                "x-ratelimit-reset-tokens": "9h",
            },
            "", 360.5,
        ),
        ({"anthropic-ratelimit-tokens-reset": "2023-11-14T22:13:30Z"}, "", 10.0),
        ({}, "Please try again in 1m12.5s.", 72.5),
        ({}, "Please retry after 20 seconds.", 20.0),
        ({}, "Please wait 2 minutes before", 120.0),
        ({}, '"retryDelay": "34s"', 34.0),
        ({"retry-after": "Tue, 14 Nov 2000 22:13:50 GMT"}, "", 0.0),
        ({"retry-after": "soon"}, "slow down, 3 of 5 calls", None),
        ({"retry-after": "nan"}, "", None),
    ],
)  # fmt: skip
def test_how_long_a_service_asks_to_wait(headers, words, seconds):
    assert wanted_wait(headers, words, now=1_700_000_000.0) == seconds

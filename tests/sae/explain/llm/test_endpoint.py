"""Labels through an endpoint that fails: none lost, none twice, none made up, money kept."""

import asyncio
import contextlib
import json
import logging
import re
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from sae.explain.config import LLMConfig
from sae.explain.explainers import LLMExplainer
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import EndpointError
from sae.explain.llm.openai_client import OpenAIClient
from sae.explain.llm.store import AnswerCache
from sae.explain.pipeline import ExplainPlan, explain_all

_log = logging.getLogger(__name__)
KEY = "sk-canary-123456789"
PLAN = ExplainPlan(LLMExplainer(n_windows=3), (), min_windows=2, n_controls=0)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def label_of(system: str, user: str) -> str:
    """The one word that all shown texts mark: the right label, recognisable in the journal."""
    return f"LABEL: the word {re.search('<< ?(topic[a-z]+)>>', user)[1]}"


def config_for(endpoint, **more) -> LLMConfig:
    settings = {"timeout_s": 0.5, "retries": 20, "attempts": 9, "backoff_s": 0.01, **more}
    return LLMConfig(model="planted", base_url=endpoint.url, give_up_after=40, **settings)


def label(latents, config, path):
    """Label through a fresh client and the cache at `path`."""

    async def run():
        cache, client = AnswerCache(path), OpenAIClient(config)
        caller = Caller(client, config, cache)
        try:
            return await explain_all(latents, PLAN, caller), caller
        finally:
            cache.close()
            await client.close()

    return asyncio.run(run())


def test_under_faults_every_latent_gets_its_own_label(serve, latent_of, topic_of, tmp_path):
    latents = [latent_of(number) for number in range(41)]
    with serve(rate=0.47, answer=label_of) as endpoint:
        result, caller = label(latents, config_for(endpoint), tmp_path / "llm.sqlite")
    assert [f.status for f in result] == ["done"] * 41
    assert [f.explanation.text for f in result] == [f"the word {topic_of(n)}" for n in range(41)]
    assert endpoint.n_calls <= 1.2 * 41 / 0.53 + 8  # 8 in flight
    assert sorted(endpoint.answered) == sorted(f"LABEL: the word {topic_of(n)}" for n in range(41))
    n_failed = sum(caller.failures.values())  # some fail before the endpoint sees them
    assert endpoint.n_calls - 41 <= n_failed <= endpoint.n_calls - 41 + 5
    assert endpoint.n_calls <= caller.budget.spent.requests <= endpoint.n_calls + 5
    assert endpoint.keys == {f"Bearer {KEY}"}


WORKER = """
import asyncio, json, sys
from sae.explain.explainers import LLMExplainer
from sae.explain.llm.store import AnswerCache
from sae.explain.llm.caller import Caller
from sae.explain.config import LLMConfig
from sae.explain.llm.openai_client import OpenAIClient
from sae.explain.pipeline import ExplainPlan, explain_all
from sae.explain.windows import LatentWindows, Window

url, path, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
def window(i, word):
    return Window(i, 0, (" a", word, " b"), (0.0, 1.0, 0.0), "active", 0)
latents = [
    LatentWindows(i, 1.0, 0.1, *(tuple(window(j, f" topic{chr(97 + i // 26)}{chr(97 + i % 26)}")
    for j in range(3)) for _ in range(2))) for i in range(n)
]
config = LLMConfig(model="m", base_url=url, timeout_s=1.0, retries=20, attempts=9,
                   backoff_s=0.01, give_up_after=40, **json.loads(sys.argv[4]))
async def run():
    caller = Caller(OpenAIClient(config), config, AnswerCache(__import__("pathlib").Path(path)))
    return await explain_all(latents, ExplainPlan(LLMExplainer(), (), 2, 0), caller)
results = asyncio.run(run())
print(json.dumps([[f.status, f.explanation and f.explanation.text, f.reason] for f in results]))
"""


def stored_questions(path) -> set[tuple[str, int]]:
    """Text and seed of every question whose answer reached the store."""
    with contextlib.closing(sqlite3.connect(path)) as file:
        asked = [json.loads(row[0]) for row in file.execute("SELECT question FROM answers")]
    return {(one["messages"][-1]["content"], one["seed"]) for one in asked}


def killed(endpoint, path, n, n_kills, repository, after, **limits) -> list[list]:
    """Label n latents in a process that is killed again and again, then left alone.

    `after` says how many calls of the endpoint, or answers in the store, each kill waits for.
    """
    arguments = [endpoint.url, str(path), str(n), json.dumps(limits)]
    command = [sys.executable, "-c", WORKER, *arguments]
    for kill in range(1, n_kills + 1):
        process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while not after(kill):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        time.sleep(0.05)  # what the kernel still held has arrived
        stored, n_seen = stored_questions(path), len(endpoint.state.seen)
        endpoint.at_kill.append((stored, n_seen))
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("n", "n_kills"),
    [(23, 1), pytest.param(400, 5, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
def test_killed_runs_go_on_where_they_were(n, n_kills, serve, tmp_path, repository, figure):
    names = [f"the word topic{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(n)]
    path, cap = tmp_path / "llm.sqlite", 4 * n
    with serve(rate=0.47, answer=label_of, stall=2.0) as endpoint:
        result = killed(
            endpoint, path, n, n_kills, repository,
            lambda kill: len(endpoint.answered) >= kill * n // (n_kills + 2), max_requests=cap,
        )  # fmt: skip
    assert result == [["done", name, ""] for name in names]  # none lost or made up
    assert endpoint.n_calls <= 1.2 * n / 0.53 + 8 * (n_kills + 1)
    twice = len(endpoint.answered) - len(set(endpoint.answered))
    again = [
        (body["messages"][-1]["content"], body["seed"])
        for stored, n_seen in endpoint.at_kill
        for body in endpoint.state.seen[n_seen:]
        if (body["messages"][-1]["content"], body["seed"]) in stored
    ]
    assert again == []  # no answer in the store was asked for again
    with contextlib.closing(AnswerCache(path)) as store:
        assert len(store) >= n
        total = store.ledger.total()[0].requests
        settled = store.ledger._file.execute("SELECT requests FROM spent").fetchone()[0]
    cut_off = total - settled
    _log.info(
        "%d of %d latents, %d kills, %d calls, %d reserved, %d cut off, %d answers twice, "
        "%d stored ones asked again",
        n, n, n_kills, endpoint.n_calls, total, cut_off, twice, len(again),
    )  # fmt: skip
    assert cut_off <= 8 * n_kills  # only what was under way when the run was killed
    assert twice <= 8 * n_kills
    assert endpoint.n_calls <= total <= cap  # every call was reserved before it was sent
    figure(
        "L1",
        f"47 % faults, {n_kills} kill -9: {n} of {n} labels, 0 made up, {endpoint.n_calls} calls",
    )


@pytest.mark.parametrize(
    ("limit", "largest"),
    [
        ({"max_requests": 60}, 60),
        pytest.param({"max_tokens": 6000}, 6000 + 8 * 100, marks=pytest.mark.long),
        pytest.param(
            {"max_usd": 0.06, "usd_per_million_input": 10.0},
            0.06 + 8 * 0.0009,
            marks=pytest.mark.long,
        ),
    ],
)
def test_limits_hold_over_kills_and_restarts(limit, largest, serve, tmp_path, repository, figure):
    path = tmp_path / "llm.sqlite"
    with serve(rate=0.3, answer=label_of, stall=2.0) as endpoint:
        result = killed(
            endpoint, path, 150, 1, repository, lambda kill: endpoint.n_calls >= 20, **limit
        )
        before = endpoint.n_calls
        again = killed(endpoint, path, 150, 0, repository, None, **limit)
    assert endpoint.n_calls == before  # a new process has no new budget
    assert again == result
    statuses = [status for status, *_ in result]
    assert 10 < statuses.count("done") < 80
    name = next(iter(limit))
    assert {reason.split("=")[0] for *_, reason in result if reason} == {f"budget: {name}"}
    billed = len(endpoint.answered) * 100
    spent = {
        "max_requests": endpoint.n_calls, "max_tokens": billed, "max_usd": billed * 0.9 * 1e-5
    }[name]  # fmt: skip
    assert spent <= largest
    figure("L3", f"{name}={limit[name]} over a kill and a restart: {spent:.4g} was spent")


@pytest.mark.parametrize("mode", ["401", "402", "403"])
def test_no_service_stops_at_once_and_never_shows_the_key(mode, serve, latent_of, tmp_path):
    began = time.monotonic()
    with serve(mode=mode) as endpoint, pytest.raises(EndpointError) as error:
        label([latent_of(n) for n in range(13)], config_for(endpoint), tmp_path / "llm.sqlite")
    assert time.monotonic() - began < 5
    assert f"must serve this key and model, got {mode}" in str(error.value)
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)
    assert endpoint.n_calls <= 8
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes()


@pytest.mark.parametrize(("mode", "concurrency"), [("500", 1), ("reset", 8)])
def test_an_endpoint_that_only_fails_stops_the_run(mode, concurrency, serve, latent_of, tmp_path):
    began = time.monotonic()
    with serve(mode=mode) as endpoint:
        config = config_for(endpoint, retries=6, concurrency=concurrency)
        with pytest.raises(EndpointError, match="failed calls in a row"):
            label([latent_of(n) for n in range(13)], config, tmp_path / "llm.sqlite")
    assert time.monotonic() - began < 10


def test_an_endpoint_that_is_down_is_one_line(latent_of, tmp_path):
    config = LLMConfig(
        model="m", base_url="http://127.0.0.1:9/v1", backoff_s=0.001, retries=2, timeout_s=1.0
    )
    with pytest.raises(EndpointError, match=r"http://127.0.0.1:9/v1 m must answer, got \d+ failed"):
        label([latent_of(1)], config, tmp_path / "llm.sqlite")


def test_without_a_key_one_line_says_how_to_go_on(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match="must have OPENAI_API_KEY, got none; set it"):
        OpenAIClient(LLMConfig(model="m"))
    assert OpenAIClient(LLMConfig(model="m", api_key="none")).name.endswith(" m")


@pytest.mark.parametrize(
    ("limit", "most_calls"),
    [
        ({"max_requests": 7}, 7),
        ({"max_requests": 0}, 0),
        ({"max_tokens": 2000}, 20),  # the endpoint counts 100 tokens a call
        ({"max_usd": 0.002, "usd_per_million_input": 20.0}, 3),  # 90 tokens are 0.0018 $
        ({"max_usd": 0.0, "usd_per_million_output": 1.0}, 0),
    ],
)
def test_the_budget_is_never_exceeded(limit, most_calls, serve, latent_of, tmp_path):
    latents = [latent_of(number) for number in range(29)]
    with serve(answer=label_of) as endpoint:
        config = config_for(endpoint, timeout_s=60.0, **limit)  # nothing stalls here
        result, caller = label(latents, config, tmp_path / "llm.sqlite")
    assert endpoint.n_calls <= most_calls
    spent = caller.budget.spent
    assert spent.requests == endpoint.n_calls
    assert spent.tokens <= (config.max_tokens or 10**9)
    assert spent.usd(config) <= (1e9 if config.max_usd is None else config.max_usd)
    not_done = [f for f in result if f.status == "failed"]
    assert len(not_done) == 29 - endpoint.n_calls
    assert all("budget: " + next(iter(limit)) in f.reason for f in not_done)


def test_a_refusing_model_is_counted_and_labels_nothing(serve, latent_of, tmp_path):
    with serve(mode="refusal") as endpoint:
        result, caller = label(
            [latent_of(n) for n in range(5)],
            config_for(endpoint, attempts=2),
            tmp_path / "l.sqlite",
        )
    assert {f.status for f in result} == {"failed"}
    assert {f.explanation for f in result} == {None}
    assert result[0].reason == "refusal: the model refused"
    assert caller.failures == {"refusal": 10}

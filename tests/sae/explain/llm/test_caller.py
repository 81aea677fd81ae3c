"""The caller: cache, replay, pauses, limits; the readers; the configuration."""

import asyncio
import contextlib
import json
import sqlite3
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.explain.config import LLMConfig
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import (
    CallFailedError,
    ConstantClient,
    EndpointError,
    Message,
    ReplayMissError,
    Request,
    Response,
    UnavailableError,
    canonical,
    key_of,
)
from sae.explain.llm.corpus_text import read_label, read_numbers, read_texts
from sae.explain.llm.store import AnswerCache
from tests.clients import ScriptedClient

QUESTION = Request(prompt="t/1", messages=(Message("user", "Häh?"),), max_tokens=7)
CONFIG = LLMConfig(model="m", retries=3, attempts=2)


def ask(client, config=CONFIG, cache=None, read=str, pauses=None):
    async def sleep(seconds):
        (pauses if pauses is not None else []).append(seconds)

    caller = Caller(client, config, cache, sleep=sleep)
    return asyncio.run(caller.ask(QUESTION, read)), caller


def test_an_answer_is_asked_for_once(tmp_path):
    cache, client = AnswerCache(tmp_path / "a.sqlite"), ScriptedClient(["one", "two"])
    assert ask(client, cache=cache)[0] == "one"
    answer, caller = ask(client, cache=cache)
    assert (answer, caller.n_cached, len(client.requests)) == ("one", 1, 1)
    assert caller.budget.spent.requests == 0


def test_replay_answers_from_the_file_alone(tmp_path):
    path = tmp_path / "a.sqlite"
    ask(ScriptedClient(["one"]), cache=AnswerCache(path))
    replaying = LLMConfig(model="m", cache_mode="replay")
    before = path.read_bytes()
    silent = ScriptedClient([AssertionError("must not be called")])
    assert ask(silent, replaying, AnswerCache(path, replay=True))[0] == "one"
    other = ScriptedClient([AssertionError("must not be called")], name="another model")
    with pytest.raises(ReplayMissError, match=r"got none for t/1 \(.*llm.cache_mode=read-write"):
        ask(other, replaying, AnswerCache(path, replay=True))
    assert path.read_bytes() == before


def test_a_missing_or_foreign_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a file to be replayed, got none"):
        AnswerCache(tmp_path / "none.sqlite", replay=True)
    (tmp_path / "text").write_text("this is no database, but it is long enough to be one" * 20)
    with pytest.raises(ValueError, match=r"must be a cache of answers .* name another llm.cache_"):
        AnswerCache(tmp_path / "text")


def test_answers_are_never_changed_or_deleted(tmp_path):
    path = tmp_path / "a.sqlite"
    cache = AnswerCache(path)
    question = canonical("c", QUESTION)
    cache.put(key_of(question), question, Response("one", "stop", 1, 2))
    cache.put(key_of(question), question, Response("two", "stop", 1, 2))
    assert cache.get(key_of(question)) == Response("one", "stop", 1, 2)
    raw = sqlite3.connect(path)
    for statement in ("UPDATE answers SET answer = ''", "DELETE FROM answers"):
        with pytest.raises(sqlite3.IntegrityError, match="answers are never"):
            raw.execute(statement)
    assert json.loads(raw.execute("SELECT question FROM answers").fetchone()[0])["client"] == "c"
    raw.close()


def test_the_key_depends_on_everything_that_is_asked():
    changed = [
        {"prompt": "t/2"}, {"messages": (Message("system", "Häh?"),)}, {"max_tokens": 8},
        {"temperature": 0.5}, {"seed": 1},
    ]  # fmt: skip
    fields = {"prompt": "t/1", "messages": QUESTION.messages, "max_tokens": 7}
    keys = {key_of(canonical("c", Request(**(fields | change)))) for change in changed}
    keys |= {key_of(canonical("c", QUESTION)), key_of(canonical("d", QUESTION))}
    assert len(keys) == 7


def test_unusable_answers_are_asked_again_and_stored(tmp_path):
    cache = AnswerCache(tmp_path / "a.sqlite")
    client = ScriptedClient(["nothing", "LABEL: cats"])
    answer, caller = ask(client, cache=cache, read=read_label)
    assert (answer, caller.failures) == ("cats", {"parse": 1})
    assert [request.seed for request in client.requests] == [0, 1]
    assert [request.temperature for request in client.requests] == [0.0, 0.7]
    assert ask(ScriptedClient([AssertionError()]), cache=cache, read=read_label)[0] == "cats"
    with pytest.raises(CallFailedError, match="parse: the answer must have a line LABEL"):
        ask(ScriptedClient(["nothing"]), read=read_label)


def test_pauses_double_and_honour_retry_after():
    down = UnavailableError("transport", "down")
    busy = UnavailableError("rate", "busy", retry_after=5.0)
    pauses: list[float] = []
    ask(ScriptedClient([down, down, busy, "one"]), pauses=pauses)
    assert 0.125 <= pauses[0] <= 0.375
    assert 0.25 <= pauses[1] <= 0.75
    assert 4.5 <= pauses[2] <= 5.0
    assert len(pauses) == 3
    long = UnavailableError("rate", "busy", retry_after=601.0)
    with pytest.raises(EndpointError, match="max_wait_s=600 s, got a wait of 601 s: busy; run the"):
        ask(ScriptedClient([long]))


def test_a_busy_service_is_waited_out_and_never_counts_as_down():
    busy, pauses = UnavailableError("rate", "busy"), []
    config = LLMConfig(model="m", retries=3, give_up_after=1)
    answer, caller = ask(ScriptedClient([busy] * 3 + ["one"]), config, pauses=pauses)
    assert (answer, caller.failures) == ("one", {"rate": 3})
    assert [round(pause) for pause in pauses] == [2, 4, 8]
    with pytest.raises(EndpointError, match="must be free after 3 waits, got no answer between"):
        ask(ScriptedClient([busy]), config)


def test_all_calls_wait_as_one_and_one_goes_first():
    class Limited(ConstantClient):
        n, under_way, largest = 0, 0, []

        async def complete(self, request):
            self.n += 1
            self.under_way += 1
            self.largest.append(self.under_way)
            number = self.n
            await asyncio.sleep(0.002)
            self.under_way -= 1
            if 10 <= number <= 17:  # all eight that are under way, and none after them
                raise UnavailableError("rate", "busy", retry_after=0.05)
            return await super().complete(request)

    client = Limited(1)
    caller = Caller(client, LLMConfig(model="m", concurrency=8, backoff_s=0.001))
    questions = [replace(QUESTION, prompt=f"t/{n}") for n in range(40)]

    async def all_of_them():
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(caller.ask(question, str) for question in questions))
        return asyncio.get_running_loop().time() - began

    assert 0.05 <= asyncio.run(all_of_them()) < 5
    assert caller.failures == {"rate": 8}
    assert (client.n, client.largest[0], max(client.largest)) == (48, 1, 8)
    assert client.largest[17] == 1  # the first after the wait


def test_a_cut_answer_is_asked_for_with_more_room_and_the_others_too():
    cut = Response("LABEL: hal", "length", 5, 7)

    class Cut(ScriptedClient):
        async def complete(self, request):
            response = await super().complete(request)
            return cut if request.max_tokens < 3000 else response

    client = Cut(["LABEL: half"])
    answer, caller = ask(client, LLMConfig(model="m"), read=read_label)
    assert (answer, caller.failures) == ("half", {"length": 2})
    assert [request.max_tokens for request in client.requests] == [7, 2048, 16384]
    assert caller.form.room == 16384
    with pytest.raises(CallFailedError, match="length: cut off after 7 tokens"):
        ask(client, LLMConfig(model="m", longest_answer=2500), read=read_label)


def test_calls_are_reserved_before_they_are_sent_and_counted_over_processes(tmp_path):
    path, config = tmp_path / "a.sqlite", LLMConfig(model="m", max_requests=3)

    class Killed(ConstantClient):
        async def complete(self, request):
            raise KeyboardInterrupt  # stands for kill -9: nothing is settled

    for _ in range(2):
        cache = AnswerCache(path)
        caller = Caller(Killed(), config, cache)
        caller.budget.lose = lambda *_, **__: None
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(caller.ask(QUESTION, str))
        cache.close()
    cache = AnswerCache(path)
    assert cache.ledger.total()[0].requests == 2
    assert ask(ScriptedClient(["one"]), config, cache)[0] == "one"
    with pytest.raises(CallFailedError, match="budget: max_requests=3 would be exceeded"):
        asyncio.run(Caller(ScriptedClient(["b"], name="b"), config, cache).ask(QUESTION, str))
    assert (
        ask(ScriptedClient([AssertionError()]), config, cache)[0] == "one"
    )  # stored ones are free


def test_a_limit_is_used_up_although_calls_under_way_hold_more_than_they_take():
    class Slow(ConstantClient):
        async def complete(self, request):
            await asyncio.sleep(0.001)
            return Response("yes", "stop", 2, 1)  # 3 tokens, where 10 + 7 are set aside

    caller = Caller(Slow(1), replace(CONFIG, concurrency=8, max_tokens=47))
    questions = [replace(QUESTION, seed=seed) for seed in range(20)]

    async def run():
        asked = [caller.ask(question, str) for question in questions]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(run())
    assert answers.count("yes") == 11  # 10 * 3 + 17 is the last to fit
    assert {str(a) for a in answers if a != "yes"} == {"budget: max_tokens=47 would be exceeded"}


def test_a_store_of_an_older_version_is_used(tmp_path):
    path = tmp_path / "a.sqlite"
    old = sqlite3.connect(path)
    old.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, question TEXT NOT NULL, "
                "answer TEXT NOT NULL, time REAL NOT NULL) STRICT")  # fmt: skip
    question = canonical("scripted", QUESTION)
    answer = '{"finish": "stop", "input_tokens": 1, "output_tokens": 2, "text": "old"}'
    old.execute("INSERT INTO answers VALUES (?, ?, ?, 0.0)", (key_of(question), question, answer))
    old.commit()
    old.close()
    silent = ScriptedClient([AssertionError("must not be called")])
    replaying = LLMConfig(model="m", cache_mode="replay")
    other = replace(QUESTION, prompt="other/1")
    with contextlib.closing(AnswerCache(path, replay=True)) as cache:
        assert ask(silent, replaying, cache)[0] == "old"
        with pytest.raises(ReplayMissError):
            asyncio.run(Caller(silent, replaying, cache).ask(other, str))
    assert ask(silent, cache=AnswerCache(path))[0] == "old"


def test_a_call_that_takes_too_long_has_failed():
    class Slow(ConstantClient):
        async def complete(self, request):
            await asyncio.sleep(60)

    config = LLMConfig(model="m", timeout_s=0.01, retries=1, backoff_s=0.0)
    with pytest.raises(
        OSError, match="got 2 failed calls in a row, the last: transport: no answer"
    ):
        ask(Slow(), config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": ""}, "model must name a model"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"attempts": 0}, "attempts must be at least 1"),
        ({"timeout_s": 0.0}, "timeout_s must be a positive number"),
        ({"max_usd": 1.0}, "max_usd must come with usd_per_million_input"),
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"stop_after_refusals": 0}, "stop_after_refusals must be at least 1"),
        ({"max_answer_bytes": 10}, "max_answer_bytes must be at least 1000"),
        ({"answer_tokens": 0}, "answer_tokens must be at least 1"),
        ({"batch_dir": "b", "kind": "local"}, "batch_dir must be absent for a model in this proce"),
        ({"base_url": "ftp://x"}, "base_url must be http"),
        ({"base_url": "http://me:secret@host/v1"}, "without a name, password or query"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        LLMConfig(**({"model": "m"} | wrong))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("LABEL: cats and dogs", "cats and dogs"),
        ("thinking...\n**LABEL:** *cats*", "cats"),
        ("[EXPLANATION]: cats", "cats"),
        ('label: "cats"\n', "cats"),
        ("LABEL: first\nLABEL: second", "second"),
        ("LABEL\uff1a cats", "cats"),
        ("**LABEL**: cats", "cats"),
        ("- LABEL: cats", "cats"),
        ("1. **LABEL:** cats", "cats"),
        ("\u2022 Label: cats", "cats"),
        ("### LABEL: cats", "cats"),
        ("> LABEL: cats", "cats"),
        ("`LABEL: cats`", "cats"),
        ('"LABEL: cats"', "cats"),
        ("LABEL:\n\n  cats", "cats"),
        ("**LABEL:**\n- cats", "cats"),
        ('{"LABEL": "cats"}', "cats"),
        ('Sure!\n```json\n{"label": "cats"}\n```', "cats"),
        ("```\nLABEL: cats\n```", "cats"),
        ("LABEL: draft\n</think>\nLABEL: cats", "cats"),
        ("<think>LABEL: a</think><think>LABEL: b</think>LABEL: cats", "cats"),
        ("[THINK]LABEL: a[/THINK]LABEL: cats", "cats"),
        ("LABEL: texts with <think> in them", "texts with <think> in them"),
        ("LABEL: a\u202eb\x07c", "a b c"),
        ("LABEL: " + "x" * 999, "x" * 299 + "…"),
    ],
)
def test_labels_are_read(text, label):
    assert read_label(text) == label


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cats",
        "LABEL:",
        "LABEL: none",
        "LABEL\n: cats",
        "LABEL: **",
        '{"label": 3}',
        "LABEL: draft</think>",
        "<think>\nLABEL: draft",
        "LABEL: a</think>I found none.",
        "<|channel|>analysis<|message|>LABEL: a",
        '{"label": "a"}</think>',
        "LABEL:\nLABEL:",
        "{" * 10_000 + '"label": "a"' + "}" * 10_000,
    ],
)
def test_what_is_no_label_is_a_parse_failure(text):
    with pytest.raises(CallFailedError, match=r"^parse: "):
        read_label(text)


def test_a_refusal_in_words_is_a_refusal():
    with pytest.raises(CallFailedError) as error:
        read_label("I'm sorry, but I can't help with that.")
    assert error.value.reason == "refusal"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[1, 0, 1]", [1, 0, 1]), ("So: [true,false, true].", [1, 0, 1]),
        ("[2] [0, 0, 1]", [0, 0, 1]), ('{"numbers": [1, 0, 1]}', [1, 0, 1]),
        ("\uff3b\uff11\uff0c\uff10\uff0c1\uff3d", [1, 0, 1]), ("```json\n[1,0,1]\n```", [1, 0, 1]),
        ("[1, 0, 1], so [1, 0, 1]", [1, 0, 1]), ("[0, 0, 0]</think>[1, 0, 1]", [1, 0, 1]),
        ("[1, 0, 1] or [0, 0, 1]", None), ("[1, 0, 1]</think>", None), ("<think>[1, 0, 1]", None),
        ("[1, 0]", None), ("[1, 0, 2]", None), ("[1, 0, NaN]", None), ("1, 0, 1", None),
        ("[1, 0, null]", None), ('["1", 0, 1]', None), ("[1e999, 0, 1]", None), ("[1, 0, 1", None),
    ],
)  # fmt: skip
def test_numbers_are_read_or_refused(text, numbers):
    if numbers is None:
        with pytest.raises(CallFailedError, match=r"must have (a list of 3|one)"):
            read_numbers(3, 0, 1)(text)
    else:
        assert read_numbers(3, 0, 1)(text) == numbers


GOOD = ["LABEL: cats", "[1, 0, 1]", '["a", "b"]', "[EXPLANATION]: x", "I'm sorry"]


def fuzz(text: str) -> None:
    for read in (read_label, read_numbers(3, 0, 10), read_texts(2)):
        try:
            result = read(text)
        except CallFailedError as error:
            result = error.reason
        assert result
        if result not in ("parse", "refusal"):
            assert isinstance(result, str | list)
            if isinstance(result, str):
                assert len(result) <= 300
                assert result.isprintable()


@settings(max_examples=60)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 20), st.text(max_size=5))))
def test_mutated_answers_are_read_or_fail_by_name(text, edits):
    for place, piece in edits:
        text = text[:place] + piece + text[place + len(piece) // 2 :]
    fuzz(text)
    fuzz(text * 50)
    fuzz("[" * 300 + text)


@pytest.mark.long
@settings(max_examples=10_000)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 20), st.text(max_size=5))))
def test_mutated_answers_at_length(text, edits):
    for place, piece in edits:
        text = text[:place] + piece + text[place + len(piece) // 2 :]
    fuzz(text)

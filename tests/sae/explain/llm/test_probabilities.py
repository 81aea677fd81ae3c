"""Levels of a simulation as expectations: endpoints with probabilities, without, odd ones."""

import asyncio
import json
import math

import pytest

from sae.explain.config import LLMConfig
from sae.explain.judges import LLMJudge, question
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import AnswerToken, Response, canonical
from sae.explain.llm.corpus_text import expected_numbers, item
from sae.explain.llm.openai_client import OpenAIClient
from sae.explain.llm.store import AnswerCache
from sae.explain.question_scorers import EXPECTED, Simulation
from tests.sae.explain.llm.services import Reply, completion, error

ITEMS = [item([word]) for word in ("a", " cow", ".")]


def token(text, **alternatives):
    """A token and what else might have stood there, by names such as p7 or p10."""
    some = tuple((name[1:].replace("_", " "), math.log(p)) for name, p in alternatives.items())
    return AnswerToken(text, some)


def tokens(*given):
    return tuple(one if isinstance(one, AnswerToken) else AnswerToken(one, ()) for one in given)


SEVEN = token("7", p7=0.6, p3=0.3, pcow=0.1)
WITH_COMMA = AnswerToken(
    " 7,", ((" 7,", math.log(0.5)), (" 8", math.log(0.25)), ("\n99,", math.log(0.25)))
)
E_SEVEN = (0.6 * 7 + 0.3 * 3) / 0.9


@pytest.mark.parametrize(
    ("answer", "numbers", "expected"),
    [
        (tokens("[", SEVEN, ", ", token("0", p0=1.0), "]"), [7, 0], [E_SEVEN, 0.0]),
        # blanks, brackets and commas in the tokens; a number beyond the scale has no mass
        (
tokens("[", WITH_COMMA, token(" 2", p_2=1.0), "]"),
            [7, 2],
            [(0.5 * 7 + 0.25 * 8) / 0.75, 2.0],
        ),
        (tokens("Here: [", SEVEN, "]\n"), [7], [E_SEVEN]),
        # ten as one token: "1" is one
        (
            tokens("[", token("10", p10=0.5, p1=0.25, p9=0.25), "]"),
            [10],
            [0.5 * 10 + 0.25 * 1 + 0.25 * 9],
        ),
        # ten as two tokens: what follows the written "1" parts its mass
        (
            tokens("[", token("1", p1=0.8, p9=0.2), AnswerToken("0", (("0", math.log(0.75)),
                ("]", math.log(0.25)))), "]"),
            [10],
            [0.8 * (0.75 * 10 + 0.25 * 1) + 0.2 * 9],
        ),
        # ten as two tokens and nine was written: nobody says what would have followed the "1"
        (tokens("[", token("9", p9=0.6, p1=0.4), "]"), [9], [None]),
        (tokens("[", token("9", p9=0.999, p1=0.001), "]"), [9], [(9 * 0.999 + 0.001)]),
        # several numbers in a token, decimals, another list, no tokens
        (tokens("[", token("7,3"), "]"), [7, 3], [None, None]),
        (tokens("[", token("7.5"), "]"), [7.5], [None]),
        (tokens("[", SEVEN, "]"), [3], [None]),
        ((), [7, 3], [None, None]),
        # a draft before the answer
        (
            tokens("[", token("7", p7=1.0), "] or [", token("7", p7=0.5, p5=0.5), "]"),
            [7],
            [6.0],
        ),
    ],
)  # fmt: skip
def test_an_expectation_is_over_the_numbers_at_its_place(answer, numbers, expected):
    result = expected_numbers(answer, [float(n) for n in numbers], 10)
    assert len(result) == len(expected)
    for one, other in zip(result, expected, strict=True):
        assert one == (None if other is None else pytest.approx(other, abs=1e-9))


def written(numbers, places):
    """A chat completion whose numbers are tokens of their own, with probabilities."""
    parts, answer = [], json.dumps(numbers)
    for number, alternatives in zip(numbers, places, strict=True):
        parts.append(("[" if not parts else ", ", {}))
        parts.append((str(number), alternatives))
    content = [
        {
            "token": text, "logprob": math.log(some.get(text, 1.0)), "bytes": None,
            "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in some.items()],
        }
        for text, some in [*parts, ("]", {})]
    ]  # fmt: skip
    done = completion(answer)
    done["choices"][0]["logprobs"] = {"content": content, "refusal": None}
    return Reply(200, done)


PLACES = ({"2": 0.7, "4": 0.3}, {"9": 0.5, "8": 0.5}, {"0": 0.9, " ": 0.1})


def gives(body, state):
    return (
        written([2, 9, 0], PLACES) if body.get("logprobs") else Reply(200, completion("[2, 9, 0]"))
    )


def refuses_by_name(body, state):
    if "logprobs" in body:
        return Reply(400, error("logprobs is not supported with this model", param="logprobs"))
    return Reply(200, completion("[2, 9, 0]"))


def refuses_without_a_word(body, state):
    if "top_logprobs" in body:
        return Reply(400, {"error": "Bad Request"})
    return Reply(200, completion("[2, 9, 0]" if "0 to 10" in str(body) else "[1, 0, 0]"))


def does_not_know(body, state):
    return Reply(200, completion("[2, 9, 0]"))


def gives_another_form(body, state):
    done = completion("[2, 9, 0]")
    done["choices"][0]["logprobs"] = {"tokens": ["[2"], "token_logprobs": [-0.1]}
    return Reply(200, done)


def asked(url, path=None, first="simulation", **settings):
    """Levels of three tokens; `first` is a question that comes before."""
    config = LLMConfig(model="m", base_url=url, api_key="none", backoff_s=0.005, **settings)

    async def run():
        cache = None if path is None else AnswerCache(path)
        client = OpenAIClient(config)
        judge = LLMJudge(Caller(client, config, cache))
        try:
            if first != "simulation":
                await judge.answer(first, "the cow", ITEMS)
            return await judge.simulate("the cow", ITEMS)
        finally:
            await client.close()
            if cache is not None:
                cache.close()

    return asyncio.run(run())


def test_levels_are_expectations_where_the_endpoint_gives_probabilities(serve, tmp_path):
    with serve(behaviour=gives) as endpoint:
        levels = asked(endpoint.url, tmp_path / "a.sqlite")
        again = asked(endpoint.url, tmp_path / "a.sqlite")
    assert levels.values == pytest.approx([0.7 * 2 + 0.3 * 4, 8.5, 0.0])
    assert (levels.n_expected, again) == (3, levels)  # the store keeps the probabilities
    assert endpoint.state.n == 1
    assert endpoint.state.seen[0]["top_logprobs"] == 20


@pytest.mark.parametrize(
    ("behaviour", "first", "n_calls"),
    [
        (refuses_by_name, "simulation", 2),
        (refuses_without_a_word, "detection", 3),  # after a form without them was answered
        (does_not_know, "simulation", 1),
        (gives_another_form, "simulation", 1),
    ],
)
def test_levels_are_what_was_written_where_it_gives_none(serve, behaviour, first, n_calls):
    with serve(behaviour=behaviour) as endpoint:
        levels = asked(endpoint.url, first=first)
    assert levels == ([2.0, 9.0, 0.0], 0)
    assert endpoint.state.n == n_calls


def test_other_questions_ask_for_no_probabilities(serve):
    with serve(behaviour=refuses_without_a_word) as endpoint:
        asked(endpoint.url, first="detection")
    assert "logprobs" not in endpoint.state.seen[0]


def test_an_answer_of_an_older_store_is_still_the_answer(tmp_path):
    """Its key is that of the question without any mention of probabilities."""
    request = question("simulation", "the cow", ITEMS)
    assert request.alternatives == 20
    assert "alternatives" not in canonical("c", request)
    cache = AnswerCache(tmp_path / "a.sqlite")
    for number, response in enumerate((
        Response("[2]", "stop", 3, 2),
        Response("[2]", "stop", 3, 2, tokens("[", SEVEN, "]")),
    )):  # fmt: skip
        cache.put(str(number), "question", response)
        assert cache.get(str(number)) == response
    cache.close()


def test_the_result_says_where_its_levels_come_from(latent_of):
    latent = latent_of(3)

    class Judge:
        def __init__(self, n_expected):
            self.n_expected = n_expected

        async def simulate(self, explanation, items):
            from sae.explain.judges import Levels

            values = [float("topic" in one.text) for one in items]
            return Levels(values, self.n_expected and len(values))

        async def answer(self, task, explanation, items):
            raise AssertionError(task)

    for n_expected, share in ((0, 0.0), (1, 1.0)):
        score = asyncio.run(Simulation().score(latent, "x", Judge(n_expected)))
        assert score.details[EXPECTED] == share

"""A client that knows gives 1; one that guesses or repeats itself gives the floor."""

import asyncio

import numpy as np
import pytest

from sae.explain.config import LLMConfig
from sae.explain.explainers import LLMExplainer
from sae.explain.judges import RuleJudge
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import ConstantClient
from sae.explain.pipeline import ExplainPlan, estimate_all, explain_all, shuffled_windows
from sae.explain.question_scorers import Detection, Fuzzing, Intruder, Rubric, Simulation
from sae.explain.windows import WordRule
from tests.clients import FlakyClient, OracleClient, RandomClient

SCORERS = (Detection(), Fuzzing(), Simulation(), Rubric(), Intruder())
CONFIG = LLMConfig(model="m", retries=30, attempts=1, backoff_s=0.0, give_up_after=10**6)


def plan(n_controls: int = 0) -> ExplainPlan:
    return ExplainPlan(LLMExplainer(), SCORERS, min_windows=4, n_controls=n_controls)


async def no_pause(seconds: float) -> None:
    pass


def run(client, latents, config=CONFIG, n_controls=0):
    caller = Caller(client, config, sleep=no_pause)
    return asyncio.run(explain_all(latents, plan(n_controls), caller))


def scores_of(result) -> dict[str, list]:
    return {s.name: [f.scores[i] for f in result] for i, s in enumerate(SCORERS)}


@pytest.fixture(scope="module")
def latents(latent_of):
    return [latent_of(number, n=32) for number in range(7)]


def test_the_oracle_is_perfect(latents, topic_of):
    for latent in latents[:3]:
        word = topic_of(latent.latent)
        (result,) = run(OracleClient(WordRule({word: 1.0}), f"the word {word}"), [latent])
        assert result.status == "done"
        assert result.explanation.text == f"the word {word}"
        for score in result.scores:
            assert score.n_failed == 0
            assert score.worst == score.value == score.best
            assert score.low < score.value <= score.high
            assert set(score.per_source.values()) <= {1.0}
            if score.scorer != "simulation":  # the rule knows where, not how strongly
                assert score.value == 1.0, score
        assert set(result.scores[0].per_source) == {"random", "lexical", "similar", "weak"}
        assert "moved" in result.scores[1].per_source
        assert result.scores[2].value > 0.8
        assert result.scores[2].details["spearman"] > 0.9
        assert result.scores[3].details["level 4 grade 3"] == 1.0


def test_constant_answers_give_exactly_the_floor(latents):
    for number in (0, 1, 3):
        result = scores_of(run(ConstantClient(number), latents[:3]))
        if number < 3:  # 3 is no answer to a yes-or-no question
            for name in ("detection", "fuzzing"):
                assert [score.value for score in result[name]] == [0.5] * 3
                assert all(score.low < 0.5 < score.high for score in result[name])
        for score in result["simulation"]:
            assert (score.value, score.low, score.worst) == (None, None, None)
            assert score.reason.startswith(
                "undefined: the predictions or the activations are const"
            )
        assert {score.value for score in result["rubric"]} == {number / 3}
        assert all(score.floor == 0.2 for score in result["intruder"])


def test_random_answers_are_at_the_floor(latents):
    result = scores_of(run(RandomClient(7), latents))
    for name, floor in (
        ("detection", 0.5),
        ("fuzzing", 0.5),
        ("simulation", 0.0),
        ("intruder", 0.2),
    ):
        values = [score.value for score in result[name]]
        assert {score.floor for score in result[name]} == {floor}
        assert np.mean(values) == pytest.approx(floor, abs=0.11), name
        inside = [score.low <= floor <= score.high for score in result[name]]
        assert np.mean(inside) >= 0.75, name
    assert np.mean([score.value for score in result["rubric"]]) == pytest.approx(0.5, abs=0.08)


def test_failures_stay_in_the_count_and_widen_the_bounds(latents):
    result = run(FlakyClient(ConstantClient(1), 0.3, seed=3), latents)
    done = [f for f in result if f.status == "done"]
    failed = [f for f in result if f.status == "failed"]
    assert done
    assert failed
    assert {f.reason.split(":")[0] for f in failed} <= {"refusal", "length", "parse"}
    assert len(done) + len(failed) == 7
    scores = [f.scores[0] for f in done]
    assert {score.n for score in scores} == {32}
    assert any(score.n_failed for score in scores)
    for score in scores:
        if score.value is not None:
            assert score.value == 0.5  # of what was answered
            assert (score.worst < 0.5 < score.best) == (score.n_failed > 0)
            lost = score.n_failed / score.n
            assert 0.5 - score.worst <= 4 * lost + 1e-9


def test_a_flaky_endpoint_changes_no_result(latents):
    config = LLMConfig(model="m", retries=40, attempts=40, backoff_s=0.0, give_up_after=10**6)
    assert run(FlakyClient(RandomClient(1), 0.0), latents[:2], config) == run(
        RandomClient(1), latents[:2], config
    )
    flaky = FlakyClient(ConstantClient(1), 0.47)
    assert run(flaky, latents[:2], config) == run(ConstantClient(1), latents[:2], config)
    assert flaky.n_calls > 30


def test_order_and_concurrency_change_no_result(latents):
    one = LLMConfig(model="m", concurrency=1)
    forward = run(RandomClient(2), latents[:3], n_controls=3)
    backward = run(RandomClient(2), latents[:3][::-1], one, n_controls=3)
    assert forward == backward[::-1]


def test_controls_are_at_chance_where_the_label_is_not(latents, topic_of):
    words = {topic_of(latent.latent): 1.0 for latent in latents}

    class Reader(OracleClient):
        """An oracle of the label that it is given, as a good language model would be."""

        async def complete(self, request):
            label = request.messages[-1].content.split("\n")[0].removeprefix("Label: ")
            if request.prompt.startswith("explain"):
                marked = request.messages[-1].content.split("<< ")[1].split(">>")[0]
                return await OracleClient(WordRule({}), marked).complete(request)
            return await OracleClient(WordRule({label: 1.0}), label).complete(request)

    result = run(Reader(WordRule(words), "reader"), latents, n_controls=3)
    with_controls = [f for f in result if f.controls]
    assert len(with_controls) == 3
    for f in with_controls:
        assert set(f.controls) == {"another's label", "shuffled windows"}
        assert f.scores[0].value == 1.0
        assert f.controls["another's label"][0].value == 0.5
        assert f.controls["another's label"][3].value == 0.0
        assert f.controls["shuffled windows"][0].value < 0.75
    shuffled = [f.controls["shuffled windows"][0].value for f in with_controls]
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.1)


def test_shuffling_exchanges_texts_and_nothing_else(latents):
    before, after = latents[0], shuffled_windows(latents[0])
    assert [w.activations for w in after.score] == [w.activations for w in before.score]
    assert sorted(w.tokens for w in after.score) == sorted(w.tokens for w in before.score)
    assert [w.tokens for w in after.score] != [w.tokens for w in before.score]
    assert after.explain == before.explain


def test_a_rule_scores_itself_without_any_client(latents, topic_of):
    judge = RuleJudge(WordRule({topic_of(3): 1.0}))
    scores = [asyncio.run(scorer.score(latents[3], "", judge)) for scorer in SCORERS]
    assert [s.value for s in scores[:2]] == [1.0, 1.0]
    wrong = RuleJudge(WordRule({"w1": 1.0}))
    scores = [asyncio.run(scorer.score(latents[3], "", wrong)) for scorer in SCORERS]
    assert scores[0].value < 0.7
    assert scores[3].value < 0.4


def test_few_windows_are_insufficient_and_nothing_is_asked(latent_of):
    result = run(OracleClient(WordRule({}), "x"), [latent_of(1, n=4)])
    assert [(f.status, f.reason, f.scores) for f in result] == [
        ("insufficient", "0 active windows of 4 wanted", ())
    ]


def test_the_estimate_bounds_what_is_spent(latents):
    caller = Caller(RandomClient(3), CONFIG, sleep=no_pause)
    wanted = asyncio.run(estimate_all(latents[:3], plan(2), caller))
    assert caller.budget.spent.requests == 0
    asyncio.run(explain_all(latents[:3], plan(2), caller))
    spent = caller.budget.spent
    assert spent.requests == wanted.requests
    assert spent.input_tokens <= wanted.input_tokens <= 2 * spent.input_tokens
    assert spent.output_tokens <= wanted.output_tokens

"""Labels by batch files: rounds of questions and answers, each question once, resume."""

import asyncio
import contextlib
import json

import pytest

from sae.explain.config import LLMConfig
from sae.explain.explainers import LLMExplainer
from sae.explain.llm import batch
from sae.explain.llm.batch import BatchClient
from sae.explain.llm.caller import Caller
from sae.explain.llm.chat import EndpointError
from sae.explain.llm.openai_client import OpenAIClient
from sae.explain.llm.store import AnswerCache
from sae.explain.pipeline import ExplainPlan, explain_all
from sae.explain.question_scorers import Detection
from tests.sae.explain.llm.services import completion, error, text_of

PLAN = ExplainPlan(LLMExplainer(n_windows=8), (Detection(8),), min_windows=2, n_controls=0)


def run(latents, path, **settings):
    """One run of the command: what became of the latents, and the caller."""
    config = LLMConfig(model="m", kind="vllm", batch_dir=str(path / "batch"), **settings)

    async def label(cache):
        caller = Caller(BatchClient(config), config, cache)
        return await explain_all(latents, PLAN, caller), caller

    with contextlib.closing(AnswerCache(path / "llm.sqlite")) as cache:
        result, caller = asyncio.run(label(cache))
        return result, caller, cache.ledger.total()[0]


def questions(path) -> list[dict]:
    files = sorted((path / "batch").glob("requests-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def answer(path, name, reply=None, only=None):
    """What `vllm run-batch` leaves: an answer for each question that has none yet."""
    known = {json.loads(line)["custom_id"] for file in (path / "batch").glob("answers-*.jsonl")
             for line in file.read_text().splitlines()}  # fmt: skip
    with (path / "batch" / f"answers-{name}.jsonl").open("w") as file:
        for record in questions(path)[-only if only else None :]:
            if record["custom_id"] in known and reply is None:
                continue
            status, body = (reply or (lambda body: (200, completion(text_of(body)))))(
                record["body"]
            )
            response = {"status_code": status, "body": body}
            line = {
                "id": "x",
                "custom_id": record["custom_id"],
                "response": response,
                "error": None,
            }
            file.write(json.dumps(line) + "\n")


def test_labelling_goes_in_rounds_and_asks_each_question_once(latent_of, topic_of, tmp_path):
    latents = [latent_of(number, n=16) for number in range(11)]
    result, caller, total = run(latents, tmp_path)
    assert {f.reason.split(":")[0] for f in result} == {"pending"}
    assert (caller.tally.n_open, caller.client.n_written, total.requests) == (11, 11, 11)
    first = questions(tmp_path)
    assert first[0]["url"] == "/v1/chat/completions"
    assert first[0]["body"]["response_format"]["json_schema"]["schema"]["required"] == ["label"]
    _, caller, total = run(latents, tmp_path)  # nothing was answered: nothing is asked again
    assert (caller.tally.n_open, caller.client.n_written, total.requests) == (11, 0, 11)
    answer(tmp_path, "1")
    result, caller, _ = run(latents, tmp_path)
    assert [f.status for f in result] == ["done"] * 11
    assert [f.explanation.text for f in result] == [f"the word {topic_of(n)}" for n in range(11)]
    n_scoring = caller.client.n_written
    assert n_scoring == caller.tally.n_open > 11
    answer(tmp_path, "2")
    result, caller, total = run(latents, tmp_path)
    assert [f.scores[0].value for f in result] == [1.0] * 11
    assert caller.tally.n_open == 0
    assert total.requests == 11 + n_scoring == len(questions(tmp_path))
    assert total.output_tokens == 20 * total.requests
    assert len({record["custom_id"] for record in questions(tmp_path)}) == total.requests
    *_, again = run(latents, tmp_path)
    assert again == total


def test_the_answers_serve_calls_as_well(latent_of, tmp_path):
    latents = [latent_of(1)]
    run(latents, tmp_path)
    answer(tmp_path, "1")
    run(latents, tmp_path)
    answer(tmp_path, "2")
    result, *_ = run(latents, tmp_path)
    config = LLMConfig(model="m", kind="vllm", cache_mode="replay")
    with contextlib.closing(AnswerCache(tmp_path / "llm.sqlite", replay=True)) as cache:
        caller = Caller(OpenAIClient(config), config, cache)
        assert asyncio.run(explain_all(latents, PLAN, caller)) == result
    assert caller.budget.spent.requests == 0


def test_what_failed_is_written_again_and_what_cannot_be_read_is_asked_anew(latent_of, tmp_path):
    latents = [latent_of(number) for number in range(3)]
    run(latents, tmp_path)
    answer(tmp_path, "1", lambda body: (500, error("worker died")))
    _, caller, total = run(latents, tmp_path)
    assert (caller.client.n_written, caller.tally.n_open, total.requests) == (3, 3, 3)
    answer(tmp_path, "2", lambda body: (200, completion("I do not know.")), only=3)
    _, caller, _ = run(latents, tmp_path)
    assert (caller.client.n_written, caller.failures["parse"]) == (3, 3)
    assert {record["body"]["seed"] for record in questions(tmp_path)[-3:]} == {1}


def test_a_refused_question_is_asked_again_in_another_form_alone(latent_of, tmp_path):
    latents = [latent_of(number) for number in range(3)]
    run(latents, tmp_path)
    answer(tmp_path, "1", lambda body: (400, error("seed is not supported")))
    result, caller, total = run(latents, tmp_path)
    assert {f.reason for f in result} == {"request: 400: seed is not supported"}
    assert (caller.client.n_written, caller.tally.n_open, total.requests) == (0, 0, 3)
    with pytest.raises(EndpointError, match="got 2 equal refusals"):
        run(latents, tmp_path, stop_after_refusals=2)
    _, caller, _ = run(latents, tmp_path, leave_out=("seed",))
    assert caller.client.n_written == 3
    assert all("seed" not in record["body"] for record in questions(tmp_path)[-3:])


def test_limits_hold_for_what_is_written_down(latent_of, tmp_path):
    latents = [latent_of(number) for number in range(9)]
    for _ in range(2):
        result, *_ = run(latents, tmp_path, max_requests=4)
        assert len(questions(tmp_path)) == 4
    assert sorted(f.reason.split(":")[0] for f in result) == ["budget"] * 5 + ["pending"] * 4


def test_files_are_split_and_a_cut_line_is_written_again(latent_of, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "LINES_PER_FILE", 4)
    latents = [latent_of(number) for number in range(10)]
    run(latents, tmp_path)
    files = sorted((tmp_path / "batch").glob("requests-*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == [4, 4, 2]
    files[-1].write_bytes(files[-1].read_bytes()[:-30])  # a kill in the middle of a line
    _, caller, _ = run(latents, tmp_path)
    assert caller.client.n_written == 1
    assert len({record["custom_id"] for record in questions(tmp_path)}) == 10
    (tmp_path / "batch" / "answers-1.jsonl").write_text("<html>not found</html>\n")
    with pytest.raises(
        ValueError, match=r"answers-1.jsonl:1 must be JSON with custom_id and respo"
    ):
        run(latents, tmp_path)

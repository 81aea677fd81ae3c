"""A model of no knowledge whose answers are always in the form that was asked for."""

import asyncio
import json

import pytest
import torch

from sae.explain.explainers import LLMExplainer
from sae.explain.judges import question
from sae.explain.llm.chat import CallFailedError, Message, Request
from sae.explain.llm.corpus_text import expected_numbers, item, read_label
from sae.explain.llm.local_client import ConstrainedClient, LocalClient

ITEMS = [item([f" text {n}", ' "]"', " [1, 1, 1]"]) for n in range(5)]


def complete(client, request):
    return asyncio.run(client.complete(request))


@pytest.mark.parametrize(
    ("task", "n", "low", "high"),
    [("detection", 5, 0, 1), ("rubric", 5, 0, 3), ("simulation", 5, 0, 9), ("intruder", 1, 1, 5)],
)
def test_numbers_are_as_many_and_as_large_as_allowed(task, n, low, high, tiny_model):
    client = ConstrainedClient(tiny_model, "tiny")
    answer = complete(client, question(task, "anything", ITEMS))
    numbers = json.loads(answer.text)
    assert len(numbers) == n
    assert all(low <= number <= high for number in numbers)
    assert answer == complete(client, question(task, "anything", ITEMS))


def test_each_number_is_the_likeliest_given_those_before(tiny_model):
    client = ConstrainedClient(tiny_model, "tiny")
    request = question("rubric", "anything", ITEMS)
    numbers = json.loads(complete(client, request).text)
    ids = torch.cat([client._ids(request.messages), client._plain("[")], dim=1)
    digits = [int(client._plain(str(n))[0, -1]) for n in range(4)]
    for number in numbers:
        with torch.no_grad():
            logits = tiny_model.model(ids).logits[0, -1, digits]
        assert number == int(logits.argmax())
        ids = torch.cat([ids, client._plain(f"{number}, ")], dim=1)


def test_levels_have_the_probabilities_of_all_digits(tiny_model):
    client = ConstrainedClient(tiny_model, "tiny")
    request = question("simulation", "anything", ITEMS)
    answer = complete(client, request)
    numbers = json.loads(answer.text)
    expected = expected_numbers(answer.tokens, [float(n) for n in numbers], 10)
    ids = torch.cat([client._ids(request.messages), client._plain("[")], dim=1)
    digits = [int(client._plain(str(n))[0, -1]) for n in range(10)]
    for number, level in zip(numbers, expected, strict=True):
        with torch.no_grad():
            p = tiny_model.model(ids).logits[0, -1, digits].softmax(dim=0)
        assert level == pytest.approx(float(p @ torch.arange(10.0)), abs=1e-3)
        ids = torch.cat([ids, client._plain(f"{number}, ")], dim=1)
    assert complete(client, question("rubric", "anything", ITEMS)).tokens == ()


def test_a_label_is_one_line_behind_our_own_mark(tiny_model, latent_of):
    client = ConstrainedClient(tiny_model, "tiny")
    request = LLMExplainer(n_windows=2).request(latent_of(3))
    answer = complete(client, request)
    assert answer.text.startswith("LABEL:")
    assert "\n" not in answer.text
    written = answer.text.removeprefix("LABEL:").strip()
    if written:  # a model may write nothing: a failure, never a label
        assert read_label(answer.text) in written
    with pytest.raises(CallFailedError, match="parse"):
        read_label("LABEL: ")


def test_it_is_another_client_and_answers_other_questions_freely(tiny_model):
    free, client = LocalClient(tiny_model, "tiny"), ConstrainedClient(tiny_model, "tiny")
    assert client.name != free.name
    request = Request(prompt="t/1", messages=(Message("user", "hello"),), max_tokens=5)
    assert complete(client, request) == complete(free, request)
    long = question("detection", "x", [item([" y" * 3000])] * 3)
    with pytest.raises(CallFailedError, match=r"context: .* do not fit into"):
        complete(client, long)

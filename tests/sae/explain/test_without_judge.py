"""Scores from embeddings, likelihoods and interventions; rules from labels."""

import asyncio

import numpy as np
import pytest
import torch

from sae.explain.config import ExplainConfig
from sae.explain.labels import make_labels
from sae.explain.llm.chat import CallFailedError, Message, Request
from sae.explain.llm.local_client import LocalClient
from sae.explain.logit_lens import published_score, weight_pmi
from sae.explain.model_scorers import (
    Embedding,
    OutputSide,
    Sensitivity,
    Surprisal,
    amplified,
    by_source,
)
from sae.explain.question_scorers import Detection, Simulation
from sae.explain.subject import rule_of, score_rule
from sae.explain.windows import LatentWindows


def run(scorer, latent, label=""):
    return asyncio.run(scorer.score(latent, label))


def by_words(texts: list[str]) -> torch.Tensor:
    """An embedding that knows one word."""
    return torch.tensor([[float("topicd" in text), 0.1] for text in texts])


def test_embedding_finds_the_planted_word_and_not_another(latent_of, topic_of):
    good = run(Embedding(by_words), latent_of(3), topic_of(3))
    assert good.value == 1.0
    assert set(good.per_source.values()) == {1.0}
    assert (good.floor, good.n_failed) == (0.5, 0)
    nothing = run(Embedding(lambda texts: torch.ones(len(texts), 2)), latent_of(3), "x")
    assert (nothing.value, nothing.worst, nothing.best) == (0.5, 0.5, 0.5)


def test_surprisal_is_the_gain_of_the_label(latent_of, topic_of):
    def likelihood(prefix: str, text: str) -> float:
        knows = "topicd" in prefix and "topicd" in text
        return -len(text) / 10 + 2.0 * knows

    assert run(Surprisal(likelihood), latent_of(3), topic_of(3)).value == 1.0
    assert run(Surprisal(likelihood), latent_of(3), "something else").value == 0.5


def test_figures_that_are_not_finite_have_failed_and_widen_the_bounds():
    sources = ["active"] * 4 + ["random"] * 4 + ["similar"] * 2
    figures = [3.0, 3.0, 3.0, float("nan"), 1.0, 1.0, 1.0, 4.0, 1.0, 1.0]
    result = by_source("x", sources, figures)
    assert (result.n, result.n_failed) == (10, 1)
    assert result.value == pytest.approx(5 / 6)
    assert result.per_source == pytest.approx({"random": 0.75, "similar": 1.0})
    assert result.worst == pytest.approx(5 / 6 * 0.75)
    assert result.best == pytest.approx(5 / 6 * 0.75 + 0.25)
    assert by_source("x", ["active"], [1.0]).reason == "no active windows or no negatives"


def test_output_side_sees_what_amplification_raises():
    promoted = torch.tensor([[1, 2], [3, 4]])
    base = torch.zeros(3, 11).log_softmax(1)

    def model(latent: int, strength: float) -> torch.Tensor:
        logits = torch.zeros(3, 11)
        logits[:, promoted[0]] += strength * (latent == 0)
        logits += strength  # what it does to all tokens counts for nothing
        return logits.log_softmax(1)

    assert torch.equal(model(1, 0.0), base)
    scores = [
        run(OutputSide(model, promoted), LatentWindows(latent, 5.0, 0.1, (), ()))
        for latent in (0, 1)
    ]
    assert [score.value for score in scores] == [1.0, 0.5]
    assert scores[0].details["arad after"] > 5 * scores[0].details["arad before"] / 2
    assert scores[0].n == 3


def test_amplification_in_a_model_raises_the_tokens_of_its_direction(
    tiny_model, identity_dictionary
):
    model = tiny_model.model
    unembed = model.get_output_embeddings().weight.detach()
    dictionary = identity_dictionary(23)
    with torch.no_grad():
        dictionary.dec_rows.copy_(torch.nn.functional.normalize(unembed[:23], dim=1))
    ids = torch.arange(15).reshape(3, 5)
    hook = "model.layers.4:out"
    next_log_probs = amplified(model, ids, dictionary, hook)
    with torch.no_grad():
        plain = model(ids).logits[:, -1].log_softmax(-1)
    assert next_log_probs(0, 0.0) == pytest.approx(plain, abs=1e-5)
    promoted = (dictionary.W_dec @ unembed.T).topk(5, dim=1).indices
    scorer = OutputSide(next_log_probs, promoted, strength=3.0)
    values = [run(scorer, LatentWindows(i, 1.0, 0.1, (), ())).value for i in range(7)]
    assert np.mean(values) > 0.9
    exchanged = OutputSide(next_log_probs, promoted.roll(1, 0), strength=3.0)
    values = [run(exchanged, LatentWindows(i, 1.0, 0.1, (), ())).value for i in range(7)]
    assert np.mean(values) < 0.75


def test_sensitivity_is_the_planted_rate():
    async def texts_for(label: str) -> list[str]:
        if label == "refused":
            raise CallFailedError("refusal", "no")
        return [f"{label} {i}" for i in range(10)]

    def peaks_on(latent, texts):
        return [2.0 if int(text.split()[1]) < 7 else 0.0 for text in texts]

    latent = LatentWindows(0, 4.0, 0.01, (), ())
    result = run(Sensitivity(texts_for, peaks_on, n_tokens=10), latent, "cats")
    assert result.value == 0.7
    assert result.floor == pytest.approx(1 - 0.99**10)
    assert result.details["mean share of the maximum"] == pytest.approx(0.35)
    failed = run(Sensitivity(texts_for, peaks_on), latent, "refused")
    assert (failed.value, failed.worst, failed.best, failed.n_failed) == (None, 0.0, 1.0, 1)


def test_a_local_model_answers_embeds_and_reads(tiny_model):
    client = LocalClient(tiny_model, "tiny")
    request = Request(prompt="t/1", messages=(Message("user", "hello"),), max_tokens=5)
    first = asyncio.run(client.complete(request))
    assert first == asyncio.run(client.complete(request))
    assert first.output_tokens <= 5
    assert first.input_tokens > 2
    assert client.embed(["a", "bc"]).shape == (2, 23)
    ids = tiny_model.tokenizer("ab cd", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = tiny_model.model(ids).logits[0, :-1].log_softmax(-1)
    whole = logits.gather(1, ids[0, 1:, None]).mean()
    assert client.log_likelihood("", "ab cd") == pytest.approx(float(whole), abs=1e-4)
    assert client.name.startswith("local tiny ")
    long = Request(prompt="t/1", messages=(Message("user", "x y " * 5000),), max_tokens=5)
    with pytest.raises(CallFailedError, match=r"context: \d+ tokens and an answer do not fit into"):
        asyncio.run(client.complete(long))


def test_weight_pmi_finds_planted_words_and_the_published_order_none():
    made = torch.Generator().manual_seed(0)
    n_words, d, n_latents = 997, 127, 83
    words = torch.randn(n_words, d, generator=made)
    words[:50] *= 3  # frequent words have long vectors
    enc = torch.stack([words[100 + 3 * i : 103 + 3 * i].sum(0) for i in range(n_latents)])
    planted = [set(range(100 + 3 * i, 103 + 3 * i)) for i in range(n_latents)]

    def recall(score):
        top = score.topk(3, dim=1).indices.tolist()
        return np.mean([len(set(t) & p) / 3 for t, p in zip(top, planted, strict=True)])

    assert recall(weight_pmi(enc, words)) > 0.95
    assert recall(published_score(enc, words)) < 0.05


def test_labels_execute_as_rules(planted, codes_of, text_of):
    cache = planted.cache
    seen = cache.split == 0
    acts = cache.acts[seen].flatten(0, 1).numpy()
    names = [s.strip() for s in planted.strings]
    text = text_of(int(seen.sum()), 61, word=cache.tokens[seen].flatten().numpy())
    labels = make_labels(codes_of(acts), text, ExplainConfig(kinds=("word",)))
    rule = rule_of(labels, 3, {"word": names})
    assert rule is not None
    assert set(rule.weights) >= planted.words[3]
    assert rule_of(labels, planted.silent, {"word": names}) is None
    word = next(iter(planted.words[3]))
    strengths = rule([" the", f" {word[:3]}", word[3:], " z"])
    assert strengths[1] == strengths[2] > 0.5
    assert strengths[0] == strengths[3] == 0.0


def test_rules_are_scored_like_labels(latent_of, topic_of):
    from sae.explain.judges import WordRule

    scorers = (Detection(), Simulation())
    result = asyncio.run(score_rule(latent_of(3), WordRule({topic_of(3): 0.9}), scorers))
    assert result[0].value == 1.0
    assert result[1].value > 0.8
    after = WordRule({topic_of(3): 1.0}, previous=True)
    assert after(["x", " " + topic_of(3), " y"]) == [0.0, 0.0, 1.0]

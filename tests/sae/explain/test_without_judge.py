"""Scores from embeddings, likelihoods and interventions; rules from labels."""

import asyncio
import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from activations_cache.hooks import capture, edit
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.explain.config import ExplainConfig
from sae.explain.judges import RuleJudge
from sae.explain.labels import make_labels
from sae.explain.llm.chat import CallFailedError, Message, Request
from sae.explain.llm.local_client import LocalClient
from sae.explain.logit_lens import weight_pmi
from sae.explain.model_scorers import (
    Ablation,
    Embedding,
    OutputSide,
    Sensitivity,
    Surprisal,
    amplified,
    by_source,
    calibrated,
    divergences,
)
from sae.explain.question_scorers import EXPECTED, Detection, Simulated, Simulation
from sae.explain.subject import rule_of, score_rule
from sae.explain.windows import LatentWindows, Window, WordRule


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


def test_the_divergence_is_that_of_the_model_with_other_activations(tiny_model):
    """Jensen and Shannon's by scipy, of a model whose stream is changed by hand."""
    model, hook = tiny_model.model, "model.layers.1:out"
    dictionary = SparseAutoencoder(SAEConfig(d_in=23, d_sae=53, activation=TopK(k=5)))
    initialise(dictionary, torch.Generator().manual_seed(1))
    ids = torch.randint(1, 40, (3, 11), generator=torch.Generator().manual_seed(2)).int()
    with capture(model, [hook]) as read:
        f = dictionary.encode_dense(read(ids[1][None].long())[hook][0])
    latent = int((f > 0).sum(0).argmax())
    window = Window(1, 2, ("x",) * 5, tuple(f[2:7, latent].tolist()), "active")
    measure = divergences(model, ids, dictionary, ([hook], hook), first_position=1)
    assert measure(latent, window, window.activations) == pytest.approx(0, abs=1e-6)
    values = [40.0, 0.0, 7.0, 0.0, 90.0]
    moved = torch.zeros(1, 7, 23)
    moved[0, 2:] = (torch.tensor(values) - f[2:7, latent])[:, None] * dictionary.direction(latent)
    with torch.no_grad():
        p = model(ids[1:2, :7].long()).logits[0, 2:].softmax(-1)
        with edit(model, {hook: lambda h, _: h + moved}):
            q = model(ids[1:2, :7].long()).logits[0, 2:].softmax(-1)
    by_scipy = jensenshannon(p.double().numpy(), q.double().numpy(), axis=1) ** 2
    assert measure(latent, window, values) == pytest.approx(by_scipy.mean(), rel=1e-6)
    at_start = Window(1, 0, ("x",), (0.0,), "active")  # a sink is left as it is
    assert measure(latent, at_start, [1e3]) == pytest.approx(0, abs=1e-12)


def test_ablation_is_1_for_the_truth_and_0_for_a_label_that_says_nothing(latent_of, topic_of):
    def squares(latent, window, values):
        return sum((v - f) ** 2 for v, f in zip(values, window.activations, strict=True))

    latent = latent_of(3, n=16)

    class Oracle(RuleJudge):
        """Levels that are a line of the activations: calibration undoes the line."""

        async def answer(self, task, explanation, items):
            words = tuple(item.text for item in items)
            window = next(w for w in latent.score if w.tokens == words)
            return [2.0 * f + 1.0 for f in window.activations]

    scorer = Ablation(squares)
    true = asyncio.run(scorer.score(latent, "x", Oracle(WordRule({}))))
    assert true.value == pytest.approx(1.0, abs=1e-9)
    assert true.details == {EXPECTED: 0.0, "pearson": pytest.approx(1.0)}
    nothing = asyncio.run(scorer.score(latent, "x", RuleJudge(WordRule({}))))
    assert nothing.value == 0.0
    half = asyncio.run(scorer.score(latent, "x", RuleJudge(WordRule({topic_of(3): 1.0}))))
    assert 0.1 < half.value < 1.0
    without = Ablation(lambda latent, window, values: 0.0)
    assert asyncio.run(without.score(latent, "x", Oracle(WordRule({})))).value is None
    few = dataclasses.replace(latent, score=latent.score[:3])
    assert "fewer than 4" in asyncio.run(scorer.score(few, "x", Oracle(WordRule({})))).reason


def test_calibration_looks_at_the_other_windows_alone():
    def window(*activations):
        return Window(0, 0, ("x",) * len(activations), activations, "active")

    windows = [window(0.0, 4.0), window(1.0, 1.0), window(0.0, 8.0), window(3.0, 0.0)]
    made = Simulated(windows, [[0.0, 2.0], [5.0, 9.0], [0.0, 4.0], [9.0, 5.0]], 4, 0.0)
    first, second, *_ = calibrated(made)
    assert second == ([10.0, 18.0], [3.0, 3.0])  # from the first and third: twice the level
    assert first[1] == [1.25, 1.25]  # mean of 1, 1, 3, 0
    changed = dataclasses.replace(windows[0], activations=(50.0, 60.0))
    again = calibrated(made._replace(windows=[changed, *windows[1:]]))
    assert again[0] == first


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
    logits = torch.nn.functional.normalize(enc, dim=1) @ words.T
    published = logits.softmax(dim=1) * logits.log_softmax(dim=0)  # p(w|c) log p(c|w)
    assert recall(published) < 0.05


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
    scorers = (Detection(), Simulation())
    result = asyncio.run(score_rule(latent_of(3), WordRule({topic_of(3): 0.9}), scorers))
    assert result[0].value == 1.0
    assert result[1].value > 0.8
    after = WordRule({topic_of(3): 1.0}, previous=True)
    assert after(["x", " " + topic_of(3), " y"]) == [0.0, 0.0, 1.0]

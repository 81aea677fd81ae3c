"""The XOR, trigonometry and dot toys of concept embedding models (arXiv 2209.09056)."""

import numpy as np
import pytest
import torch

from sae.evaluate.concepts import ConceptBottleneck, ConceptEmbedding, corrected, intervention_curve


def xor(generator, n):
    x = generator.random((n, 2))
    concepts = x > 0.5
    return x, concepts, (concepts[:, 0] ^ concepts[:, 1]).astype(int)


def trigonometry(generator, n):
    """As the authors' code makes it: the answer is of the sum of h, not of the concepts."""
    h = generator.normal(size=(n, 3)) * 2
    parts = [np.sin(h) + h, np.cos(h) + h, (h**2).sum(1, keepdims=True)]
    concepts = h > 0
    return np.concatenate(parts, 1), concepts, (h.sum(1) > 1).astype(int)


def dot(generator, n):
    v, w = generator.normal(size=(2, n, 2)) * 2
    concepts = np.stack([v.sum(1) > 0, -w.sum(1) > 0], 1)
    return np.concatenate([v + w, v - w], 1), concepts, ((v * w).sum(1) > 0).astype(int)


def curve(make, head):
    generator = np.random.default_rng(0)
    model = ConceptBottleneck(k=4, head=head).fit(*make(generator, 1009))
    return model, intervention_curve(model, *make(generator, 503))


def test_true_concepts_give_the_true_answer():
    _, result = curve(xor, "tree")
    assert result[-1] == 1.0
    assert result == sorted(result)
    assert result[0] > 0.85


def test_a_linear_head_cannot_take_xor():
    _, result = curve(xor, "linear")
    assert result[-1] < 0.8


@pytest.mark.parametrize("make", [dot, trigonometry])
def test_concepts_that_do_not_decide_the_answer_leave_it_open(make):
    """No correction of the concepts makes it 1: the answer is no function of them."""
    _, result = curve(make, "tree")
    assert 0.6 < result[-1] < 0.9
    assert abs(result[-1] - result[0]) < 0.05


def test_single_concepts_can_be_given():
    model, _ = curve(xor, "tree")
    x = np.array([[0.9, 0.1], [0.9, 0.9]])
    assert model.predict(x).tolist() == [1, 0]
    assert model.predict(x, {1: np.array([True, False])}).tolist() == [0, 1]
    assert model.concepts(x)[0, 0] > 0.5 > model.concepts(x)[0, 1]
    with pytest.raises(ValueError, match=r"given must name concepts 0\.\.1, got 2"):
        model.predict(x, {2: np.array([True, True])})


def test_bad_concepts_are_refused():
    x, concepts, y = xor(np.random.default_rng(0), 23)
    concepts[:, 1] = True
    with pytest.raises(ValueError, match="concept 1 must have both classes, got 23 positive of 23"):
        ConceptBottleneck().fit(x, concepts, y)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        ConceptBottleneck(k=0)


@pytest.mark.parametrize(("make", "least"), [(dot, 0.93), (trigonometry, 0.93)])
def test_embeddings_carry_what_the_concepts_leave_out(make, least):
    """On the authors' data, where no bottleneck can tell the answer, even from true concepts."""
    generator = np.random.default_rng(0)
    model = ConceptEmbedding(seed=1).fit(*make(generator, 3000))
    figures = corrected(model, *make(generator, 503))
    assert figures.accuracy[0] > least
    assert figures.accuracy[-1] > least - 0.05
    assert figures.control[-1] > 0.85  # and past the concepts: those of others change little
    bottleneck = ConceptBottleneck(k=7, head="tree").fit(*make(generator, 3000))
    assert corrected(bottleneck, *make(generator, 503)).control[-1] < 0.65
    assert min(figures.concepts) > 0.9
    again = ConceptEmbedding(seed=1).fit(*make(np.random.default_rng(0), 3000))
    x = make(np.random.default_rng(3), 7)[0]
    assert np.array_equal(again.concepts(x), model.concepts(x))


def test_an_answer_is_of_the_mixed_embeddings():
    """p positive + (1 - p) negative of each concept, by hand from the net's parts."""
    generator = np.random.default_rng(0)
    x, concepts, y = dot(generator, 211)
    model = ConceptEmbedding(width=3, steps=7).fit(x, concepts, y)
    net, rows = model._net, torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    with torch.no_grad():
        both = net.both(net.body(rows)).numpy().reshape(211, 2, 2, 3)
        p = model.concepts(x)
        p[:, 1] = concepts[:, 1]
        mixed = p[..., None] * both[:, :, 0] + (1 - p[..., None]) * both[:, :, 1]
        answer = net.head(torch.tensor(mixed.reshape(211, 6))).argmax(1).numpy()
    assert np.array_equal(model.predict(x, {1: concepts[:, 1]}), answer)
    with pytest.raises(ValueError, match=r"given must name concepts 0..1, got 2"):
        model.predict(x, {2: concepts[:, 1]})


def test_an_embedding_takes_classes_of_any_number():
    x, concepts, y = dot(np.random.default_rng(0), 211)
    model = ConceptEmbedding(steps=3).fit(x, concepts, 7 + 3 * y)
    assert set(model.predict(x).tolist()) <= {7, 10}

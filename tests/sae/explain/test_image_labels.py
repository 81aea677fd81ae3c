"""Planted concepts in images come back; too little evidence gives no name."""

import numpy as np
import pytest
import torch
from scipy import stats

from sae.explain import image_labels
from sae.explain.image_labels import class_enrichment, soft_wpmi, splice, text_cosine
from sae.explain.windows import caption_windows


def planted_images(n: int = 997, rate: float = 0.05, noise: float = 0.05):
    """Latent i fires on the images of concept i; their similarity to it is higher."""
    made, n_latents = torch.Generator().manual_seed(0), 29
    has = torch.rand(n, n_latents, generator=made) < rate
    acts = has * (0.5 + torch.rand(n, n_latents, generator=made))
    similarity = 0.2 * has + noise * torch.randn(n, n_latents, generator=made)
    return acts, similarity, has


def test_soft_wpmi_recovers_planted_concepts_and_shuffling_loses_them():
    acts, similarity, _ = planted_images()
    result = soft_wpmi(acts, similarity)
    assert (result.best == torch.arange(29)).float().mean() >= 0.97
    order = torch.randperm(997, generator=torch.Generator().manual_seed(1))
    shuffled = soft_wpmi(acts, similarity[order])
    assert (shuffled.best == torch.arange(29)).float().mean() <= 0.15


def waves(n: int, m: int) -> torch.Tensor:
    return torch.arange(n * m).double().reshape(n, m)


def test_soft_wpmi_is_that_of_the_published_code(monkeypatch):
    """Values of `soft_wpmi` of the published code, run on these numbers in float64."""
    similarity = 0.3 * torch.sin(1.7 * waves(11, 4) + 0.1 * waves(11, 4) ** 2)
    acts = 1.5 + torch.cos(2.3 * waves(11, 3) + 0.3)
    published = [
        [0.620273741181, -8.160944820089, 0.309438645510, -2.959435770842],
        [-1.103019697777, 1.096375150892, -0.173425722174, 1.080679731953],
        [-0.212332707656, -5.048598984878, -0.227452275833, -6.522484335143],
    ]
    result = soft_wpmi(acts, similarity, top=5)
    assert result.score.tolist() == [pytest.approx(row, abs=1e-9) for row in published]
    assert result.best.tolist() == [0, 1, 0]
    published = [
        [-3.124962749741, -5.199847859979, -3.346604363446, -5.106420199474],
        [-4.231517321263, -2.826810197058, -4.195967037976, -4.560073722587],
        [-3.301392263696, -4.599387136424, -3.805970768159, -4.622442336405],
    ]
    other = soft_wpmi(acts, similarity, top=7, temperature=2.0, weight=0.6)
    assert other.score.tolist() == [pytest.approx(row, abs=1e-9) for row in published]
    monkeypatch.setattr(image_labels, "_WORDS_AT_ONCE", 3)  # of four words, in two parts
    best = soft_wpmi(acts, similarity, top=5, n_best=2)
    assert best.concept.tolist() == [[0, 2], [1, 3], [0, 2]]
    assert (best.score == result.score.gather(1, best.concept)).all()


def test_splice_is_that_of_the_published_code():
    unit = torch.nn.functional.normalize
    concepts = unit(torch.sin(waves(6, 9) ** 2 + 0.5 * waves(6, 9)), dim=1)
    z = unit(unit(torch.cos(3.1 * waves(2, 9)), dim=1) - 0.05, dim=1)
    published = [
        [0.0, 0.150821921453, 0.0, 0.402890027033, 0.199575831591, 0.310784916133],
        [0.298560811820, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    result = splice(z, concepts, penalty=0.25)
    assert result.tolist() == [pytest.approx(row, abs=1e-9) for row in published]


def test_latents_that_fire_on_few_images_are_right_or_silent():
    """The trap: with the top 100 of a latent that fires on 10, silent images make the name."""
    acts, similarity, _ = planted_images(rate=0.006, noise=0.15)
    assert (acts > 0).sum(0).float().mean() < 10
    result = soft_wpmi(acts, similarity)
    named = ~result.abstains
    assert (result.best[named] == torch.arange(29)[named]).float().mean() >= 0.9
    any_order = 1e-9 * torch.rand(acts.shape, generator=torch.Generator().manual_seed(0))
    with_silent = soft_wpmi(acts + any_order, similarity)
    assert (with_silent.best == torch.arange(29)).float().mean() < 0.4
    rare = acts.clone()
    rare[:, 3] = 0
    rare[:4, 3] = 1
    result = soft_wpmi(rare, similarity, least=5)
    assert result.best[3] == -1
    assert result.abstains[3]
    alone = soft_wpmi(torch.zeros(997, 2), similarity)
    assert alone.best.tolist() == [-1, -1]


def test_one_concept_or_other_images_are_refused():
    acts, similarity, has = planted_images(101)
    with pytest.raises(ValueError, match="concepts must be at least two to be told apart, got 1"):
        soft_wpmi(acts, similarity[:, :1])
    with pytest.raises(ValueError, match="activations must be of 101 images, got 100"):
        soft_wpmi(acts[1:], similarity)
    with pytest.raises(ValueError, match="classes must be at least two to be told apart, got 1"):
        class_enrichment(acts.numpy() > 0, has.numpy()[:, :1])
    with pytest.raises(ValueError, match="fires must be of 101 images, got 100"):
        class_enrichment(acts.numpy()[1:] > 0, has.numpy())
    with pytest.raises(ValueError, match="concepts must be at least two to be centred, got 1"):
        text_cosine(torch.randn(3, 5), torch.randn(1, 5))


def test_enrichment_is_fishers_and_a_random_latent_is_not_significant():
    made = np.random.default_rng(0)
    label = made.integers(0, 7, 503)
    has = label[:, None] == np.arange(7)
    fires = has[:, :5] & (made.random((503, 5)) < 0.6)
    fires = np.concatenate([fires, made.random((503, 40)) < 0.1, np.zeros((503, 1), bool)], axis=1)
    result = class_enrichment(fires, has)
    assert result.best[:5].tolist() == list(range(5))
    assert result.best[-1] == -1
    assert (result.p_value[range(5), range(5)] < 1e-20).all()
    assert (result.p_value[5:45].min(1) < 0.01).mean() <= 0.05
    n = [[(fires[:, 6] == f)[has[:, 2] == h].sum() for h in (True, False)] for f in (True, False)]
    exact = stats.fisher_exact(n, alternative="greater").pvalue
    assert result.p_value[6, 2] == pytest.approx(min(7 * exact, 1.0))
    assert result.lift[0, 0] == pytest.approx(503 / has[:, 0].sum())


def test_a_shift_of_all_texts_changes_no_name():
    made = torch.Generator().manual_seed(0)
    texts = torch.randn(23, 31, generator=made)
    directions = texts[:11] - texts.mean(0) + 0.3 * torch.randn(11, 31, generator=made)
    base = text_cosine(directions, texts)
    assert base.argmax(1).tolist() == list(range(11))
    moved = text_cosine(directions, texts + 50 * torch.randn(1, 31, generator=made))
    assert moved == pytest.approx(base, abs=1e-4)


def test_splice_recovers_a_planted_sparse_mix():
    made = torch.Generator().manual_seed(0)
    concepts = torch.nn.functional.normalize(torch.randn(41, 61, generator=made), dim=1)
    weights = torch.zeros(5, 41)
    for row in weights:
        row[torch.randperm(41, generator=made)[:3]] = torch.tensor([1.0, 0.7, 0.5])
    z = weights @ concepts
    result = splice(z, concepts, penalty=0.02)
    assert ((result > 0.05) == (weights > 0)).all()
    assert result == pytest.approx(weights, abs=0.05)
    gradient = 2 * (result @ concepts - z) @ concepts.T + 0.02  # of the objective; KKT
    assert gradient[result > 0].abs().max() < 1e-3
    assert gradient[result == 0].min() > -1e-3
    z[1] = 0  # of nothing there are no concepts
    assert splice(z, concepts, penalty=0.02)[1].abs().sum() == 0
    assert torch.equal(splice(z[1:2], concepts, 0.02), torch.zeros(1, len(concepts)))
    counts = [(splice(z, concepts, p) > 1e-6).sum().item() for p in (0.02, 0.4, 3.0)]
    assert counts == sorted(counts, reverse=True)
    with pytest.raises(ValueError, match=r"penalty must be positive, got 0.0"):
        splice(z, concepts, 0.0)
    with pytest.raises(ValueError, match="concepts must be as wide as z, 61, got 60"):
        splice(z, concepts[:, 1:], 0.1)


def test_captions_stand_for_their_images(latent_of):
    latent = latent_of(3)
    captions = [f"report {i}" for i in range(100)]
    result = caption_windows(latent, captions)
    assert result.score[0].tokens == (f"report {latent.score[0].example}",)
    assert [w.peak for w in result.explain] == [w.peak for w in latent.explain]
    assert result.score[0].marks() == (True,)

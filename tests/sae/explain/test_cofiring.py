"""Co-firing against numpy's correlation, and clusters of directions that are known."""

import numpy as np
import torch

from sae.explain.atlas import cluster_names, clusters
from sae.explain.firings import Codes, cofiring

N_ROWS, D_SAE = 397, 23


def codes_of(fires: np.ndarray) -> Codes:
    latent, row = np.nonzero(fires.T)
    counts = fires.sum(axis=0).astype(np.int64)
    return Codes(counts, row.astype(np.int32), np.ones(len(latent), np.float32), len(fires))


def firings() -> np.ndarray:
    rng = np.random.default_rng(0)
    fires = rng.random((N_ROWS, D_SAE)) < rng.uniform(0.05, 0.6, D_SAE)
    fires[:, 7] = fires[:, 3] ^ (rng.random(N_ROWS) < 0.02)
    fires[:, 11] = False
    fires[:, 13] = True
    return fires


def test_correlations_are_pearsons_of_the_firings(monkeypatch) -> None:
    monkeypatch.setattr("sae.explain.firings._LATENTS_AT_ONCE", 5)
    fires = firings()
    result = cofiring(codes_of(fires), D_SAE, least=1)
    live = [i for i in range(D_SAE) if i not in (11, 13)]
    expected = np.corrcoef(fires[:, live].T.astype(float))
    for place, latent in enumerate(live):
        known = {other.latent: other for other in result[latent]}
        for at, other in enumerate(live):
            if other == latent or expected[place, at] <= 0:
                assert other not in known
                continue
            np.testing.assert_allclose(known[other].correlation, expected[place, at], atol=1e-6)
            assert known[other].n_rows == (fires[:, latent] & fires[:, other]).sum()
        values = [other.correlation for other in result[latent]]
        assert values == sorted(values, reverse=True)
    assert result[11] == result[13] == ()  # never and always: nothing goes together with them
    assert result[3][0].latent == 7


def test_few_rows_in_common_say_nothing() -> None:
    fires = np.zeros((N_ROWS, 3), bool)
    fires[:4, :2] = True
    assert cofiring(codes_of(fires), 2, least=5) == [(), (), ()]
    assert [other.latent for other in cofiring(codes_of(fires), 2, least=4)[0]] == [1]


def test_only_the_best_are_kept() -> None:
    assert max(len(result) for result in cofiring(codes_of(firings()), 2, least=1)) == 2


def test_clusters_are_the_directions_that_lie_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 17)
    sizes = (29, 7, 13)
    which = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    rows = centres[which] * 5 + 0.1 * torch.randn(49, 17, generator=generator)
    result = clusters(rows, 3)
    assert result.bincount().tolist() == [29, 13, 7]  # the largest first
    assert result.tolist() == [0] * 29 + [2] * 7 + [1] * 13


def test_clusters_are_named_by_words_that_are_theirs() -> None:
    words = [("the", "cat"), ("the", "cat"), ("the", "dog"), (), ("the", "dog"), ("the", "fox")]
    names = cluster_names(torch.tensor([0, 0, 1, 1, 1, 2]), words, 4, n_words=1)
    assert names == ["cat", "dog", "fox", ""]

"""The map of planted dictionaries: neighbours, parents, the completeness curve, search."""

import importlib.util

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from sae.explain import atlas as plane_module
from sae.explain.atlas import plane, share_preserved
from sae.explain.firings import CAUTION, MaxCorrelation
from sae.explain.labels import completeness
from sae.neighbours import chance_cosine


def clusters(n: int = 13, size: int = 5, d: int = 31, noise: float = 0.1) -> torch.Tensor:
    made = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(n, d, generator=made), dim=1)
    rows = centres.repeat_interleave(size, 0)
    return rows + noise * torch.randn(rows.shape, generator=made) / d**0.5


def test_pca_is_the_two_principal_axes():
    rows = clusters()
    result = plane(rows, "pca")
    unit = torch.nn.functional.normalize(rows, dim=1)
    values = torch.linalg.svdvals(unit - unit.mean(0))
    assert result.norm(dim=0) == pytest.approx(values[:2].tolist(), rel=1e-4)
    assert torch.allclose(plane(rows * 3, "pca"), result, atol=1e-4)


def same_cluster(at: torch.Tensor, size: int) -> float:
    """Share of points whose nearest point is of their planted cluster."""
    distance = torch.cdist(at, at).fill_diagonal_(torch.inf)
    return float((distance.argmin(1) // size == torch.arange(len(at)) // size).float().mean())


def test_tsne_keeps_planted_neighbourhoods_that_pca_mixes():
    rows = clusters(29, 20, noise=0.4)
    result = plane(rows)
    assert same_cluster(result, 20) > 0.98
    assert same_cluster(plane(rows, "pca"), 20) < 0.8
    assert share_preserved(rows, result) > 2 * share_preserved(rows, plane(rows, "pca"))


def test_tsne_is_the_same_with_one_and_two_threads():
    rows, before, result = clusters(31, 29), torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            with threadpool_limits(n_threads):
                result.append(plane(rows))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*result)


def test_a_large_dictionary_is_laid_out_by_a_sample(monkeypatch):
    rows = clusters(29, 20)
    monkeypatch.setattr(plane_module, "LARGE", 580)
    monkeypatch.setattr(plane_module, "_SAMPLE", 290)
    result = plane(rows)
    assert result.isfinite().all()
    assert same_cluster(result, 20) > 0.95
    sample = torch.linspace(0, 579, 290).round().long()
    assert torch.equal(result[sample], plane(rows[sample]))


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize(
    "rows",
    [
        torch.eye(3),
        clusters(5, 1),
        torch.zeros(7, 31),
        torch.ones(23, 31),
        torch.cat([clusters(3, 1).repeat_interleave(40, 0), torch.zeros(2, 31)]),
    ],
    ids=["3", "5", "zeros", "equal", "duplicates"],
)
def test_hard_directions_have_finite_points(rows, method):
    result = plane(rows, method)
    assert result.shape == (len(rows), 2)
    assert result.isfinite().all()
    assert 0 <= share_preserved(rows, result) <= 1


def test_a_plane_refuses_too_few_latents_and_numbers_that_are_none():
    for n in (1, 2):
        with pytest.raises(ValueError, match=f"must be at least 3 latents for a map, got {n}"):
            plane(clusters()[:n])
    rows = clusters()
    rows[[3, 5], 2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match="must be finite, got 2 rows with nan or infinity"):
        plane(rows)


def test_the_share_kept_is_counted():
    angle = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0])
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    line = torch.stack([angle, torch.zeros(5)], dim=1)
    assert share_preserved(rows, line, k=1) == 1.0
    swapped = line[[4, 1, 2, 3, 0]]  # nearest points: 3, 4, 1, 2, 1; directions: 1, 0, 1, 2, 3
    assert share_preserved(rows, swapped, k=1) == pytest.approx(2 / 5)


def test_chance_is_drawn_apart_from_the_seeds_of_dictionaries():
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 31, generator=made)
    assert 0.5 < chance_cosine(rows) < 0.85
    assert chance_cosine(rows) != chance_cosine(rows, seed=1)


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="umap is installed")
def test_umap_is_an_extra():
    with pytest.raises(
        ValueError,
        match=r"must have the package umap, got none; run `pip install 'monosema\[umap\]'`",
    ):
        plane(clusters(), "umap")


def test_completeness_finds_the_planted_half_way_point_at_three_widths():
    made, products = np.random.default_rng(0), []
    for n_alive in (1_000, 4_000, 16_000):
        frequency = 10 ** made.uniform(-6, -2, 400)
        middle = np.log(0.7 / n_alive)  # "slightly below 1 / alive", as was found
        present = made.random(400) < 1 / (1 + np.exp(-1.5 * (np.log(frequency) - middle)))
        result = completeness(frequency, present, n_alive)
        assert result.low < 0.7 / n_alive < result.high
        assert result.slope == pytest.approx(1.5, rel=0.3)
        assert result.n == 400
        products.append(result.times_alive)
    assert products == pytest.approx([0.7] * 3, rel=0.35)  # the curves fall together


def test_completeness_needs_both():
    frequency = np.geomspace(1e-6, 1e-2, 13)
    for present in (np.ones(13, bool), np.zeros(13, bool)):
        with pytest.raises(
            ValueError, match=r"present must hold both .* add rarer or more frequent"
        ):
            completeness(frequency, present, 100)
    with pytest.raises(
        ValueError, match="frequency must be at least 10 numbers above 0, got 13 of"
    ):
        completeness(np.zeros(13), np.arange(13) > 5, 100)
    step = completeness(frequency, np.arange(13) > 6, 100)  # separable: finite all the same
    assert frequency[6] < step.f50 < frequency[7]


def test_a_search_comes_with_its_caution():
    assert "says nothing about" in CAUTION


def test_correlation_is_numpys_and_a_copy_has_one():
    made = np.random.default_rng(0)
    acts, units = np.maximum(made.normal(size=(211, 7)), 0), made.normal(size=(211, 13)) + 100
    units[:, 3] = -2 * acts[:, 4] + 5
    acts[:, 6] = 0
    meter = MaxCorrelation(7, 13)
    for part in np.array_split(np.arange(211), 5):
        meter.update(torch.tensor(acts[part]).float(), torch.tensor(units[part]).float())
    result = meter.compute()
    expected = np.abs(np.corrcoef(acts[:, :6].T, units.T)[:6, 6:]).max(1)
    assert result[:6].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert result[4] == pytest.approx(1.0, abs=1e-5)
    assert result[6].isnan()

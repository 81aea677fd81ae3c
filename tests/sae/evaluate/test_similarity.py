"""What every measure of similarity must say of copies and of independent rows."""

import math

import pytest
import torch

from sae.evaluate.alignment import permutation_null
from sae.evaluate.similarity import (
    biased_hsic,
    cka,
    cknna,
    distance_correlation,
    procrustes_distance,
    pwcca,
    rotation_onto,
    rsa,
    svcca,
)

INVARIANT = {
    "cka": cka,
    "biased cka": lambda x, y: cka(x, y, debiased=False),
    "cknna": lambda x, y: cknna(x, y, k=7),
    "svcca": svcca,
    "pwcca": pwcca,
    "rsa": rsa,
    "distance correlation": distance_correlation,
    "procrustes": lambda x, y: 1 - procrustes_distance(x, y),
}


@pytest.mark.parametrize("measure", INVARIANT.values(), ids=INVARIANT)
def test_a_rotated_scaled_and_shifted_copy_is_1(measure, draw, rotation):
    x = draw(101, 13) * torch.arange(1, 14)
    assert measure(x, x) == pytest.approx(1, abs=1e-9)
    assert measure(x, 3 * x @ rotation(13) + 5) == pytest.approx(1, abs=1e-9)
    assert measure(x.float(), x.float()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("measure", INVARIANT.values(), ids=INVARIANT)
def test_less_noise_is_more_alike(measure, draw):
    x, noise = draw(101, 13), draw(101, 13, seed=1)
    values = [measure(x, x + size * noise) for size in (0.1, 0.5, 2.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.8 > values[2]


def test_the_bias_of_cka_is_what_is_published(draw):
    x, y = draw(100, 512), draw(100, 512, seed=1)
    assert cka(x, y, debiased=False) == pytest.approx(0.84, abs=0.01)
    assert cka(x, y) == pytest.approx(0, abs=0.03)


def test_debiased_cka_of_independent_rows_is_0_on_average(draw):
    results = [cka(draw(23, 47, seed=2 * i), draw(23, 47, seed=2 * i + 1)) for i in range(200)]
    assert sum(results) / 200 == pytest.approx(0, abs=0.02)


def test_biased_hsic_is_its_definition(draw):
    k, l_ = (rows @ rows.T for rows in (draw(7, 3), draw(7, 5, seed=1)))
    h = torch.eye(7) - torch.full((7, 7), 1 / 7)
    h = h.double()
    assert biased_hsic(k, l_) == pytest.approx(float((k @ h @ l_ @ h).trace()) / 36)


def test_cknna_of_all_neighbours_is_debiased_cka(draw):
    x, y = draw(31, 5), draw(31, 7, seed=1)
    assert cknna(x, y, k=30) == pytest.approx(cka(x, y), abs=1e-9)


def test_svcca_leaves_small_components_out(draw):
    x, noise = draw(211, 3), draw(211, 7, seed=1)
    y = torch.cat([x, noise * 0.001], 1)
    other = torch.cat([x, draw(211, 7, seed=2) * 0.001], 1)
    assert svcca(y, other) == pytest.approx(1, abs=1e-3)
    assert svcca(y, other, variance=1.0) < 0.6


def test_pwcca_weighs_by_what_x_accounts_for(draw):
    """Of two equal correlations, 1 and 0, the one along the larger part of x counts more."""
    x = draw(997, 2) * torch.tensor([9.0, 1.0])
    large = torch.stack([x[:, 0], draw(997, 1, seed=3)[:, 0]], 1)
    small = torch.stack([draw(997, 1, seed=4)[:, 0], x[:, 1]], 1)
    assert pwcca(x, large) == pytest.approx(0.9, abs=0.03)
    assert pwcca(x, small) == pytest.approx(0.1, abs=0.06)


def test_canonical_correlations_need_more_rows_than_directions(draw):
    with pytest.raises(
        ValueError, match=r"more rows than directions of both sides \(20\).*17 rows"
    ):
        pwcca(draw(17, 7), draw(17, 13, seed=1))
    with pytest.raises(ValueError, match=r"variance must be above 0 and at most 1, got 1\.5"):
        svcca(draw(17, 3), draw(17, 3), variance=1.5)


def test_rsa_sees_order_alone_and_its_dissimilarities_differ(draw, rotation):
    x = draw(41, 5)
    assert rsa(x, x * 7, "cosine") == pytest.approx(1)
    assert rsa(x, x @ rotation(5), "cosine") == pytest.approx(1)
    assert rsa(x, x @ rotation(5), "correlation") < 0.999
    assert rsa(x, x * 3 + 2, "correlation") == pytest.approx(1)
    assert abs(rsa(x, draw(41, 5, seed=5))) < 0.1
    assert math.isnan(rsa(x, torch.ones(41, 3)))


def test_procrustes_has_its_closed_form(draw, rotation):
    x = draw(53, 7)
    narrow = x[:, :3]
    a, b = (rows - rows.mean(0) for rows in (x, narrow))
    a, b = a / a.norm(), b / b.norm()
    nuclear = torch.linalg.svdvals(a.T @ b).sum()
    assert procrustes_distance(x, narrow) == pytest.approx(float(2 - 2 * nuclear))
    assert procrustes_distance(x, draw(53, 7, seed=1)) > 0.5
    turn = rotation(7)
    assert torch.allclose(rotation_onto(x, x @ turn), turn)
    assert math.isnan(procrustes_distance(x, torch.ones(53, 2)))


def test_distance_correlation_sees_what_no_correlation_does(draw):
    x = draw(503, 1)
    y = x.square()
    assert abs(float((x * (y - y.mean())).mean())) < 0.3  # no line
    assert distance_correlation(x, y) > 0.2
    results = [
        distance_correlation(draw(53, 3, seed=i), draw(53, 5, seed=99 + i)) for i in range(99)
    ]
    assert sum(results) / 99 == pytest.approx(0, abs=0.02)
    assert distance_correlation(draw(53, 211), draw(53, 307, seed=1), debiased=False) > 0.9
    assert distance_correlation(draw(53, 211), draw(53, 307, seed=1)) < 0.2
    assert math.isnan(distance_correlation(torch.ones(5, 3), draw(5, 3)))


def test_biased_distance_correlation_is_its_definition():
    """Three distances by hand: 0, 1, 3 on a line, centred twice."""
    a = torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0], [0, 1, 3]])[:, [0, 1, 2, 0]]
    x = torch.tensor([[0.0], [1.0], [3.0], [0.0]])
    h = torch.eye(4) - 1 / 4
    centred = h @ a @ h
    y = x.square()
    b = h @ (y - y.T).abs() @ h
    expected = (centred * b).sum() / (centred.norm() * b.norm())
    assert distance_correlation(x, y, debiased=False) == pytest.approx(float(expected))


def test_a_permutation_null_tells_signal_from_chance(draw):
    x = draw(61, 40)
    y = x + draw(61, 40, seed=1)
    generator = torch.Generator().manual_seed(0)
    biased = lambda a, b: cka(a, b, debiased=False)  # noqa: E731
    result = permutation_null(biased, x, y, n_permutations=99, generator=generator)
    assert result.p == 0.01
    assert result.floor > 0.3
    assert result.value > result.high > result.floor
    chance = permutation_null(
        biased, x, draw(61, 40, seed=7), n_permutations=99, generator=generator
    )
    assert chance.p > 0.05


@pytest.mark.parametrize("measure", [cka, cknna, svcca, pwcca, rsa, procrustes_distance])
def test_rows_of_other_examples_are_refused(measure, draw):
    with pytest.raises(ValueError, match="each of the same examples, got 31 and 29 rows"):
        measure(draw(31, 3), draw(29, 3))
    broken = draw(31, 3)
    broken[4, 1] = math.inf
    with pytest.raises(ValueError, match="y must be finite, got nan or inf"):
        measure(draw(31, 3), broken)


def test_small_sets_and_neighbourhoods_are_refused(draw):
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        cka(draw(3, 2), draw(3, 2))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.10 for 11 rows, got 11"):
        cknna(draw(11, 2), draw(11, 2), k=11)
    with pytest.raises(ValueError, match="n_permutations must be at least 1, got 0"):
        permutation_null(cka, draw(5, 2), draw(5, 2), n_permutations=0, generator=torch.Generator())


def test_constant_rows_have_no_cka(draw):
    assert math.isnan(cka(torch.ones(7, 3), draw(7, 2)))

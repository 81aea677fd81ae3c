import math

import pytest
import torch

from sae.evaluate.reconstruction import description_length, entropies, meta_score
from sae.evaluate.structure import hedging
from sae.neighbours import splitting


def test_planted_children_are_found_under_their_parent(draw_float32):
    narrow = torch.linalg.qr(draw_float32(31, 13)).Q.T
    children = narrow[[4, 4, 7]] + 0.2 * torch.linalg.qr(draw_float32(31, 20, seed=1)).Q.T[:3]
    new = draw_float32(5, 31, seed=2)
    new = new - new @ narrow.T @ narrow
    result = splitting(narrow, torch.cat([children, new]))
    assert result.parent.tolist() == [4, 4, 7, -1, -1, -1, -1, -1]
    assert result.n_children[[4, 7, 0]].tolist() == [2, 1, 0]
    assert result.split == pytest.approx(1 / 13)
    assert result.novel == pytest.approx(5 / 8)


def test_decoders_of_other_streams_are_refused(draw_float32):
    with pytest.raises(ValueError, match="must be as wide as among, 7, got 5"):
        splitting(draw_float32(3, 7), draw_float32(3, 5))
    with pytest.raises(ValueError, match=r"related must be in 0\.\.1, got 2"):
        splitting(draw_float32(3, 7), draw_float32(3, 7), related=2.0)


def test_a_latent_tilted_towards_an_untracked_feature_hedges_by_its_angle():
    directions = torch.eye(3, 7)
    tilt = torch.stack([
        math.cos(0.4) * directions[0] + math.sin(0.4) * directions[2],
        5 * directions[1],
    ])
    assert hedging(directions, tilt).tolist() == pytest.approx([math.sin(0.4) ** 2, 0])
    # With a latent for the third feature nothing is left to hedge.
    assert hedging(directions, torch.cat([tilt, directions[2:]])).tolist() == [0, 0, 0]


def test_a_narrow_dictionary_of_correlated_features_hedges(draw_float32):
    """The best single direction of two features that fire together is between them."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2003, generator=generator) < 0.3
    second = first & (torch.rand(2003, generator=generator) < 0.7)
    directions = torch.eye(2, 5)
    x = first[:, None] * directions[0] + second[:, None] * directions[1]
    best = torch.linalg.svd(x, full_matrices=False).Vh[:1]
    assert 0.1 < float(hedging(directions, best)[0]) < 0.5


def test_entropies_are_known():
    level = torch.zeros(64, 4, dtype=torch.int64)
    level[:16, 1] = 5  # fires in a quarter
    level[:, 2] = torch.arange(64) % 8
    level[:, 3] = torch.arange(64)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert entropies(level).tolist() == pytest.approx([0, quarter, 3, 6])


def test_coarser_steps_take_fewer_bits_and_lose_more(draw_float32, relu_dictionary):
    both = torch.cat([torch.eye(7), -torch.eye(7)])
    dictionary, x = relu_dictionary(both), draw_float32(997, 7)
    fine, coarse = (description_length(dictionary, x, step) for step in (0.01, 0.5))
    assert fine.bits > coarse.bits > 0
    assert fine.fvu == pytest.approx(0.01**2 / 12, rel=0.1)
    assert coarse.fvu == pytest.approx(0.5**2 / 12, rel=0.1)
    # A Gaussian at a fine step has its differential entropy less log2(step).
    one_side = (description_length(dictionary, x, 0.5).bits) / 7
    gaussian = 0.5 * math.log2(2 * math.pi * math.e) + 1
    assert one_side == pytest.approx(gaussian, rel=0.25)


def test_rounding_needs_a_step_and_rows(draw_float32, relu_dictionary):
    with pytest.raises(ValueError, match="step must be above 0 and x have rows, got 0"):
        description_length(relu_dictionary(draw_float32(5, 7)), draw_float32(3, 7), 0.0)


def test_composed_directions_are_explained_and_random_ones_are_not(draw_float32):
    parts = torch.linalg.qr(draw_float32(47, 19)).Q.T
    generator = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(19, generator=generator)[:2] for _ in range(211)])
    seen = []
    result = meta_score(
        parts[chosen].sum(1), d_meta=23, k=2, steps=300,
        progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    assert result.explained > 0.75
    assert result.chance < 0.4
    assert seen[-1] == (600, 600, "steps")
    with pytest.raises(ValueError, match=r"k must be in 1\.\.2, the number of meta-latents, got 4"):
        meta_score(draw_float32(11, 7))

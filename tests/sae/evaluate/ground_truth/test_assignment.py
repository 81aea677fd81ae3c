from itertools import permutations

import pytest
import torch

from sae.evaluate.ground_truth.scores import assign


def best_by_trying(values):
    if values.shape[0] > values.shape[1]:
        values = values.T
    rows = range(values.shape[0])
    orders = permutations(range(values.shape[1]), len(rows))
    return max(float(values[rows, list(order)].sum()) for order in orders)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 3), (3, 5), (5, 3), (7, 7), (7, 2)])
@pytest.mark.parametrize("seed", range(7))
def test_the_sum_is_that_of_the_best_of_all_assignments(shape, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    pairs = assign(values)
    assert len(pairs.features) == min(shape)
    assert len(set(pairs.features.tolist())) == len(set(pairs.latents.tolist())) == min(shape)
    result = float(values[pairs.features, pairs.latents].sum())
    assert result == pytest.approx(best_by_trying(values), abs=1e-12)


def test_greed_does_not_pay():
    # The largest value is no part of the best assignment.
    pairs = assign(torch.tensor([[10.0, 9.0], [9.0, 1.0]]))
    assert pairs.features.tolist() == [0, 1]
    assert pairs.latents.tolist() == [1, 0]


def test_a_permutation_is_found_among_ties():
    order = torch.randperm(53, generator=torch.Generator().manual_seed(2))
    pairs = assign(torch.eye(53)[:, order].float())
    assert torch.equal(order[pairs.latents], pairs.features)


def test_a_narrow_dictionary_has_each_latent_once():
    values = torch.rand(53, 11, generator=torch.Generator().manual_seed(1))
    pairs = assign(values)
    assert pairs.latents.tolist() == list(range(11))
    assert len(pairs.features.unique()) == 11

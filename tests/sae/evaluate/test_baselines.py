import pytest
import torch

from sae.baselines import (
    covariance_of,
    permuted_decoder,
    principal_components,
    random_dictionary,
    raw_neurons,
)
from sae.evaluate.reconstruction import measure_reconstruction
from sae.metrics import fvu


def test_the_covariance_is_that_of_the_rows(cache, hook_point):
    rows, seen = cache.rows(("hold",)), []
    result = covariance_of(cache, hook_point, rows, progress=lambda *counts: seen.append(counts))
    expected = torch.cov(cache[hook_point][rows].double().T, correction=0)
    assert torch.allclose(result, expected, atol=1e-9)
    assert seen == [(96, 96, "rows of the covariance")]
    with pytest.raises(ValueError, match="rows must be at least 1, got none"):
        covariance_of(cache, hook_point, rows[:0])


@pytest.mark.parametrize("k", [1, 3, 8])
def test_principal_components_leave_the_tail_of_the_eigenvalues(cache, hook_point, k):
    rows = cache.rows()
    x = cache[hook_point][rows]
    covariance = covariance_of(cache, hook_point, rows)
    result = measure_reconstruction(
        {"pca": principal_components(x.mean(0), covariance, k)}, cache, hook_point, rows
    )["pca"].reconstruction
    values = torch.linalg.eigvalsh(covariance)
    assert result.fvu == pytest.approx(float(values[: 8 - k].sum() / values.sum()), abs=1e-6)
    assert result.l0 == pytest.approx(k)


def test_raw_neurons_keep_the_k_farthest_dimensions():
    x = torch.tensor([[5.0, 1.0, -4.0, 2.0], [0.0, 9.0, 0.5, 0.0]])
    mean = torch.tensor([1.0, 1.0, 1.0, 1.0])
    result = raw_neurons(mean, 2)(x)
    assert torch.equal(result, torch.tensor([[5.0, 1.0, -4.0, 1.0], [0.0, 9.0, 1.0, 1.0]]))
    assert fvu(x, raw_neurons(mean, 4)(x)) == 0


def test_a_random_dictionary_fires_as_often_and_finds_nothing(random_dictionary_of, identity):
    x = torch.randn(101, 8, generator=torch.Generator().manual_seed(1))
    result = random_dictionary_of(identity, 3.4)
    assert (result.encode_dense(x) != 0).sum(1).max() == 3
    assert result.config.d_sae == identity.config.d_sae
    assert fvu(x, result(x)) > 0.3 > fvu(x, identity(x))


@pytest.fixture
def random_dictionary_of():
    return lambda like, l0: random_dictionary(like, l0, torch.Generator().manual_seed(2))


def test_a_permuted_decoder_keeps_the_latents_and_loses_the_rows(identity):
    x = torch.randn(101, 8, generator=torch.Generator().manual_seed(1))
    result = permuted_decoder(identity, torch.Generator().manual_seed(3))
    assert torch.equal(result.encode_dense(x), identity.encode_dense(x))
    assert fvu(x, result(x)) > 0.7
    assert fvu(x, identity(x)) < 1e-9


@pytest.mark.parametrize("k", [0, 9])
def test_more_components_than_dimensions_are_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in 1\.\.8, the width of the rows, got {k}"):
        raw_neurons(torch.zeros(8), k)

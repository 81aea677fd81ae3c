"""The sparse codes hold exactly what the dictionary gives."""

import numpy as np
import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.explain import firings as module
from sae.explain.firings import concatenated_ranges, encode_rows

D_IN, D_SAE = 7, 23


def _random_dictionary(d_in: int, d_sae: int) -> SparseAutoencoder:
    made = torch.Generator().manual_seed(1)
    dictionary = SparseAutoencoder(
        SAEConfig(d_in=d_in, d_sae=d_sae, activation=ReLU(), b_in="none")
    )
    with torch.no_grad():
        dictionary.enc_rows.copy_(torch.randn(d_sae, d_in, generator=made))
        dictionary.b_enc.fill_(-1.5)
    return dictionary


@pytest.mark.parametrize("chunk", [1, 13, 97, 4096])
def test_codes_equal_the_dense_activations(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_ROWS_PER_CHUNK", chunk)
    dictionary = _random_dictionary(D_IN, D_SAE)
    x = torch.randn(101, D_IN, generator=torch.Generator().manual_seed(2))
    ids = torch.randperm(101, generator=torch.Generator().manual_seed(3))[:89]
    seen: list[tuple[int, int]] = []
    codes = encode_rows(dictionary, x, ids, lambda done, total, unit: seen.append((done, total)))
    dense = dictionary.encode_dense(x[ids]).detach().numpy()
    rebuilt = np.zeros_like(dense)
    for latent in range(D_SAE):
        rows, values = codes.of(latent)
        assert (np.diff(rows) > 0).all()
        rebuilt[rows, latent] = values
    np.testing.assert_allclose(rebuilt, dense, rtol=1e-4, atol=1e-6)
    assert (codes.n_fired == (dense > 0).sum(axis=0)).all()
    assert codes.n_rows == 89
    assert seen[-1] == (89, 89)
    assert len(seen) == -(-89 // chunk)


def test_an_entry_takes_eight_bytes():
    dictionary = _random_dictionary(D_IN, D_SAE)
    codes = encode_rows(dictionary, torch.randn(101, D_IN), torch.arange(101))
    assert codes.nbytes == 8 * len(codes.row) + 8 * D_SAE


def test_latents_beyond_sixteen_bits_keep_their_numbers():
    d_sae = 65_537
    dictionary = SparseAutoencoder(SAEConfig(d_in=1, d_sae=d_sae, activation=ReLU(), b_in="none"))
    with torch.no_grad():
        dictionary.enc_rows[[3, d_sae - 1]] = torch.tensor([[1.0], [2.0]])
    codes = encode_rows(dictionary, torch.tensor([[1.0], [-1.0], [3.0]]), torch.arange(3))
    assert np.flatnonzero(codes.n_fired).tolist() == [3, d_sae - 1]
    assert codes.of(d_sae - 1).rows.tolist() == [0, 2]
    assert codes.of(d_sae - 1).values.tolist() == [2.0, 6.0]


def test_block_and_take_agree_with_of():
    dictionary = _random_dictionary(D_IN, D_SAE)
    codes = encode_rows(dictionary, torch.randn(101, D_IN), torch.arange(101))
    chosen = np.array([19, 2, 11, 3])
    for entries, latents in ((codes.take(chosen), chosen), (codes.block(5, 16), range(5, 16))):
        for group, latent in enumerate(latents):
            assert (entries.row[entries.group == group] == codes.of(int(latent)).rows).all()


def test_activations_that_are_not_finite_are_refused():
    x = torch.zeros(3, D_IN)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="activations must be finite, got others in rows 0 to 2"):
        encode_rows(_random_dictionary(D_IN, D_SAE), x, torch.arange(3))


def test_concatenated_ranges():
    result = concatenated_ranges(np.array([5, 40, 2]), np.array([2, 0, 3]))
    assert result.tolist() == [5, 6, 2, 3, 4]

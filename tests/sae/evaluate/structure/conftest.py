import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder


@pytest.fixture
def draw():
    def rows(n, d, seed=0):
        return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

    return rows


@pytest.fixture
def relu_dictionary():
    """A ReLU dictionary with the given rows."""

    def make(enc_rows, dec_rows=None, b_enc=None):
        d_sae, d_in = enc_rows.shape
        config = SAEConfig(d_in=d_in, d_sae=d_sae, activation=ReLU(), b_in="none")
        dictionary = SparseAutoencoder(config)
        dictionary.enc_rows.data.copy_(enc_rows)
        dictionary.dec_rows.data.copy_(enc_rows if dec_rows is None else dec_rows)
        if b_enc is not None:
            dictionary.b_enc.data.copy_(b_enc)
        return dictionary.requires_grad_(False)

    return make

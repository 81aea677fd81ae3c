import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.ground_truth.config import GroundTruthConfig, Zipf


@pytest.fixture(scope="session")
def easy():
    """Fewer features than dimensions and no noise, so that a linear encoder can read them all."""
    return GroundTruthConfig(
        n_features=13, d_model=17, firing=Zipf(highest=0.3, lowest=0.05), bias=0.7, n_rows=3001
    )


@pytest.fixture
def dictionary_of():
    """Makes a ReLU dictionary that reads given encoder rows and writes given decoder rows.

    A pre-activation must pass 0.01, so that rounding does not fire.
    """

    def make(enc_rows, dec_rows, bias, input_scale=1.0):
        d_sae, d_model = dec_rows.shape
        config = SAEConfig(d_in=d_model, d_sae=d_sae, activation=ReLU(), input_scale=input_scale)
        dictionary = SparseAutoencoder(config)
        dictionary.enc_rows.data.copy_(enc_rows / input_scale)
        dictionary.dec_rows.data.copy_(dec_rows * input_scale)
        dictionary.b_enc.data.fill_(-0.01)
        dictionary.b_dec.data.copy_(bias * input_scale)
        return dictionary.requires_grad_(False)

    return make


@pytest.fixture
def perfect(dictionary_of):
    """Makes the dictionary of a world with fewer features than dimensions that reads its truth."""

    def make(world, input_scale=1.0):
        inverse = torch.linalg.pinv(world.directions).T
        return dictionary_of(inverse, world.directions, world.bias, input_scale)

    return make

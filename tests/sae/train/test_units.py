import dataclasses

import pytest
import torch

from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.initialise import units
from sae.train.step import TrainStep


def test_centred_rows_get_the_mean_square_norm_d_in_and_b_dec_their_mean(planted):
    x = planted(1)[0].double()
    mean, size = x.mean(0), float(x.square().sum(1).mean())
    scale, start = units(mean.float(), size, DictionaryConfig(d_sae=53))
    centred = (x - mean) * scale
    assert float(centred.square().sum(1).mean()) == pytest.approx(13, rel=1e-4)
    torch.testing.assert_close(start, mean.float())


@pytest.mark.parametrize("norm", ["layer_norm", "rms"])
def test_normed_rows_have_that_size_by_themselves(norm):
    x = torch.randn(101, 13, generator=torch.Generator().manual_seed(0)) * 7 + 2
    config = DictionaryConfig(d_sae=53, input_norm=norm)
    scale, start = units(x.mean(0), float(x.square().sum(1).mean()), config)
    assert (scale, start) == (1.0, None)
    u = SparseAutoencoder(config.architecture(13, scale)).scaled(x)
    assert float(u.square().sum(1).mean()) == pytest.approx(
        12 if norm == "layer_norm" else 13, rel=1e-4
    )


@pytest.mark.parametrize("fields", [{"skip": True}, {"output_scale": 2.0}, {"b_in": "own"}])
def test_an_autoencoder_that_is_not_what_the_config_says_is_not_trained(fields):
    config = DictionaryConfig(d_sae=53)
    form = dataclasses.replace(config.architecture(13, 0.5), **fields)
    with pytest.raises(ValueError, match="autoencoder must be what the config describes"):
        TrainStep(SparseAutoencoder(form), config, 10)

import json

import pytest
import torch

from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.evaluate.saebench import ForSAEBench


def wrapped(**form):
    config = SAEConfig(d_in=7, d_sae=23, activation=TopK(k=3), input_scale=0.5, **form)
    dictionary = SparseAutoencoder(config)
    initialise(dictionary, torch.Generator().manual_seed(0), decoder_norm=3.0)
    dictionary.b_dec.data += 0.7
    face = ForSAEBench(
        dictionary, model_name="gpt2", hook_name="blocks.5.hook_resid_post", hook_layer=5
    )
    return dictionary, face


def test_it_reconstructs_as_the_dictionary_does_at_any_shape():
    dictionary, face = wrapped()
    x = torch.randn(5, 11, 7, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(face(x), dictionary(x.flatten(0, 1)).view(5, 11, 7), atol=1e-5)
    assert face.encode(x).shape == (5, 11, 23)
    assert torch.equal(face.encode(x[0]) != 0, dictionary.encode_dense(x[0]) != 0)
    assert torch.allclose(face.W_dec.norm(dim=1), torch.ones(23))


def test_it_has_the_attributes_that_are_read():
    _, face = wrapped()
    assert (face.W_enc.shape, face.W_dec.shape) == ((7, 23), (23, 7))
    assert (face.b_enc.shape, face.b_dec.shape) == ((23,), (7,))
    assert (face.device.type, face.dtype) == ("cpu", torch.float32)
    assert (face.cfg.d_sae, face.cfg.hook_layer, face.cfg.model_name) == (23, 5, "gpt2")


def test_its_config_is_written_without_what_saebench_attaches():
    _, face = wrapped()
    face.cfg.metadata, face.cfg.context_size = object(), 128  # as its standardisation does
    written = json.loads(json.dumps(face.cfg.to_dict()))
    assert written["context_size"] == 128
    assert written["architecture"] == "topk"
    assert "metadata" not in written


def test_what_decodes_from_more_than_latents_is_refused():
    with pytest.raises(ValueError, match="decodes from latents alone, got one with a skip"):
        wrapped(skip=True)

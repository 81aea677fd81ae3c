"""The logit lens reads the direct path from a decoder row to the tokens."""

import pytest
import torch

from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder
from sae.explain import logit_lens as module
from sae.explain.logit_lens import promoted_tokens

D_MODEL, D_SAE, VOCAB = 7, 23, 101


@pytest.fixture
def dictionary() -> SparseAutoencoder:
    config = SAEConfig(d_in=D_MODEL, d_sae=D_SAE, activation=TopK(k=3), input_scale=0.25)
    dictionary = SparseAutoencoder(config)
    with torch.no_grad():
        dictionary.dec_rows.copy_(
            torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(0))
        )
    return dictionary


@pytest.fixture
def unembed() -> torch.Tensor:
    return torch.randn(VOCAB, D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cells", [1, 301, 1 << 25])
@pytest.mark.parametrize("with_norm", [True, False])
def test_ends_of_the_logits(dictionary, unembed, cells: int, with_norm: bool, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", cells)
    weight = torch.linspace(0.5, 2.0, D_MODEL) if with_norm else None
    done = []
    result = promoted_tokens(
        dictionary, unembed, weight, k=5, progress=lambda d, t, unit: done.append((d, t))
    )
    assert result.with_final_norm is with_norm
    for latent in range(D_SAE):
        direction = dictionary.direction(latent) * (1 if weight is None else weight)
        logits = unembed @ direction
        order = logits.argsort(descending=True)
        assert result.promoted[latent].tolist() == order[:5].tolist()
        assert result.suppressed[latent].tolist() == order.flip(0)[:5].tolist()
        torch.testing.assert_close(result.promoted_logits[latent], logits[order[:5]])
        torch.testing.assert_close(result.suppressed_logits[latent], logits[order.flip(0)[:5]])
    assert done[-1] == (D_SAE, D_SAE)
    assert not result.promoted_logits.requires_grad


def test_latent_that_points_at_a_token_promotes_it(unembed):
    dictionary = SparseAutoencoder(SAEConfig(d_in=D_MODEL, d_sae=VOCAB, activation=TopK(k=3)))
    unit = unembed / unembed.norm(dim=1, keepdim=True)
    with torch.no_grad():
        dictionary.dec_rows.copy_(unit)
    assert promoted_tokens(dictionary, unit, None, k=1).promoted[:, 0].tolist() == list(
        range(VOCAB)
    )


def test_wrong_widths_are_refused(dictionary, unembed):
    with pytest.raises(ValueError, match="unembed must be as wide as the decoder rows, 7, got 5"):
        promoted_tokens(dictionary, unembed[:, :5], None)
    with pytest.raises(
        ValueError, match="k must lie between 1 and the vocabulary's size 101, got 0"
    ):
        promoted_tokens(dictionary, unembed, None, k=0)

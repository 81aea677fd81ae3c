"""A dictionary whose latents are split among processes is the one that it would be in one."""

import pytest
import torch

from sae.activations import EncoderWeights, to_dense
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import Adam, DictionaryConfig
from sae.train.forward import sharded
from sae.train.latent_shards import whole_state
from sae.train.loss_config import L0, L1, AuxK, FixedPrefixes, MultiTopK
from sae.train.ranks import ALONE, connect
from sae.train.step import TrainStep

D_IN, D_SAE, BATCH, STEPS = 13, 62, 101, 20

COMMON = {"d_sae": D_SAE, "optimizer": Adam(lr=1e-2), "dead_after_tokens": 3 * BATCH}
KINDS = {
    "topk": DictionaryConfig(activation=TopK(k=3), auxk=AuxK(coefficient=0.5), **COMMON),
    "gating": DictionaryConfig(
        activation=TopK(k=41),
        auxk=AuxK(k=5),
        b_in="own",
        input_norm="rms",
        gate_by_decoder_norm=True,
        unit_norm=False,
        **COMMON,
    ),
    "batchtopk": DictionaryConfig(activation=BatchTopK(k=3), auxk=AuxK(), b_in="none", **COMMON),
    "relu": DictionaryConfig(
        activation=ReLU(), l1=L1(coefficient=0.3), unit_norm=False, decoder_norm=0.1, **COMMON
    ),
    "jumprelu": DictionaryConfig(
        activation=JumpReLU(threshold=0.1, bandwidth=0.3),
        l0=L0(coefficient=3.0, target=3.0, threshold_lr=3e-2),
        **COMMON,
    ),
    "gated": DictionaryConfig(activation=Gated(), l1=L1(coefficient=0.3), **COMMON),
}


def trained(config, data, ranks=ALONE):
    made = SparseAutoencoder(config.architecture(D_IN, 0.5))
    initialise(made, torch.Generator().manual_seed(0), decoder_norm=config.decoder_norm)
    step = TrainStep(made, config, len(data), ranks=ranks)
    figures = [torch.stack(step(x[ranks.rows.share(len(x))])) for x in data]
    state = {**whole_state(step.state_dict(), ranks), "figures": torch.stack(figures)}
    whole = {f"whole.{k}": v for k, v in step.whole().state_dict().items()}
    return state | whole if ranks.is_first else {}


@pytest.mark.parametrize(
    ("kind", "n", "shards"),
    [
        ("topk", 2, 2),
        ("topk", 4, 2),
        ("batchtopk", 4, 2),
        ("relu", 2, 2),
        ("jumprelu", 2, 2),
        ("gated", 2, 2),
        pytest.param("gating", 4, 2, marks=pytest.mark.long),
        pytest.param("gating", 2, 2, marks=pytest.mark.long),
        pytest.param("jumprelu", 4, 2, marks=pytest.mark.long),
        pytest.param("relu", 4, 2, marks=pytest.mark.long),
        pytest.param("gated", 4, 2, marks=pytest.mark.long),
    ],
)
def test_training_in_parts_is_training_in_one(kind, n, shards, planted, in_ranks):
    config, data = KINDS[kind], planted(STEPS)
    one = trained(config, data)
    found = in_ranks(n, lambda: trained(config, data, connect(shards)))[0]
    assert found.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=name: f"{k}: {m}"
        )


def test_the_selection_is_exact_with_ties_in_and_between_the_parts(in_ranks):
    """Pre-activations are small integers: rows are full of ties."""
    generator = torch.Generator().manual_seed(5)
    encoder = torch.randint(-1, 3, (62, 5), generator=generator).float()
    rows = torch.randint(-1, 3, (29, 5), generator=generator).float()
    bias = torch.zeros(62)
    expected = torch.zeros(29, 62)
    pre = rows @ encoder.T
    order = pre.sort(dim=1, descending=True, stable=True).indices[:, :7]
    expected.scatter_(1, order, pre.gather(1, order).relu())

    def work():
        axis = connect(2).latents
        own = axis.share(62)
        found = sharded.topk(rows, EncoderWeights(encoder[own], bias[own], None), 7, axis)
        return {"acts": to_dense(found, 31)}

    parts = in_ranks(2, work)
    assert torch.equal(torch.cat([part["acts"] for part in parts], dim=1), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"d_sae": 61}, "d_sae must be a multiple of latent_shards=2, got 61"),
        ({"multi_topk": MultiTopK()}, "multi_topk must be absent with latent_shards=2"),
        ({"matryoshka": FixedPrefixes(ends=(7,))}, "matryoshka must be absent"),
    ],
)
def test_what_needs_all_latents_is_refused(change, match):
    config = DictionaryConfig(activation=TopK(k=3), **{**COMMON, **change})
    sharded.require_shardable(config, 1)
    with pytest.raises(ValueError, match=match):
        sharded.require_shardable(config, 2)

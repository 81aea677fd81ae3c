"""A dictionary whose latents are split among processes is the one that it would be in one."""

import pytest
import torch

from sae.activations import EncoderWeights, Latents, to_dense
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import Adam, DictionaryConfig
from sae.train.forward import sharded
from sae.train.loss_config import L0, L1, AuxK, FixedPrefixes, MultiTopK
from sae.train.ranks import ALONE, connect, own_state, whole_state
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
    "gated": DictionaryConfig(
        activation=Gated(), l1=L1(coefficient=0.3), auxk=AuxK(coefficient=0.5), **COMMON
    ),
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


def one_by_one(config, data, ranks=ALONE, states=None, nudge=0.0):
    """The parameters after each step; with `states`, each step begins from these."""
    made = SparseAutoencoder(config.architecture(data[0].shape[1], 0.5))
    initialise(made, torch.Generator().manual_seed(0), decoder_norm=config.decoder_norm)
    signs = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=signs).sign())
    step, found, before = TrainStep(made, config, len(data), ranks=ranks), [], []
    for number, x in enumerate(data):
        if states is not None:
            copied = {name: tensor.clone() for name, tensor in states[number].items()}
            step.load_state_dict(own_state(copied, ranks))
        before.append({name: tensor.clone() for name, tensor in step.state_dict().items()})
        step(x[ranks.rows.share(len(x))])
        state = whole_state(step.state_dict(), ranks)
        found.append({n: t.clone() for n, t in state.items() if n.startswith("param.")})
    return found, before


def apart(some, others):
    """The largest difference of a parameter, after any step."""
    return max(
        float((one[name] - other[name]).abs().max())
        for one, other in zip(some, others, strict=True)
        for name in one
    )


def test_each_step_in_parts_is_the_step_in_one(planted, in_ranks, figure):
    data, kinds = planted(46), [kind for kind in KINDS if kind != "gating"]
    alone = {kind: one_by_one(KINDS[kind], data) for kind in kinds}

    def work():
        ranks = connect(2)
        found = {}
        for kind in kinds:
            steps, _ = one_by_one(KINDS[kind], data, ranks, alone[kind][1])
            found |= {f"{kind}/{i}/{n}": t for i, s in enumerate(steps) for n, t in s.items()}
        return found

    parts, differ = in_ranks(2, work)[0], {}
    for kind in kinds:
        steps = [
            {name: parts[f"{kind}/{number}/{name}"] for name in step}
            for number, step in enumerate(alone[kind][0])
        ]
        differ[kind] = apart(steps, alone[kind][0])
    assert max(differ.values()) <= 5e-6, differ
    figure(
        "N11",
        f"2 latent shards, 46 steps of {len(kinds)} kinds, each from one state: weights within "
        f"{max(differ.values()):.0e}",
    )


def test_runs_part_where_a_pre_activation_lies_within_a_rounding_of_its_bound(figure):
    """More than a step cannot be promised: one process does it, from weights a rounding apart."""
    generator = torch.Generator().manual_seed(7)
    atoms = torch.randn(200, 64, generator=generator)
    fires, sizes = torch.rand(2, 46, 256, 200, generator=generator)
    data = [*((fires < 0.05) * (sizes + 0.5)) @ atoms + 3.0]
    penalty = L0(coefficient=3.0, target=8.0, threshold_lr=3e-2)
    config = DictionaryConfig(
        d_sae=512, activation=JumpReLU(threshold=0.1, bandwidth=0.3), l0=penalty
    )
    (one, before), (other, nudged) = (
        one_by_one(config, data, nudge=nudge) for nudge in (0.0, 2.0**-24)
    )
    differ = [apart([a], [b]) for a, b in zip(one, other, strict=True)]
    assert max(differ) > 1e-4
    first = next(number for number, found in enumerate(differ) if found > 1e-5)
    distance = [
        (data[first] * 0.5 - state["param.b_dec"]) @ state["param.enc_rows"].T
        + state["param.b_enc"]
        - state["param.threshold"]
        for state in (before[first], nudged[first])
    ]
    near = []
    for bound in (-0.15, 0.0, 0.15):  # the threshold, and where its gradient begins and ends
        flipped = (distance[0] > bound) != (distance[1] > bound)
        near += (distance[0][flipped] - bound).abs().tolist()
    assert near
    assert max(near) < 1e-5
    figure(
        "N11",
        f"one process, first weights one rounding apart: a pre-activation crosses a bound at step "
        f"{first}, and weights are up to {max(differ):.0e} apart in 46 steps",
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
        return {"acts": to_dense(Latents(found.values, found.indices), 31)}

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

"""Rows that are read again with what is left of them, and the decoder that is held afterwards."""

import dataclasses

import pytest
import torch

from sae.architecture import BatchTopK, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import L1, Adam, AuxK, DictionaryConfig
from sae.train.forward.common import Rows
from sae.train.forward.run import forward
from sae.train.forward.sharded import require_shardable
from sae.train.loss_config import FixedPrefixes, MultiTopK, Refine
from sae.train.step import TrainStep
from tests.sae.train.formulas import (
    BATCH,
    D_SAE,
    ENDS,
    STEP,
    K,
    config,
    decoded,
    filled,
    grads_of,
    linear,
    moment,
    rows,
    sq,
    top,
)

N_STEPS = 10


def batch_top(h):
    kth = h.flatten().sort(descending=True).values[K * BATCH - 1]
    return torch.relu(h) * (h >= kth)


@pytest.mark.parametrize(
    ("activation", "choose"), [(TopK, lambda h: top(h, K)), (BatchTopK, batch_top)]
)
def test_loss_and_gradients_are_those_of_rows_with_their_rest_added(activation, choose):
    settings = config(
        activation(k=K), refine=Refine(steps=2, rate=0.3), matryoshka=FixedPrefixes(ends=ENDS)
    )
    dictionary, u = filled(settings), rows()
    got = forward(dictionary, settings, Rows(u, u), moment())
    read = u
    for _ in range(2):
        a = choose(linear(dictionary, read) + dictionary.b_enc)
        read = read + 0.3 * (u - decoded(dictionary, a))
    a = choose(linear(dictionary, read) + dictionary.b_enc)
    expected = sum(sq(u - decoded(dictionary, a, end)) for end in (*ENDS, D_SAE)) / 4
    torch.testing.assert_close(got.loss, expected)
    assert got.n_fired.tolist() == (a > 0).sum(dim=0).tolist()
    by_name = grads_of(expected, dictionary, without=("threshold",))
    for name, grad in grads_of(got.loss, dictionary, without=("threshold",)).items():
        torch.testing.assert_close(grad, by_name[name])


def test_once_the_decoder_is_done_rows_are_read_as_they_are():
    plain = config(TopK(k=K))
    refined = dataclasses.replace(plain, refine=Refine(until=STEP / N_STEPS))
    dictionary, u = filled(plain), rows()
    at = moment()._replace(total_steps=N_STEPS)
    losses = [forward(dictionary, one, Rows(u, u), at).loss for one in (plain, refined)]
    assert torch.equal(*losses)


def small(**fields) -> DictionaryConfig:
    more = {"auxk": AuxK(), "dead_after_tokens": 202, "optimizer": Adam(lr=1e-2)}
    return DictionaryConfig(d_sae=53, activation=BatchTopK(k=3), **{**more, **fields})


def step_of(settings: DictionaryConfig) -> TrainStep:
    made = SparseAutoencoder(settings.architecture(13))
    initialise(made, torch.Generator().manual_seed(0))
    return TrainStep(made, settings, N_STEPS)


def stream(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(101, 13, generator=generator) for _ in range(n)]


@pytest.mark.parametrize(
    ("held_until", "held"), [(1.0, range(4, 10)), (0.9, range(4, 9)), (0.4, range(0))]
)
def test_the_decoder_moves_but_while_it_is_held_and_the_encoder_always(held_until, held):
    step = step_of(small(refine=Refine(until=0.4, held_until=held_until)))
    moved = []
    for x in stream(N_STEPS):
        dec, enc = (
            p.detach().clone() for p in (step.autoencoder.dec_rows, step.autoencoder.enc_rows)
        )
        step(x)
        assert not torch.equal(step.autoencoder.enc_rows, enc)
        moved.append(not torch.equal(step.autoencoder.dec_rows, dec))
    assert moved == [i not in held for i in range(N_STEPS)]


def test_more_latents_fire_while_there_is_slack():
    step = step_of(small(refine=Refine(until=0.7, slack=1.7, slack_from=0.3)))
    fired = [float(step(x).l0) for x in stream(N_STEPS)]
    assert fired == pytest.approx([3] * 3 + [5] * 4 + [3] * 3, abs=1e-6)  # round(1.7 * 3) is 5


@pytest.mark.parametrize("stop", [3, 7, 9])
def test_a_resumed_run_is_bit_equal_before_and_after(stop):
    settings, batches = small(refine=Refine(until=0.5, held_until=0.8)), stream(N_STEPS)
    whole, first, second = (step_of(settings) for _ in range(3))
    for x in batches:
        whole(x)
    for x in batches[:stop]:
        first(x)
    second.load_state_dict(first.state_dict())
    for x in batches[stop:]:
        second(x)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_what_it_cannot_stand_beside_is_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Refine(steps=0)
    with pytest.raises(ValueError, match=r"rate must be a positive number, got 0"):
        Refine(rate=0.0)
    with pytest.raises(ValueError, match=r"held_until must be at least until=0\.7, got 0\.6"):
        Refine(held_until=0.6)
    with pytest.raises(ValueError, match=r"slack must be at least 1, got 0\.9"):
        Refine(slack=0.9)
    with pytest.raises(ValueError, match=r"slack_from must lie between 0 and 1, got 1\.2"):
        Refine(slack_from=1.2)
    with pytest.raises(
        ValueError, match=r"refine\.slack must leave slack \* k=3 at most d_sae=53, got 18"
    ):
        small(refine=Refine(slack=18.0))
    with pytest.raises(ValueError, match="refine must be absent beside multi_topk"):
        DictionaryConfig(d_sae=53, activation=TopK(k=3), refine=Refine(), multi_topk=MultiTopK())
    with pytest.raises(ValueError, match="refine must be absent beside outputs"):
        DictionaryConfig(
            d_sae=53, activation=TopK(k=3), refine=Refine(), outputs=("a:out",), b_in="none"
        )
    with pytest.raises(ValueError, match=r"refine must be absent for activation\.kind 'relu'"):
        DictionaryConfig(d_sae=53, activation=ReLU(), l1=L1(), unit_norm=False, refine=Refine())
    with pytest.raises(ValueError, match="refine must be absent with latent_shards=2"):
        require_shardable(dataclasses.replace(small(refine=Refine()), d_sae=54), 2)

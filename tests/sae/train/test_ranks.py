"""N processes are one: at the same global batch they give the same dictionary and figures."""

import pytest
import torch

from sae.activations import EncoderWeights, encode_batch, from_csr, to_dense
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import Adam, DictionaryConfig
from sae.train.forward import common
from sae.train.loss_config import L0, L1, AuxK, FixedPrefixes, MultiTopK, PAnneal, Refine
from sae.train.ranks import ALONE, Axis, connect
from sae.train.step import StepMetrics, TrainStep

D_IN, D_SAE, BATCH = 13, 54, 101
GRAD_NORM = StepMetrics._fields.index("grad_norm")

COMMON = {"d_sae": D_SAE, "optimizer": Adam(lr=1e-2), "dead_after_tokens": 4 * BATCH}
KINDS = {
    "topk": DictionaryConfig(activation=TopK(k=3), auxk=AuxK(), **COMMON),
    "multi": DictionaryConfig(
        activation=TopK(k=3),
        multi_topk=MultiTopK(),
        b_in="own",
        input_norm="rms",
        gate_by_decoder_norm=True,
        **COMMON,
    ),
    "matryoshka": DictionaryConfig(
        activation=BatchTopK(k=3), auxk=AuxK(), matryoshka=FixedPrefixes(ends=(11, 31)), **COMMON
    ),
    "batchtopk": DictionaryConfig(activation=BatchTopK(k=3), auxk=AuxK(), **COMMON),
    "refined": DictionaryConfig(
        activation=BatchTopK(k=3),
        auxk=AuxK(),
        matryoshka=FixedPrefixes(ends=(11, 31), until=0.6),
        refine=Refine(),
        **COMMON,
    ),
    "relu": DictionaryConfig(
        activation=ReLU(), l1=L1(coefficient=0.3), unit_norm=False, decoder_norm=0.1, **COMMON
    ),
    "annealed_p": DictionaryConfig(
        activation=ReLU(),
        p_anneal=PAnneal(coefficient=0.1, p=0.5, n=5),
        unit_norm=False,
        decoder_norm=0.1,
        **COMMON,
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


def trained(config, data, ranks=ALONE, dtype=torch.float32):
    """The state after a step on each batch, and the steps' figures."""
    made = SparseAutoencoder(config.architecture(D_IN, 0.5))
    initialise(made, torch.Generator().manual_seed(0), decoder_norm=config.decoder_norm)
    step = TrainStep(made.to(dtype), config, len(data), ranks=ranks)
    figures = [torch.stack(step(x[ranks.rows.share(len(x))].to(dtype))) for x in data]
    return {**step.state_dict(), "figures": torch.stack(figures).double()}


def require_equal(found, one):
    assert found.keys() == one.keys()
    for name, tensor in one.items():
        for column in range(6) if name == "figures" else [...]:
            ours, theirs = (t[:, column] if name == "figures" else t for t in (found[name], tensor))
            # the norm of the gradients is that of differences: it has fewer digits
            far = 1e-5 if column == GRAD_NORM else 1e-6
            torch.testing.assert_close(
                ours, theirs, rtol=far, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


OTHERS = ("multi", "matryoshka", "annealed_p", "refined")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.long] if k in OTHERS else []) for k in KINDS]
)
def test_several_ranks_equal_one(kind, planted, in_ranks):
    """101 rows are 33, 34 and 34 of them; some batches have dead latents, so AuxK takes part."""
    n = 3 if kind == "batchtopk" else 2
    config, data = KINDS[kind], planted(50)
    # the root of p-annealing has no bounded gradient at 0, so that float32 says nothing
    dtype = torch.float64 if kind == "annealed_p" else torch.float32
    one = trained(config, data, dtype=dtype)
    assert float(one["figures"][:, 5].min()) == 1
    for found in in_ranks(n, lambda: trained(config, data, connect(), dtype)):
        require_equal(found, one)


def test_a_row_that_is_not_finite_on_one_rank_is_skipped_by_all(planted, in_ranks):
    data = planted(4)
    data[2][70, 5] = float("nan")  # a row of the last rank

    def work():
        ranks = connect()
        made = SparseAutoencoder(KINDS["batchtopk"].architecture(D_IN, 0.5))
        initialise(made, torch.Generator().manual_seed(0))
        step = TrainStep(made, KINDS["batchtopk"], len(data), ranks=ranks)
        own = [x[ranks.rows.share(BATCH)] for x in data]
        for x in own[:2]:
            step(x)
        before = {name: t.clone() for name, t in step.state_dict().items()}
        assert not bool(step(own[2]).finite)
        after = step.state_dict()
        assert {n for n in before if not before[n].equal(after[n])} == {"n_steps"}
        assert bool(step(own[3]).finite)
        return step.state_dict()

    first, *others = in_ranks(3, work)
    for other in others:
        require_equal(other, first)


def test_ties_go_to_the_first_row_and_latent_of_all_ranks(in_ranks):
    """Every pre-activation is 1 or 2; 30 are kept, the twos and the first of the ones."""
    rows = torch.ones(10, 1)
    rows[7] = 2.0
    kept = torch.zeros(10, 13)
    kept[7] = 2.0
    kept[0, :13] = 1.0
    kept[1, :4] = 1.0

    def work():
        ranks = connect()
        weights = EncoderWeights(torch.ones(13, 1), torch.zeros(13), None)
        found = common.batch_topk(rows[ranks.rows.share(10)], weights, 3, 10, ranks)
        return {"acts": to_dense(from_csr(found), 13)}

    assert torch.equal(torch.cat([r["acts"] for r in in_ranks(3, work)]), kept)


def test_a_rank_that_has_all_the_large_values_offers_more(in_ranks):
    """The second rank's rows are the only ones that fire; 2 k of them a row are not enough."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(8, 5, generator=generator)
    rows[:4] *= -1.0
    encoder = torch.rand(29, 5, generator=generator)
    weights = EncoderWeights(encoder, torch.zeros(29), None)
    expected = to_dense(encode_batch(BatchTopK(k=7), rows, weights), 29)
    assert int((expected > 0).sum(1).max()) > 2 * 6

    def work():
        ranks = connect()
        found = common.batch_topk(rows[ranks.rows.share(8)], weights, 7, 8, ranks)
        return {"acts": to_dense(from_csr(found), 29)}

    assert torch.equal(torch.cat([r["acts"] for r in in_ranks(2, work)]), expected)


def test_the_rows_are_shared_out_in_order_and_none_is_lost():
    for n in (1, 2, 101, 1024):
        for size in (1, 2, 3, 4, 6, 64):
            slices = [Axis(None, rank, size).share(n) for rank in range(size)]
            assert [i for s in slices for i in range(s.start, s.stop)] == list(range(n))


def test_another_number_of_shards_than_processes_allow_is_refused():
    with pytest.raises(ValueError, match="latent_shards must divide the number of processes, 1"):
        connect(3)

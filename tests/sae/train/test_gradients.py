"""Sums of gradients begin in the backward pass, in one order, and take half the bytes in bf16."""

import pytest
import torch
import torch.distributed as dist

from sae.architecture import Gated, JumpReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import Adam, DictionaryConfig
from sae.train.gradients import GradientSums
from sae.train.loss_config import L0, L1, AuxK
from sae.train.ranks import ALONE, Axis, Ranks, connect
from sae.train.step import TrainStep
from tests.sae.train.gpu_branches import branches_of_a_gpu

D_IN, D_SAE, BATCH = 8, 32, 12
COMMON = {"d_sae": D_SAE, "optimizer": Adam(clip=None), "dead_after_tokens": 2 * BATCH}
KINDS = {
    "topk": DictionaryConfig(activation=TopK(k=3), **COMMON),
    "auxk": DictionaryConfig(activation=TopK(k=3), auxk=AuxK(), **COMMON),
    "parts": DictionaryConfig(activation=TopK(k=3), accumulate=2, **COMMON),
    "jumprelu": DictionaryConfig(
        activation=JumpReLU(threshold=0.1, bandwidth=0.3), l0=L0(coefficient=1.0), **COMMON
    ),
    "gated": DictionaryConfig(activation=Gated(), l1=L1(coefficient=0.3), **COMMON),
}
MATRICES = ("dec_rows", "enc_rows")


def stepped(config, precision, ranks=ALONE, fused=False):
    """Gradients of the last step; of each sum, whether it is of 16 bits, and what was whole."""
    made = SparseAutoencoder(config.architecture(D_IN, 1.0))
    initialise(made, torch.Generator().manual_seed(0))
    step = TrainStep(made, config, 3, precision=precision, ranks=ranks)
    n = 1 if fused else 3  # the interpreter is slow
    rows = torch.randn(n, BATCH, D_IN, generator=torch.Generator().manual_seed(1))
    seen, all_reduce = [], dist.all_reduce

    def noted(tensor, *given, **named):
        if tensor.shape in (made.enc_rows.shape, made.dec_rows.shape):
            is_whole = [getattr(made, name).grad is not None for name in MATRICES]
            seen.append([tensor.dtype == torch.bfloat16, *is_whole])
        return all_reduce(tensor, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        if fused:
            branches_of_a_gpu(patch)
        patch.setattr(dist, "all_reduce", noted)
        for x in rows:
            step(x[ranks.rows.share(BATCH)])
    figures = {name: p.grad for name, p in step.learned.items() if p.grad is not None}
    return figures | {"seen": torch.tensor(seen, dtype=torch.int64).reshape(-1, 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_begins_before_the_backward_pass_has_ended(kind, in_ranks):
    one = stepped(KINDS[kind], "fp32")
    for found in in_ranks(2, lambda: stepped(KINDS[kind], "fp32", connect())):
        # the decoder's begins while the encoder has no gradient, or that of an earlier part; one
        # operation gives both gradients of JumpReLU at once
        expected = [[0, 1, int(kind in ("parts", "jumprelu"))], [0, 1, 1]] * 3
        assert found.pop("seen").tolist() == expected
        for name, grad in found.items():
            torch.testing.assert_close(grad, one[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["topk", "auxk", "parts"])
def test_the_pass_of_a_gpu_gives_the_decoder_s_gradient_away_first(kind, in_ranks):
    one = stepped(KINDS[kind], "fp32", fused=True)
    for found in in_ranks(2, lambda: stepped(KINDS[kind], "fp32", connect(), fused=True)):
        early = [[0, 1, int(kind != "topk")], [0, 1, 1]]  # AuxK and parts add to both later
        assert found.pop("seen").tolist() == early
        for name, grad in found.items():
            torch.testing.assert_close(grad, one[name], rtol=1e-5, atol=1e-6)


def test_in_bf16_the_matrices_travel_in_half_the_bytes_and_the_biases_whole(in_ranks):
    one = stepped(KINDS["topk"], "bf16")
    for found in in_ranks(2, lambda: stepped(KINDS["topk"], "bf16", connect())):
        assert found.pop("seen")[:, 0].tolist() == [1] * 6
        for name, grad in found.items():
            far = 2**-6 if name in MATRICES else 2**-8
            assert (grad - one[name]).norm() < far * one[name].norm(), name
            if name in MATRICES:
                assert torch.equal(grad, grad.bfloat16().float())


def test_whatever_comes_first_all_processes_begin_their_sums_in_one_order(monkeypatch):
    begun = []
    monkeypatch.setattr(Axis, "begin_sum", lambda _, tensor: begun.append(tensor.item()))
    monkeypatch.setattr(Axis, "end_sum", lambda _: None)
    params = {n: torch.nn.Parameter(torch.zeros(())) for n in ("b_dec", "enc_rows", "dec_rows")}
    for value, parameter in enumerate(params.values()):
        parameter.grad = torch.tensor(float(value))
    two = Axis(size=2)
    sums = GradientSums(params, Ranks(two, Axis(), two), bf16=False)
    with sums.last_pass():
        for name in ("b_dec", "enc_rows"):
            sums.whole(name)
        assert begun == []
        sums.whole("dec_rows")
        assert begun == [2, 1, 0]
    sums.finish()
    assert begun == [2, 1, 0]


def test_one_process_sums_nothing_and_nobody_listens(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    assert len(stepped(KINDS["topk"], "bf16")["seen"]) == 0

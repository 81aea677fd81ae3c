"""Whether the ops and the step are right on this device; without pytest, each in a row of its own.

A check returns nothing, or says why it was not run; what is wrong is an AssertionError.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite import bare
from benchmarks.gpu_suite.case import relative
from benchmarks.gpu_suite.ops import Draw
from sae.architecture import BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import L0, L1, Adam, AuxK, DictionaryConfig
from sae.train.loss_config import FixedPrefixes, Refine
from sae.train.ranks import connect
from sae.train.step import TrainStep
from sae.train.throughput import StepGraph
from sae_kernels import (
    blocks,
    encode_batch_topk,
    encode_topk,
    encode_triton,
    latent_adam_,
    sparse_decode,
    sparse_decode_mse,
    sparse_weight_grads,
    topk_select,
)
from sae_kernels.fused import StepWeights, fused_topk_step
from sae_kernels.launch import choose

Check = Callable[[torch.device], str | None]
PAST_INT32 = (1 << 31) + (1 << 20)


def _selects(pre: Tensor, k: int) -> None:
    """The k largest, of equal ones the first, NaN above all."""
    order = torch.sort(pre.double() + 0.0, dim=1, descending=True, stable=True).indices[:, :k]
    right = order.sort(1).values
    values, indices = topk_select(pre, k, relu=False)
    assert torch.equal(indices.sort(1).values, right), f"other latents, {tuple(pre.shape)}, k {k}"
    chosen = pre.gather(1, indices)
    assert torch.equal(values.nan_to_num(), chosen.nan_to_num()), "other values"


def ties(device: torch.device) -> None:
    """Equal values, one value alone, zeros of both signs, all latents."""
    on_gpu = device.type == "cuda"
    for d_sae, k in ((131072, 32), (1000, 7), (1021, 1021)) if on_gpu else ((2203, 3), (53, 53)):
        pre = Draw(0, str(device)).normal(61 if on_gpu else 2, d_sae)
        for case in (pre, (2 * pre).round(), torch.full_like(pre, -1.5), 0 * pre, -pre.abs()):
            _selects(case, k)


def not_numbers(device: torch.device) -> None:
    """NaN and both infinities; a NaN that is chosen comes out as NaN."""
    pre = Draw(0, str(device)).normal(11, 2203)
    pre[3, ::700], pre[5, ::601], pre[7, :] = math.nan, math.inf, -math.inf
    _selects(pre, 5)
    bias = pre.new_zeros(53)
    x, rows = pre[:, :13], Draw(1, str(device)).normal(53, 13)
    assert bool(encode_topk(x, rows, bias, 3).values[3].isnan().all()), "a NaN was lost"


def gated(device: torch.device) -> None:
    """The gated product beside the library's, which are exact where all numbers are whole."""
    on_gpu, draw = device.type == "cuda", Draw(0, str(device))
    (batch, width, d_sae), k = (261, 768, 24579) if on_gpu else (3, 5, 2309), 32 if on_gpu else 3
    x, rows, bias = (
        draw.normal(*shape).round() for shape in ((batch, width), (d_sae, width), (d_sae,))
    )
    x[1, 2], bias[70], bias[d_sae - 1] = math.nan, math.inf, -math.inf
    low = torch.bfloat16 if on_gpu else torch.float32
    given = encode_triton.Operands(x.to(low), rows.to(low), bias)
    limit = bias.roll(1) + float(3 * width**0.5)
    assert encode_triton.row_gate(d_sae, k) is not None, "nothing was gated"
    for name, run in {
        "TopK": lambda is_gated: encode_triton.encode_topk(*given, k, True, is_gated),
        "BatchTopK": lambda is_gated: encode_triton.encode_batch_topk(given, k * batch, is_gated),
        "thresholds": lambda is_gated: encode_triton.encode_threshold(given, limit, is_gated),
    }.items():
        for one, other in zip(run(True), run(False), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), name


def offsets(device: torch.device) -> str | None:
    """Elements past 2^31 of what is selected from, decoded with, written and stepped."""
    on_gpu, needed = device.type == "cuda", 44 << 30
    if on_gpu and torch.cuda.mem_get_info()[0] < needed:
        return f"not run: {needed >> 30} GiB of free memory are missing"
    past = PAST_INT32 if on_gpu else 1 << 11
    options: dict[str, Any] = {"device": device, "dtype": torch.float16}
    wide = past // (1 << 14) if on_gpu else 512
    pre = torch.zeros(-(-past // wide), wide, **options)
    pre[-1, -3] = 1.0
    assert int(topk_select(pre, 1).indices[-1]) == wide - 3, "selection"
    del pre
    d_sae, width = past // (4096 if on_gpu else 64), 4096 if on_gpu else 64
    table = torch.zeros(d_sae, width, **options)
    table[-1] = 2.0
    values, indices = table.new_ones(5, 1), torch.full((5, 1), d_sae - 1, device=device)
    assert bool((sparse_decode(values, indices, table) == 2).all()), "decoding"
    bias, x = torch.zeros(d_sae, device=device), table.new_ones(5, width)
    for is_gated in (False, True):
        latents = encode_triton.encode_topk(x, table, bias, 1, False, is_gated)[1]
        assert bool((latents == d_sae - 1).all()), "encoding"
    del table
    values, x = values.float(), torch.ones(5, 1, device=device)
    grads = sparse_weight_grads(values, values, indices, x.expand(5, width), x, d_sae)
    assert bool((grads.dec_rows[-1] == 5).all()), "gradients"
    assert not bool(grads.dec_rows[:-1].any()), "gradients"
    rows, mean, square = (torch.zeros_like(grads.dec_rows) for _ in range(3))
    latent_adam_(rows, grads.dec_rows, mean, square, 1, lr=0.5)
    assert bool((rows[-1] + 0.5).abs().max() < 1e-3), "Adam"
    return None


def dispatch(device: torch.device) -> None:
    """Which backend takes what, forced ones among them, and rows that no kernel can hold."""
    x = Draw(0, str(device)).normal(5, 53)
    if device.type == "cuda":
        assert choose(x, None) == "triton"
        assert choose(x.double(), None) == choose(x.cpu(), None) == "torch"
        if torch.cuda.device_count() > 1:  # a launch goes to the GPU of its tensors
            other = topk_select(x.to("cuda:1"), 3)
            assert torch.equal(other.values.cpu(), topk_select(x, 3).values.cpu()), "second GPU"
    found = [topk_select(x, 3, backend=name) for name in ("reference", "torch", "triton")]
    assert all(torch.equal(one.indices, found[0].indices) for one in found), "backends differ"
    try:
        topk_select(x, 3, backend="cuda")
    except ValueError:
        pass
    else:
        raise AssertionError("an unknown backend was taken")
    rows, mean, square = torch.zeros(3, 2, blocks.MAX_ROW + 1, device=device)
    latent_adam_(rows, torch.ones_like(rows), mean, square, 1, lr=0.5)
    assert bool((rows + 0.5).abs().max() < 1e-3), "a row wider than a program"


def autograd(device: torch.device) -> None:
    """Gradients of all weights through TopK and BatchTopK, beside float64."""
    draw = Draw(0, str(device))
    shapes, k, ends = ((17, 13), (53, 13), (53,), (53, 13), (13,)), 3, (5, 53)
    leaves = [draw.normal(*shape).requires_grad_() for shape in shapes]
    for of_batch in (False, True):
        x, enc_rows, b_enc, dec_rows, b_dec = leaves
        encoder = (x, enc_rows, b_enc, k)
        row_ptr = None
        if of_batch:
            values, indices, row_ptr = encode_batch_topk(*encoder)
        else:
            values, indices = encode_topk(*encoder)
        decoder = (dec_rows, b_dec, x.detach())
        options: dict[str, Any] = {"scale": 0.1, "prefixes": ends, "row_ptr": row_ptr}
        made = sparse_decode_mse(values, indices, *decoder, **options)
        got = torch.autograd.grad(made.loss, leaves)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        x, enc_rows, b_enc, dec_rows, b_dec = wide
        pre = x @ enc_rows.T + b_enc
        flat = pre.detach().flatten().topk(k * len(x)).values[-1]
        least = flat if of_batch else pre.detach().topk(k, dim=1).values[:, -1:]
        acts = pre.relu() * (pre >= least)
        errors = [acts[:, :end] @ dec_rows[:end] + b_dec - x.detach() for end in ends]
        loss = torch.stack([0.1 * error.square().sum() for error in errors]).sum()
        right = torch.autograd.grad(loss, wide)
        for one, other in zip(got, right, strict=True):
            assert relative(one, other) < 1e-4, f"of_batch={of_batch}"


D: dict[str, Any] = {"d_sae": 1024 if torch.cuda.is_available() else 16, "dead_after_tokens": 20}
KINDS = {
    "topk": DictionaryConfig(activation=TopK(k=3), auxk=AuxK(), **D),
    "batchtopk": DictionaryConfig(activation=BatchTopK(k=3), **D),
    "default": DictionaryConfig(
        activation=BatchTopK(k=3), matryoshka=FixedPrefixes(ends=(5, 9)), auxk=AuxK(),
        refine=Refine(steps=1, rate=0.5, until=0.9), **D,
    ),
    "groupmax": DictionaryConfig(activation=GroupMax(k=4), **D),
    "relu": DictionaryConfig(activation=ReLU(), l1=L1(coefficient=0.3), unit_norm=False, **D),
    "jumprelu": DictionaryConfig(
        activation=JumpReLU(threshold=0.1, bandwidth=0.3), l0=L0(coefficient=0.1), **D
    ),
    "gated": DictionaryConfig(activation=Gated(), l1=L1(coefficient=0.3), **D),
    "states of 8 bits": DictionaryConfig(
        activation=TopK(k=3), optimizer=Adam(states="int8"), **D
    ),
}  # fmt: skip


def _step(config: DictionaryConfig, device: torch.device | str, **more: Any) -> TrainStep:
    dictionary = SparseAutoencoder(config.architecture(13))
    initialise(dictionary, torch.Generator().manual_seed(0))
    return TrainStep(dictionary.to(device), config, 30, **more)


def _rows(n: int) -> list[Tensor]:
    draw = Draw(3, "cpu")
    return [draw.normal(7, 13) + 1.0 for _ in range(n)]


def _same(config: DictionaryConfig, step: TrainStep, plain: TrainStep) -> None:
    """A few steps of both from the same state, by their losses and by all that changes."""
    for x in _rows(3):
        plain.load_state_dict({name: t.cpu() for name, t in step.state_dict().items()})
        loss = step(x.to(step.autoencoder.enc_rows.device)).loss
        with bare.on_cpu():
            right = plain(x).loss
        assert relative(loss.cpu(), right.double()) < 1e-4, f"loss {loss}, right {right}"
        ours = step.state_dict()
        for name, value in plain.state_dict().items():
            exact = not name.startswith("adam") or config.optimizer == Adam()
            wrong = exact and relative(ours[name].cpu(), value.double()) >= 1e-3
            assert not (wrong and bool(value.any())), name


def kind(config: DictionaryConfig, device: torch.device) -> None:
    """Some steps as on a CPU, a batch of NaN that changes nothing, and a resumed run."""
    step = _step(config, device)
    step.looks = False
    with bare.on_cpu():
        plain = _step(config, "cpu")
    _same(config, step, plain)
    before = {name: t.clone() for name, t in step.state_dict().items()}
    bad = step(torch.full((7, 13), math.nan, device=device))
    after = step.state_dict()
    changed = [name for name, t in before.items() if not torch.equal(t, after[name])]
    assert not bool(bad.finite), "NaN was taken"
    assert changed == ["n_steps"], f"a batch of NaN changed {changed}"
    again = _step(config, device)
    again.looks = False
    again.load_state_dict({name: t.cpu() for name, t in after.items()})
    x = _rows(1)[0].to(device)
    assert torch.equal(step(x).loss, again(x).loss), "a resumed step differs"


def graph(device: torch.device) -> str | None:
    """Steps that are replayed beside those that are launched."""
    if device.type != "cuda":
        return "not run: a GPU is missing"
    for name in ("topk", "batchtopk", "relu", "jumprelu", "gated"):
        launched, step = (_step(KINDS[name], device) for _ in range(2))
        replayed = StepGraph(step)
        for x in _rows(12):
            loss, right = replayed(x.to(device)).loss, launched(x.to(device)).loss
            assert relative(loss, right.double()) < 1e-4, f"{name}: loss {loss}, right {right}"
        assert replayed.recording is not None, f"{name} was not recorded"
    return None


def low_rows(device: torch.device) -> str | None:
    """Rows of 16 bits in the fused step: gradients beside float64."""
    if device.type != "cuda":
        return "not run: bfloat16 is missing in the interpreter"
    draw, width = Draw(0, "cuda"), 768
    x, b_enc, b_dec = draw.normal(509, width), draw.normal(8192), draw.normal(width) * 0.03
    low = [(draw.normal(8192, width) * width**-0.5).bfloat16() for _ in range(2)]
    weights = StepWeights(low[0], b_enc, None, low[1], b_dec)
    found = fused_topk_step(x.bfloat16().float(), x, weights, 32, scale=1 / 509)
    leaves = [t.double().requires_grad_() for t in (low[0], b_enc, low[1], b_dec)]
    pre = x.bfloat16().double() @ leaves[0].T + leaves[1]
    least = pre.detach().topk(32, dim=1).values[:, -1:]
    x_hat = (pre.relu() * (pre >= least)) @ leaves[2] + leaves[3]
    right = torch.autograd.grad((x_hat - x).square().sum() / 509, leaves)
    got = (found.enc_rows, found.b_enc, found.dec_rows, found.b_dec)
    errors = [relative(one, other) for one, other in zip(got, right, strict=True)]
    assert max(errors) < 2e-2, f"errors {errors}"
    return None


def processes(device: torch.device) -> str | None:
    """Two processes that split the rows, then the latents, beside one."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return "not run: a second GPU is missing"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", folder, "--rank"]
        several = [
            subprocess.Popen([*command, str(rank)], cwd=bare.ROOT, stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        said = [one.communicate(timeout=120)[1].decode().strip() for one in several]
    ends = [one.returncode for one in several]
    assert ends == [0, 0], "; ".join(text.splitlines()[-1] for text in said if text)
    return None


def rank(number: int, folder: Path) -> None:
    """What each of the two processes does."""
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", number) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=2,
    )
    for name in ("topk", "batchtopk"):
        for shards in (1, 2):
            alone = _step(KINDS[name], "cpu")
            step = _step(KINDS[name], device, ranks=connect(shards))
            for x in _rows(3):
                part = x if shards == 2 else x[step.ranks.rows.share(len(x))]
                loss, right = step(part.to(device)).loss, alone(x).loss
                assert relative(loss.cpu(), right.double()) < 1e-3, f"{name}, {shards} shards"
    dist.destroy_process_group()


CHECKS: dict[str, Check] = {
    "ties": ties,
    "NaN and infinities": not_numbers,
    "offsets past 2^31": offsets,
    "gated product": gated,
    "dispatch": dispatch,
    "autograd": autograd,
    **{f"TrainStep: {name}": partial(kind, config) for name, config in KINDS.items()},
    "CUDA graph": graph,
    "rows of 16 bits": low_rows,
    "two processes": processes,
}

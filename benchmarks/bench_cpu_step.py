"""Training steps on a CPU against their floors: the encoder's product, or the five dense ones.

    python -m benchmarks.bench_cpu_step [--rounds 5]

Every candidate is checked against float64 before anything is timed. Then each round runs every
candidate once, in an order that rotates; a figure is the median over rounds of process CPU time by
that of the floor in the same round, so that a busy machine harms it little. The steps are whole:
forward, losses, backward, clipping, the decoder's projection and norm, Adam, dead-latent counts.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.peer_steps import peer_steps
from benchmarks.rows import ROOT, append, surroundings
from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import L1, AuxK, DictionaryConfig
from sae.train.step import TrainStep
from sae_kernels import dense_autoencode, encode_topk, sparse_decode
from sae_kernels.screen import bf16_speedup

PEERS = ("eai-sparsify", "sae-lens", "dictionary-learning")  # their versions, where installed
DEAD_SHARE = 0.05
L1_LATENTS = 8192

Step = Callable[[], object]


class StepShape(NamedTuple):
    """The size of a TopK step; the L1 step has L1_LATENTS latents."""

    n: int
    d: int
    m: int
    k: int


def dictionary(shape: StepShape, topk: bool = True) -> SparseAutoencoder:
    activation = TopK(k=shape.k) if topk else ReLU()
    d_sae = shape.m if topk else L1_LATENTS
    model = SparseAutoencoder(SAEConfig(d_in=shape.d, d_sae=d_sae, activation=activation))
    initialise(model, torch.Generator().manual_seed(0))
    return model


def rows(shape: StepShape, n: int | None = None) -> Tensor:
    return torch.randn(n or shape.n, shape.d, generator=torch.Generator().manual_seed(1))


def topk_step(
    shape: StepShape, aux: AuxK | None = None, screen: str | None = None, precision: str = "fp32"
) -> Step:
    """The product's own training step; `screen` forces the encoder's screen."""
    model, x = dictionary(shape), rows(shape)
    config = DictionaryConfig(d_sae=shape.m, activation=TopK(k=shape.k), auxk=aux)
    step = TrainStep(model, config, 1000, precision=precision)

    def run() -> None:
        if aux:
            step.silent_rows.zero_()
            step.silent_rows[: int(DEAD_SHARE * shape.m)] = config.dead_after_tokens
        if screen is None:
            step(x)
        else:
            with mock.patch("sae_kernels.encode.best_screen", return_value=screen):
                step(x)

    return run


def dense_topk(x: Tensor, model: SparseAutoencoder, k: int) -> tuple[Tensor, Tensor]:
    """What a user writes with torch alone."""
    pre = torch.addmm(model.b_enc, x - model.b_dec, model.enc_rows.T)
    top = pre.topk(k, dim=1)
    acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    return torch.addmm(model.b_dec, acts, model.dec_rows), acts


def dense_step(shape: StepShape) -> Step:
    """A dense TopK step by autograd, with the same recipe and torch's fused Adam."""
    model, x = dictionary(shape), rows(shape)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    silent = torch.zeros(shape.m, dtype=torch.int64)

    def run() -> None:
        optimizer.zero_grad()
        x_hat, acts = dense_topk(x, model, shape.k)
        (x_hat - x).square().sum(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        with torch.no_grad():
            w, grad = model.dec_rows, model.dec_rows.grad
            assert grad is not None
            grad.sub_((grad * w).sum(1, keepdim=True) * w)
            optimizer.step()
            w.div_(w.norm(dim=1, keepdim=True))
            silent.add_(len(x))
            silent[(acts > 0).any(0)] = 0

    return run


def product_floor(shape: StepShape) -> Step:
    """The encoder's product in float32, in chunks that suit it."""
    x, weights = rows(shape), dictionary(shape).enc_rows.detach()
    out = torch.empty(512, shape.m)

    def run() -> None:
        for part in x.split(512):
            torch.mm(part, weights.T, out=out[: len(part)])

    return run


def l1_floor(shape: StepShape) -> Step:
    """The five products of a dense step, and nothing else."""
    x, weights = rows(shape), dictionary(shape, topk=False).enc_rows.detach()
    h, y = torch.empty(shape.n, L1_LATENTS), torch.empty(shape.n, shape.d)
    grad = torch.empty(L1_LATENTS, shape.d)

    def run() -> None:
        torch.mm(x, weights.T, out=h)
        torch.mm(h, weights, out=y)
        torch.mm(y, weights.T, out=h)
        torch.mm(h.T, x, out=grad)
        torch.mm(h.T, y, out=grad)

    return run


def l1_step(shape: StepShape, fused: bool) -> Step:
    """A step with the L1 penalty: by hand (`dense_autoencode`), or by autograd."""
    model, x = dictionary(shape, topk=False), rows(shape)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    silent = torch.zeros(L1_LATENTS, dtype=torch.int64)

    def run() -> None:
        optimizer.zero_grad()
        loss, fired = l1_loss(model, x, fused)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        silent.add_(len(x))
        silent[fired] = 0

    return run


def l1_loss(model: SparseAutoencoder, x: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    w = model
    if fused:
        out = dense_autoencode(x, w.enc_rows, w.b_enc, w.dec_rows, w.b_dec, b_in=w.b_dec)
        return (out.x_hat - x).square().sum(1).mean() + 5 * out.l1, out.n_fired > 0
    acts = torch.addmm(w.b_enc, x - w.b_dec, w.enc_rows.T).relu()
    x_hat = torch.addmm(w.b_dec, acts, w.dec_rows)
    penalty = (acts * w.dec_rows.norm(dim=1)).sum(1).mean()
    return (x_hat - x).square().sum(1).mean() + 5 * penalty, (acts > 0).any(0)


def train_step_l1(shape: StepShape) -> Step:
    """The product's own L1 step."""
    model, x = dictionary(shape, topk=False), rows(shape)
    config = DictionaryConfig(d_sae=L1_LATENTS, activation=ReLU(), l1=L1(), unit_norm=False)
    step = TrainStep(model, config, 1000)
    return lambda: step(x)


def check(shape: StepShape) -> None:
    """Compare losses and gradients with float64 on some rows; nothing is timed that fails."""
    x = rows(shape, 97)
    for topk in (True, False):
        results = []
        for dtype in (torch.float32, torch.float64):
            model, u = dictionary(shape, topk).to(dtype), x.to(dtype)
            exact = dtype == torch.float64
            if not topk:
                loss = l1_loss(model, u, fused=not exact)[0]
            elif exact:
                loss = (dense_topk(u, model, shape.k)[0] - u).square().sum(1).mean()
            else:
                w = model
                latents = encode_topk(u, w.enc_rows, w.b_enc, shape.k, b_in=w.b_dec)
                x_hat = sparse_decode(*latents, w.dec_rows, w.b_dec)
                loss = (x_hat - u).square().sum(1).mean()
            results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        for got, want in zip(*results, strict=True):
            error = float((got.double() - want).detach().norm() / want.detach().norm())
            if not error < 2e-6:
                raise SystemExit(f"wrong by {error:.1e}: nothing was timed")


def candidates(shape: StepShape) -> dict[str, tuple[str, Step]]:
    """Name each candidate's floor and make it."""
    topk = {
        "encoder product, float32": product_floor(shape),
        "topk": topk_step(shape),
        "topk, float32 screen": topk_step(shape, screen="float32"),
        "topk + auxk": topk_step(shape, AuxK()),
        "topk + auxk in bf16": topk_step(shape, AuxK(products="bf16")),
        "topk + auxk, bf16 step": topk_step(shape, AuxK(), precision="bf16"),
        "topk, dense autograd": dense_step(shape),
        **peer_steps(rows(shape), shape.m, shape.k),
    }
    l1 = {
        "five products, float32": l1_floor(shape),
        "l1, by hand": l1_step(shape, fused=True),
        "l1, dense autograd": l1_step(shape, fused=False),
        "l1, TrainStep": train_step_l1(shape),
    }
    return {
        name: (next(iter(family)), step) for family in (topk, l1) for name, step in family.items()
    }


def measure(steps: dict[str, tuple[str, Step]], rounds: int) -> dict[str, list[float]]:
    """Run every candidate once a round, in rotated order; the first round is not kept."""
    names, seconds = list(steps), {name: [] for name in steps}
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            steps[name][1]()
            seconds[name].append(time.process_time() - start)
    return {name: values[1:] for name, values in seconds.items()}


def peak_memory(shape: StepShape, name: str) -> float:
    """Take two steps in a process of its own; MB resident at most, libraries included."""
    code = ["-m", "benchmarks.bench_cpu_step", "--memory-of", name, *(str(v) for v in shape)]
    return float(subprocess.check_output([sys.executable, *code], cwd=ROOT, text=True))


def memory_of(arguments: list[str]) -> None:
    name, shape = arguments[0], StepShape(*map(int, arguments[1:]))
    run = topk_step(shape) if name == "topk" else dense_step(shape)
    for _ in range(2):
        run()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not kept")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in zip("ndmk", (4096, 512, 16384, 32), strict=True):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--record", action="store_true", help="append to results/cpu_step.jsonl")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--memory-of"]:
        memory_of(sys.argv[2:])
        return
    options = parsed()
    torch.set_num_threads(options.threads)
    shape = StepShape(options.n, options.d, options.m, options.k)
    # first, because a process starts with the peak of the one that started it
    memory = {name: peak_memory(shape, name) for name in ("topk", "topk, dense autograd")}
    check(shape)
    steps = candidates(shape)
    seconds = measure(steps, options.rounds)
    results = [row(n, steps[n][0], seconds, shape) | {"peak_mb": memory.get(n)} for n in seconds]
    facts = surroundings(PEERS) | {"bf16_speedup": round(bf16_speedup(), 2)}
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if options.record:
        print(append("cpu_step", [facts | one for one in results]))


def row(
    name: str, floor: str, seconds: dict[str, list[float]], shape: StepShape
) -> dict[str, object]:
    values = seconds[name]
    d_sae, k = (L1_LATENTS, None) if floor.startswith("five") else (shape.m, shape.k)
    ratios = [mine / base for mine, base in zip(values, seconds[floor], strict=True)]
    print(
        f"{name:26} {median(values):7.3f} s, {median(ratios):6.3f} x floor "
        f"({min(ratios):.2f}-{max(ratios):.2f})"
    )
    return {
        "shape": {"batch": shape.n, "d_in": shape.d, "d_sae": d_sae, "k": k},
        "candidate": name,
        "floor": floor,
        "cpu_seconds": {"median": median(values), "min": min(values), "max": max(values)},
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "rounds": len(values),
    }


if __name__ == "__main__":
    main()

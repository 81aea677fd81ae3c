"""How long a run will take here, said before it begins."""

import time

import torch

from sae.cli import console
from sae.cli.run_config import RunConfig
from sae.train.fit import resolve_precision

ENCODER_SHAPE = (1024, 576, 4608)
"""How many products of this shape a training step takes, sparse work and the optimiser included,
is a fact of each activation (`sae.architecture`): measured on two cores for topk and relu, of the
others by their count of products."""


def announce(config: RunConfig) -> None:
    """Print the expected time of the training, from one timed product on this machine."""
    rate = _flops_per_second(resolve_precision(config.train.precision))
    rows = config.cache.n_rows * config.train.epochs
    # Without the model its width is unknown; the reference shape's width serves.
    per_latent = 2.0 * ENCODER_SHAPE[1] * rows / rate
    seconds = sum(
        per_latent * entry.d_sae * entry.activation.facts.products
        for entry in config.train.saes.values()
    )
    console.OUT.print(
        f"[dim]{torch.get_num_threads()} threads, {rate / 1e9:,.0f} GFLOP/s: training about "
        f"{max(seconds / 60, 0.1):.1f} min for {len(config.train.saes)} dictionaries; every step "
        "shows its own ETA[/]",
        soft_wrap=True,
    )


def _flops_per_second(precision: str) -> float:
    n, d, m = ENCODER_SHAPE
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = torch.ones(n, d, dtype=dtype), torch.ones(d, m, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(x, w)
        times.append(time.perf_counter() - began)
    return 2.0 * n * d * m / min(times)

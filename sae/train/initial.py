"""First weights that look at rows: data points as directions, a median as bias, a fitting norm."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward.result import Moment, Rows
from sae.train.forward.run import forward
from sae.train.init_config import DataPoints

ITERATIONS = 100
"""Of Weiszfeld's algorithm, at most."""


@torch.no_grad()
def refine_(
    autoencoder: SparseAutoencoder,
    entry: DictionaryConfig,
    read: Callable[[], tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]],
) -> None:
    """Bring fresh weights, in place, to what `entry.init` says beyond a mean and random rows.

    Args:
        autoencoder: As `sae.autoencoder.initialise` left it.
        entry: What is trained.
        read: Gives rows of the cache in the model's units: what is read, and what is predicted.
    """
    init = entry.init
    if init.bias == "mean" and not init.norms and not isinstance(init, DataPoints):
        return
    x, target = read()
    u = autoencoder.scaled(x)
    rows = Rows(u, autoencoder.scaled_out(target) if entry.outputs else u)
    if init.bias == "median":
        autoencoder.b_dec.copy_(geometric_median(rows.v))
    if isinstance(init, DataPoints):
        _take_rows_(autoencoder, rows)
    if init.norms:
        _choose_norm_(autoencoder, entry, rows)


def geometric_median(points: Float[Tensor, "row d_out"]) -> Float[Tensor, " d_out"]:
    """The point with the least sum of distances to all (Weiszfeld 1937), from the mean on.

    A guess on top of a point moves on or stays as Vardi and Zhang (2000) have it: no division by 0.
    """
    exact = points.double()
    guess = exact.mean(dim=0)
    for _ in range(ITERATIONS):
        distance = (exact - guess).norm(dim=1)
        on_top = distance <= 1e-12 * exact.norm(dim=1).clamp_min(1)
        weight = torch.where(on_top, 0.0, 1 / distance.clamp_min(torch.finfo(torch.float64).tiny))
        if not bool((weight > 0).any()):
            break
        moved = (weight[:, None] * exact).sum(dim=0) / weight.sum()
        pull = (weight[:, None] * (exact - guess)).sum(dim=0).norm()
        stay = min(1.0, float(on_top.sum() / pull)) if float(pull) > 0 else 1.0
        step = (1 - stay) * (moved - guess)
        guess = guess + step
        if float(step.norm()) <= 1e-9 * max(float(guess.norm()), 1e-9):
            break
    return guess.to(points.dtype)


def _take_rows_(autoencoder: SparseAutoencoder, rows: Rows) -> None:
    """Directions of rows less the bias for as many latents as there are rows, norms kept."""
    n = min(len(rows.v), len(autoencoder.dec_rows))
    b_in = autoencoder.encoder().b_in
    read = rows.u[:n] if b_in is None else rows.u[:n] - b_in
    for weights, points in (
        (autoencoder.dec_rows, rows.v[:n] - autoencoder.b_dec),
        (autoencoder.enc_rows, read),
    ):
        norms = weights[:n].norm(dim=1, keepdim=True)
        weights[:n] = normalize(points, dim=1) * norms


def _choose_norm_(autoencoder: SparseAutoencoder, entry: DictionaryConfig, rows: Rows) -> None:
    """Give all rows the norm, of those to be tried, at which these rows' error is least."""
    directions = [normalize(w, dim=1) for w in (autoencoder.enc_rows, autoencoder.dec_rows)]
    dead = torch.zeros(entry.d_sae, dtype=torch.bool)
    moment = Moment(0, 1, dead, bf16=False, n_rows=len(rows.u))
    errors: dict[float, float] = {}

    def set_to(norm: float, *, trained: bool) -> None:
        autoencoder.enc_rows.copy_(directions[0] * norm)
        autoencoder.dec_rows.copy_(directions[1] * (1.0 if trained and entry.unit_norm else norm))

    for norm in entry.init.norms:
        set_to(norm, trained=True)
        errors[norm] = float(forward(autoencoder, entry, rows, moment).error)
    set_to(min(errors, key=lambda norm: errors[norm]), trained=False)

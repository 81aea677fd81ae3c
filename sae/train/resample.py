"""Resampling of dead latents (Bricken et al., Towards Monosemanticity, 2023)."""

import random
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.train.forward.common import Rows
from sae.train.optim_config import Resample
from sae.train.ranks import Ranks


def is_due(settings: Resample, n_steps: int, total_steps: int) -> bool:
    """Whether it is done after so many steps: n times, evenly, the last time at `until`."""
    each = settings.until * total_steps / settings.n
    return n_steps in {round(each * i) for i in range(1, settings.n + 1)}


class Candidates(NamedTuple):
    """Rows that latents may begin again from, of all processes, and their squared errors."""

    rows: Rows
    losses: Float[Tensor, " batch"]


@torch.no_grad()
def candidates_of(autoencoder: SparseAutoencoder, rows: Rows, ranks: Ranks) -> Candidates:
    """The rows of the whole batch that are not reconstructed exactly."""
    y = autoencoder.decode_scaled(autoencoder.encode_scaled(rows.u), rows.u)
    losses = (rows.v - y).square().sum(dim=1)
    n_padding = ranks.largest(len(losses)) - len(losses)
    padded = (torch.cat([t, t.new_zeros(n_padding, *t.shape[1:])]) for t in (*rows, losses))
    u, v, losses = (ranks.rows.gather(t).flatten(0, 1) for t in padded)
    kept = losses > 0
    return Candidates(Rows(u[kept], v[kept]), losses[kept])


@torch.no_grad()
def resample_(
    autoencoder: SparseAutoencoder,
    dead: Bool[Tensor, " d_sae"],
    candidates: Candidates,
    settings: Resample,
    n_steps: int,
) -> Int[Tensor, " latent"]:
    """Begin dead latents again from rows of this batch; return their numbers.

    No row serves twice, so where more latents are dead than there are rows, those with the highest
    numbers have to wait.

    Args:
        autoencoder: Changed in place.
        dead: The latents that are dead.
        candidates: The rows, in the dictionary's units, with their errors.
        settings: The seed, and the norm of new encoder rows.
        n_steps: Steps done; decides with the seed what is drawn.
    """
    (u, v), losses = candidates
    latents = dead.nonzero().squeeze(1)[: len(losses)]
    if not len(latents):
        return latents
    drawn = _drawn(losses.square(), len(latents), f"resample {settings.seed} {n_steps}")
    alive = ~dead if bool((~dead).any()) else dead  # with none alive, the dead tell the norms
    b_in, enc_rows, dec_rows = (
        autoencoder.encoder().b_in,
        autoencoder.enc_rows,
        autoencoder.dec_rows,
    )
    size = enc_rows[alive].norm(dim=1).mean() * settings.encoder_norm
    read = u[drawn] if b_in is None else u[drawn] - b_in
    enc_rows[latents] = torch.nn.functional.normalize(read, dim=1) * size
    size = dec_rows[alive].norm(dim=1).mean()
    dec_rows[latents] = torch.nn.functional.normalize(v[drawn] - autoencoder.b_dec, dim=1) * size
    activation = autoencoder.config.activation
    for name in activation.facts.parameters:
        fresh = activation.first_threshold if name == "threshold" else 0
        autoencoder.get_parameter(name)[latents] = fresh
    return latents


def _drawn(weights: Float[Tensor, " batch"], n: int, seed: str) -> Int[Tensor, " latent"]:
    """Numbers of n rows, drawn without replacement; the same on every device."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(32))
    shares = weights.double().cpu()
    least = torch.finfo(torch.float32).tiny  # multinomial is float32 and refuses too few non-zeros
    shares = (shares / shares.max()).clamp_min(least)
    return torch.multinomial(shares.float(), n, generator=generator).to(weights.device)

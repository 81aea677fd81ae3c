"""Terms of the loss that several forward passes have."""

import math

from jaxtyping import Float
from torch import Tensor

from sae import losses
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward.result import Forward, Moment, Power, Rows, autocast
from sae.train.loss_config import Control, FixedPrefixes, Matryoshka, RandomPrefixes
from sae.train.schedule import random_prefixes
from sae_kernels import auxk as reconstruction_by_dead


def prefix_ends(matryoshka: Matryoshka, d_sae: int, n_steps: int) -> tuple[int, ...]:
    """Sizes of the prefixes at a step, the whole dictionary last."""
    if isinstance(matryoshka, FixedPrefixes):
        return (*matryoshka.ends, d_sae)
    assert isinstance(matryoshka, RandomPrefixes), matryoshka
    of = matryoshka
    return random_prefixes(n_steps, of.seed, of.n, d_sae, of.exponent)


def prefix_share(matryoshka: Matryoshka, n_steps: int, total_steps: int) -> float:
    """Weight of the mean over the prefixes at a step; the rest is that of the whole dictionary."""
    until = matryoshka.until if isinstance(matryoshka, FixedPrefixes) else None
    return 1.0 if until is None else max(0.0, 1 - n_steps / (until * total_steps))


def auxk(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    y: Float[Tensor, "batch d_out"],
) -> float | Float[Tensor, ""]:
    """How badly the dead latents reconstruct what y leaves, times the coefficient; 0 without."""
    settings, weights, dec_rows = config.auxk, autoencoder.encoder(), autoencoder.dec_rows
    if settings is None or not bool(moment.dead.any()):
        return 0.0
    k = settings.k or max(rows.u.shape[1] // 2, 1)
    b_in = None if weights.b_in is None else weights.b_in.detach()
    if weights.norms is not None:
        dec_rows = dec_rows / weights.norms[:, None]
    with autocast(rows.u.device, moment.bf16 or settings.products == "bf16"):
        found = reconstruction_by_dead(
            rows.u, weights.enc_rows, weights.b_enc, dec_rows, moment.dead, k, b_in=b_in
        )
    residual = (rows.v - y).detach()
    with autocast(rows.u.device, False):
        error = losses.squared_error(residual, found.to(residual.dtype))
    return settings.coefficient * error


def controlled(control: Control, found: Forward, moment: Moment) -> Forward:
    """The same with the penalty's new weight."""
    l0, before = float(moment.ranks.mean(found.l0, moment.share)), moment.power
    off = min(max(l0 / control.target - 1, -1.0), 1.0)
    return found._replace(power=Power(before.p, before.scale * math.exp(control.rate * off)))

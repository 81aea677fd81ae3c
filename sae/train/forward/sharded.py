"""Forward passes of a dictionary whose latents are split among processes.

Each process has the same rows, encodes them with its own latents, and takes part in the selection;
the reconstructions add up to the whole one. Its gradient is the same for each part, so that
nothing but a (batch, d_out) sum and the candidates of the selection goes over the wire.
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosema.checks import MonosemaError
from sae import activations, losses
from sae.activations import EncoderWeights
from sae.architecture import BatchTopK, TopK
from sae.autoencoder import SparseAutoencoder
from sae.losses import Loss
from sae.train.config import DictionaryConfig
from sae.train.forward import dense
from sae.train.forward.common import (
    Forward,
    Moment,
    Rows,
    autocast,
    batch_topk,
    encoder_of_dead,
)
from sae.train.forward.sparse import Kept, k_now, scores_of
from sae.train.optim_config import ramp
from sae.train.ranks import Axis
from sae_kernels import encode_topk, sparse_decode, topk_select
from sae_kernels.auxk import few_of
from sae_kernels.launch import counts


def require_shardable(config: DictionaryConfig, n_shards: int, losses: Sequence[Loss] = ()) -> None:
    """Refuse what cannot be trained in parts.

    Raises:
        ValueError: If the latents cannot be split evenly, or a term needs all of them.
    """
    if n_shards == 1:
        return
    if config.d_sae % n_shards != 0:
        raise MonosemaError(
            f"d_sae must be a multiple of latent_shards={n_shards}, got {config.d_sae}; round it up"
        )
    terms = {name: term for name, term in config.terms.items() if not term.facts.is_sharded}
    others = {"resample": config.resample, "cross_layer": config.cross_layer}
    others["losses"] = [*config.losses, *losses]
    for name, value in (terms | others).items():
        if value:
            raise MonosemaError(
                f"{name} must be absent with latent_shards={n_shards}, got {value}; set "
                "latent_shards=1"
            )
    if config.optimizer.kind == "muon":
        raise MonosemaError(
            f"optimizer.kind must be one that goes row by row with latent_shards={n_shards}, "
            "got 'muon'; set latent_shards=1"
        )
    if config.activation.facts.choice == "group":
        raise MonosemaError(
            f"activation.kind must be one that is chosen over all latents with "
            f"latent_shards={n_shards}, got {config.activation.kind!r}; set latent_shards=1"
        )


def forward(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Forward:
    """Losses of rows in the dictionary's units; `autoencoder` holds this process's latents."""
    trains = autoencoder.config.activation.facts.trains
    match trains:
        case "sparse":
            return _sparse(autoencoder, config, rows, moment)
        case "dense":
            return _dense(autoencoder, config, rows, moment)
        case "gated":
            return _gated(autoencoder, config, rows, moment)
        case _:
            assert_never(trains)


def _sparse(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Forward:
    axis, weights, activation = moment.ranks.latents, autoencoder.encoder(), k_now(config, moment)
    if isinstance(activation, BatchTopK):
        of_all = (moment.n_rows, moment.ranks, moment.looks)
        latents = Kept(*batch_topk(rows.u, weights, activation.k, *of_all))
    else:
        assert isinstance(activation, TopK), activation
        latents = topk(rows.u, weights, activation.k, axis)
    with autocast(rows.u.device, False):
        values, indices, row_ptr = latents
        part = sparse_decode(values, indices, autoencoder.dec_rows, row_ptr=row_ptr)
        y = _whole(autoencoder, rows, part, axis)
        error = losses.squared_error(rows.v, y)
    loss = error + _auxk(autoencoder, config, rows, moment, y)
    fires = latents.values > 0
    l0 = axis.total(fires.sum() / len(y))
    threshold = None
    if activation.facts.threshold == "one":
        threshold = moment.ranks.smallest(scores_of(latents, weights))
    n_fired = counts(latents.indices, len(moment.dead), fires)
    return Forward(loss, error, n_fired, l0, y.detach(), threshold)


def topk(u: Float[Tensor, "batch d_in"], weights: EncoderWeights, k: int, axis: Axis) -> Kept:
    """This process's part of the k largest of each row: value descending, latent ascending.

    The k best of each process are enough; side by side they stand in the order of the latents.
    What is not kept stays as a place with the value 0.
    """
    offered = min(k, len(weights.enc_rows))
    own = encode_topk(u, weights.enc_rows, weights.b_enc, offered, b_in=weights.b_in)
    kept = _kept(own.values.detach(), k, axis)
    values = own.values.where(kept, own.values.new_zeros(()))
    if weights.norms is not None:
        values = values / weights.norms[own.indices]
    return Kept(values, own.indices)


def _kept(offers: Float[Tensor, "batch k"], n_kept: int, axis: Axis) -> Bool[Tensor, "batch k"]:
    """Which of this process's offers are among the n_kept largest of each row."""
    n = offers.shape[1]
    everyone = axis.gather(offers).permute(1, 0, 2).flatten(1)  # (batch, shards * k)
    picked = topk_select(everyone, n_kept).indices
    kept = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, picked, True)
    return kept[:, axis.rank * n : (axis.rank + 1) * n]


def _whole(
    autoencoder: SparseAutoencoder, rows: Rows, part: Float[Tensor, "batch d_out"], axis: Axis
) -> Float[Tensor, "batch d_out"]:
    """The reconstruction from all latents; what they share has its gradient in one process."""
    rest = autoencoder.b_dec + autoencoder.skipped(rows.u)
    return axis.total(part.to(rows.u.dtype)) + (rest if axis.rank == 0 else rest.detach())


def _dense(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Forward:
    axis, weights, activation = (
        moment.ranks.latents,
        autoencoder.encoder(),
        autoencoder.config.activation,
    )
    pre = activations.pre_acts(rows.u, weights).to(rows.u.dtype)
    acts, n_active = dense.acts_of(activation, pre, weights)
    y = _whole(autoencoder, rows, acts @ autoencoder.dec_rows, axis)
    error = losses.squared_error(rows.v, y)
    l1 = axis.total(losses.l1_decoder_norm(acts, autoencoder.decoder_norms()))
    l0 = axis.total(n_active.sum(dim=1).mean())
    loss = error + dense.penalty(config, moment, rows, l1, l0)
    loss = loss + _auxk(autoencoder, config, rows, moment, y)
    return Forward(loss, error, (acts.detach() > 0).sum(dim=0), l0.detach(), y.detach())


def _gated(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Forward:
    assert config.l1 is not None
    axis, u = moment.ranks.latents, rows.u
    b_gate, b_mag, r_mag = (autoencoder.get_parameter(n) for n in ("b_gate", "b_mag", "r_mag"))
    weights = autoencoder.encoder()._replace(b_enc=torch.zeros_like(b_gate))
    pi = activations.pre_acts(u, weights).to(u.dtype)
    gates = torch.relu(pi + b_gate)
    acts = torch.relu(pi * r_mag.exp() + b_mag) * (gates > 0)
    y = _whole(autoencoder, rows, acts @ autoencoder.dec_rows, axis)
    error = losses.squared_error(rows.v, y)
    rest = (autoencoder.b_dec + autoencoder.skipped(u)).detach()
    guess = axis.total((gates @ autoencoder.dec_rows.detach()).to(u.dtype)) + rest
    l1 = axis.total(losses.l1_decoder_norm(gates, autoencoder.decoder_norms()))
    weight = config.l1.coefficient * ramp(moment.n_steps, moment.total_steps, config.l1.ramp)
    loss = error + weight * l1 + losses.squared_error(rows.v, guess)
    loss = loss + _auxk(autoencoder, config, rows, moment, y)
    fires = acts.detach() > 0
    l0 = axis.total(fires.sum(dim=1).float().mean())
    return Forward(loss, error, fires.sum(dim=0), l0, y.detach())


def _auxk(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    y: Float[Tensor, "batch d_out"],
) -> float | Float[Tensor, ""]:
    """How badly the dead latents of all processes reconstruct what y leaves; 0 without.

    Where the host does not look how many are dead, the bound is the same in all processes.
    """
    settings, axis, weights = config.auxk, moment.ranks.latents, encoder_of_dead(autoencoder)
    if settings is None:
        return 0.0
    dead, is_dead = few_of(moment.dead, moment.most_dead)
    if moment.most_dead is None:
        n_dead = int(axis.total(torch.tensor(len(dead), device=dead.device)))
    else:
        n_dead = moment.most_dead * axis.size
    if n_dead == 0:
        return 0.0
    k = min(settings.k or max(rows.u.shape[1] // 2, 1), n_dead)
    x = rows.u if weights.b_in is None else rows.u - weights.b_in
    dec_rows = autoencoder.dec_rows[dead]
    if weights.norms is not None:
        dec_rows = dec_rows / weights.norms[dead, None]
    with autocast(x.device, moment.bf16 or settings.products == "bf16"):
        pre = x @ weights.enc_rows[dead].T + weights.b_enc[dead]
        if is_dead is not None:
            pre = pre.masked_fill(~is_dead, -torch.inf)
        kept = _kept_dead(pre.detach().to(x.dtype), k, axis)
        part = pre.relu().masked_fill(~kept, 0.0) @ dec_rows
    guess = axis.total(part.to(x.dtype))
    error = settings.coefficient * losses.squared_error((rows.v - y).detach(), guess)
    if is_dead is None:
        return error
    now_dead = moment.dead.sum()
    axis.sum_(now_dead)
    return error * (now_dead > 0)


def _kept_dead(pre: Float[Tensor, "batch dead"], k: int, axis: Axis) -> Bool[Tensor, "batch dead"]:
    """Which of this process's dead latents are among the k largest of each row."""
    n = min(k, pre.shape[1])
    offers = pre.new_full((len(pre), k), -torch.inf)
    own = pre.new_zeros((len(pre), 0), dtype=torch.int64)
    if n:
        own = topk_select(pre, n).indices
        offers[:, :n] = pre.gather(1, own)
    kept = _kept(offers, k, axis)[:, :n]
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, own, kept)

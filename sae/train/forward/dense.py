"""Forward passes with dense latents: ReLU and JumpReLU with their penalties.

The forward pass of gated dictionaries (Rajamanoharan et al. 2024, arXiv 2404.16014).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae import activations, losses
from sae.activations import EncoderWeights
from sae.architecture import Activation
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import common
from sae.train.forward.common import Forward, Moment, Power, Rows, autocast
from sae.train.loss_config import PAnneal
from sae.train.optim_config import falling_p, ramp
from sae_kernels import dense_autoencode
from sae_kernels.auxk import few_of


class DenseChoices(NamedTuple):
    """What of the pass the number of the step decides; all else is decided on the device."""

    weights: tuple[float, ...]
    """Of the penalties, as far as they have risen."""
    ends: tuple[int, ...] | None
    """Ends of the prefixes."""
    share: float
    """Weight of the mean over them."""


def choices(config: DictionaryConfig, moment: Moment) -> DenseChoices | None:
    """Decide them; None where the host has a part in what one step hands to the next."""
    if moment.losses or config.control is not None or config.p_anneal is not None:
        return None
    at = (moment.n_steps, moment.total_steps)
    terms = [term for term in (config.l1, config.l0, config.tanh) if term is not None]
    weights = tuple(ramp(*at, term.ramp) for term in terms)
    if config.matryoshka is None:
        return DenseChoices(weights, None, 0.0)
    ends = common.prefix_ends(config.matryoshka, config.d_sae, moment.n_steps)
    return DenseChoices(weights, ends, common.prefix_share(config.matryoshka, *at))


def forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
) -> Forward:
    """Differentiated by hand where the kernel has all the terms, else by autograd."""
    form = autoencoder.config
    is_plain = not form.gate_by_decoder_norm and len(form.slices_out) == 1
    precision = "bf16" if moment.bf16 else "fp32"
    has_op = precision in form.activation.facts.one_op
    if has_op and is_plain and config.in_one_op and not moment.losses:
        return _fused(autoencoder, config, rows, moment)
    return _composed(autoencoder, config, rows, moment)


def _fused(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
) -> Forward:
    """One op, in float32; on a GPU its products take bfloat16 where that is asked for."""
    weights = common.penalised_encoder(autoencoder, config)
    activation = autoencoder.config.activation
    few_bits = moment.bf16 and rows.u.device.type != "cpu"
    with autocast(rows.u.device, False):
        step = dense_autoencode(
            rows.u,
            weights.enc_rows,
            weights.b_enc,
            autoencoder.dec_rows,
            autoencoder.b_dec,
            b_in=weights.b_in,
            threshold=weights.threshold,
            bandwidth=activation.window,
            products=torch.bfloat16 if few_bits else None,
        )
        y = step.x_hat + autoencoder.skipped(rows.u)
    error = losses.squared_error(rows.v, y)
    loss = error + penalty(config, moment, rows, step.l1, step.l0)
    loss = loss + common.auxk(autoencoder, config, rows, moment, y)
    return Forward(loss, error, step.n_fired, step.l0.detach(), y.detach())


class _Acts(NamedTuple):
    """Activations, and how many fire, both with the pseudo-gradients of the thresholds."""

    acts: Float[Tensor, "batch d_sae"]
    n_active: Float[Tensor, "batch d_sae"]


def _composed(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
) -> Forward:
    """All terms, in torch's own operations."""
    weights = common.penalised_encoder(autoencoder, config)
    activation = autoencoder.config.activation
    u = rows.u
    pre = activations.pre_acts(u, weights).to(u.dtype)
    acts, n_active = acts_of(activation, pre, weights)
    y, error, loss = _decoded(autoencoder, config, rows, moment, acts)
    loss = loss + common.auxk(autoencoder, config, rows, moment, y)
    norms, l0 = autoencoder.decoder_norms(), n_active.sum(dim=1).mean()
    power = None
    if config.tanh is not None:
        weight = ramp(moment.n_steps, moment.total_steps, config.tanh.ramp) * moment.power.scale
        found = losses.tanh_decoder_norm(acts, norms, config.tanh.scale)
        loss = loss + common.weighed(config.tanh.coefficient * weight, found)
    elif config.p_anneal is not None:
        power = _annealed(config.p_anneal, moment, acts.detach(), norms.detach())
        weight = ramp(moment.n_steps, moment.total_steps, config.p_anneal.ramp) * power.scale
        found = losses.power_decoder_norm(acts, norms, power.p)
        loss = loss + common.weighed(config.p_anneal.coefficient * weight, found)
    else:
        l1 = losses.l1_decoder_norm(acts, norms)
        loss = loss + penalty(config, moment, rows, l1, l0)
    if config.preact is not None and common.may_be_dead(moment):
        loss = loss + config.preact.coefficient * _distance(pre, weights, norms, moment)
    loss = loss + common.own_losses(autoencoder, rows, moment, y, acts)
    fires = acts.detach() > 0
    return Forward(loss, error, fires.sum(dim=0), l0.detach(), y.detach(), power=power)


class _DenseDecoded(NamedTuple):
    y: Float[Tensor, "batch d_out"]
    error: Float[Tensor, ""]
    loss: Float[Tensor, ""]


def _decoded(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    acts: Float[Tensor, "batch d_sae"],
) -> _DenseDecoded:
    """The reconstruction, its error, and the loss: that error, or the mean over the prefixes."""
    if config.matryoshka is None:
        y = autoencoder.decode_scaled(acts, rows.u).to(rows.u.dtype)
        error = losses.squared_error(rows.v, y)
        return _DenseDecoded(y, error, error)
    ends = common.prefix_ends(config.matryoshka, config.d_sae, moment.n_steps)
    y, errors = autoencoder.b_dec + autoencoder.skipped(rows.u), []
    for start, end in pairwise((0, *ends)):
        y = y + (acts[:, start:end] @ autoencoder.dec_rows[start:end]).to(rows.u.dtype)
        errors.append(losses.squared_error(rows.v, y))
    share = common.prefix_share(config.matryoshka, moment.n_steps, moment.total_steps)
    return _DenseDecoded(y, errors[-1], torch.lerp(errors[-1], torch.stack(errors).mean(), share))


def _annealed(
    settings: PAnneal,
    moment: Moment,
    acts: Float[Tensor, "batch d_sae"],
    norms: Float[Tensor, " d_sae"],
) -> Power:
    """The power of this step; where it has just fallen, this batch tells the new scale."""
    before = moment.power
    at = (moment.n_steps, moment.total_steps)
    p = falling_p(*at, settings.p, settings.n, settings.start)
    if p == before.p:
        return before
    both = (losses.power_decoder_norm(acts, norms, q) for q in (before.p, p))
    old, new = (float(moment.ranks.mean(found, moment.share)) for found in both)
    return Power(p, before.scale * old / new if new > 0 else before.scale)


def acts_of(
    activation: Activation, pre: Float[Tensor, "batch d_sae"], weights: EncoderWeights
) -> _Acts:
    """Activations, and how many fire, of any dense kind."""
    if activation.facts.one_op:
        return jump(pre, weights, activation.window)
    acts = activations.dense_acts(activation, pre, weights)
    n_active = (acts.detach() != 0).to(pre.dtype)
    return _Acts(acts if weights.norms is None else acts / weights.norms, n_active)


def jump(pre: Float[Tensor, "batch d_sae"], weights: EncoderWeights, bandwidth: float) -> _Acts:
    """ReLU or JumpReLU; terms of value 0 carry the thresholds' gradients (arXiv 2407.14435)."""
    zero, threshold = pre.new_zeros(()), weights.threshold
    fixed = zero if threshold is None else threshold.detach()
    fires = pre.detach() > fixed
    acts, n_active = pre.where(fires, zero), fires.to(pre.dtype)
    if threshold is not None:
        near = (pre.detach() - fixed).abs() < bandwidth / 2
        moved = near.to(pre.dtype) / bandwidth * (threshold - fixed)
        acts, n_active = acts - fixed * moved, n_active - moved
    return _Acts(acts if weights.norms is None else acts / weights.norms, n_active)


def _distance(
    pre: Float[Tensor, "batch d_sae"],
    weights: EncoderWeights,
    norms: Float[Tensor, " d_sae"],
    moment: Moment,
) -> Float[Tensor, ""]:
    """How far the dead latents are below their thresholds, in units of the output."""
    assert weights.threshold is not None
    dead, is_dead = few_of(moment.dead, moment.most_dead)
    of_dead = norms[dead] if weights.norms is None else norms.new_ones(len(dead))
    of_dead = of_dead if is_dead is None else of_dead * is_dead
    return losses.pre_act_distance(pre[:, dead], weights.threshold[dead], of_dead)


def penalty(
    config: DictionaryConfig,
    moment: Moment,
    rows: Rows,
    l1: Float[Tensor, ""],
    l0: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The sparsity penalty that is asked for, at its weight of this moment."""
    if config.l1 is not None:
        weight = ramp(moment.n_steps, moment.total_steps, config.l1.ramp) * moment.power.scale
        return common.weighed(config.l1.coefficient * weight, l1)
    assert config.l0 is not None
    weight = ramp(moment.n_steps, moment.total_steps, config.l0.ramp) * moment.power.scale
    l0 = moment.ranks.mean(l0, moment.share)  # the target is that of the whole batch
    coefficient = config.l0.weight(rows.v.shape[1])
    return common.weighed(coefficient * weight, losses.l0_penalty(l0, config.l0.target))


def gated_forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
) -> Forward:
    """The error, the penalty on the gates, and the error of what the gates alone reconstruct.

    A gate that opens or shuts has no gradient of its own: the gates learn from the last two, of
    which the last holds the decoder still.
    """
    assert config.l1 is not None
    u, v = rows
    b_gate, b_mag, r_mag = (autoencoder.get_parameter(n) for n in ("b_gate", "b_mag", "r_mag"))
    weights = common.penalised_encoder(autoencoder, config)._replace(b_enc=torch.zeros_like(b_gate))
    pi = activations.pre_acts(u, weights).to(u.dtype)
    gates = torch.relu(pi + b_gate)
    acts = torch.relu(pi * r_mag.exp() + b_mag) * (gates > 0)
    y = autoencoder.decode_scaled(acts, u).to(u.dtype)
    error = losses.squared_error(v, y)
    dec_rows, b_dec = autoencoder.dec_rows.detach(), autoencoder.b_dec.detach()
    past = torch.as_tensor(autoencoder.skipped(u)).detach()
    guess = (torch.addmm(b_dec, gates, dec_rows) + past).to(u.dtype)
    penalty = losses.l1_decoder_norm(gates, autoencoder.decoder_norms())
    weight = config.l1.coefficient * ramp(moment.n_steps, moment.total_steps, config.l1.ramp)
    weighed = common.weighed(weight * moment.power.scale, penalty)
    loss = error + weighed + losses.squared_error(v, guess)
    loss = loss + common.auxk(autoencoder, config, rows, moment, y)
    loss = loss + common.own_losses(autoencoder, rows, moment, y, acts)
    fires = acts.detach() > 0
    l0 = fires.sum(dim=1).float().mean()
    return Forward(loss, error, fires.sum(dim=0), l0, y.detach())

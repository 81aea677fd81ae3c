"""Forward passes with sparse latents, with AuxK, multi-TopK and Matryoshka."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import losses
from sae.activations import EncoderWeights, Latents, from_csr, pad_silent
from sae.architecture import Activation, BatchTopK, GroupMax, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import batch_topk, common
from sae.train.forward.common import Forward, Moment, Rows, autocast
from sae.train.loss_config import NestedK
from sae.train.schedule import falling_k, is_refined, slack_now
from sae_kernels import (
    Csr,
    encode_batch_topk,
    encode_group_max,
    encode_topk,
    sparse_decode,
    sparse_decode_mse,
    topk_select,
)
from sae_kernels.grads import counts


class Kept(NamedTuple):
    """What the activation lets through: k of each row, or one entry after the other (CSR).

    A latent whose activation is 0 stays where it is: it adds nothing, and no place is padded.
    """

    values: Float[Tensor, "batch k"] | Float[Tensor, " entry"]
    indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"]
    row_ptr: Int[Tensor, " bound"] | None = None


class _Decoded(NamedTuple):
    y: Float[Tensor, "batch d_out"]
    error: Float[Tensor, ""]
    loss: Float[Tensor, ""]


def forward(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Forward:
    """The latents that the activation lets through, and the losses of what they reconstruct."""
    weights, activation = autoencoder.encoder(), k_now(config, moment)
    multi, u = config.multi_topk, rows.u
    if multi is None:
        latents = _chosen(activation, _refined(autoencoder, config, rows, moment), weights, moment)
        found = _losses(autoencoder, config, rows, moment, latents)
        if activation.facts.threshold != "one":
            return found
        smallest = moment.ranks.smallest(scores_of(latents, weights))  # of what was kept
        return found._replace(threshold=smallest)
    assert isinstance(activation, TopK), activation
    wide = TopK(k=min(multi.times * activation.k, config.d_sae))
    more = _chosen(wide, u, weights, moment)
    latents = _narrowed(more, activation.k, weights)
    found = _losses(autoencoder, config, rows, moment, latents)
    with autocast(u.device, False):
        error = losses.squared_error(rows.v, _reconstructed(autoencoder, more, u))
    return found._replace(loss=found.loss + multi.coefficient * error)


def _chosen(
    activation: Activation, u: Float[Tensor, "batch d_in"], weights: EncoderWeights, moment: Moment
) -> Kept:
    """The latents of these rows; BatchTopK compares them with those of all other rows."""
    of, b_in = (u, weights.enc_rows, weights.b_enc), weights.b_in
    if isinstance(activation, BatchTopK) and not moment.ranks.alone:
        return Kept(*batch_topk.batch_topk(u, weights, activation.k, moment.n_rows, moment.ranks))
    match activation:
        case BatchTopK(k=k):
            kept = Kept(*encode_batch_topk(*of, k, b_in=b_in))
        case GroupMax(k=k):
            kept = Kept(*encode_group_max(*of, k, b_in=b_in))
        case _:
            assert isinstance(activation, TopK), activation
            kept = Kept(*encode_topk(*of, activation.k, b_in=b_in))
    if weights.norms is None:
        return kept
    return kept._replace(values=kept.values / weights.norms[kept.indices])


def _reconstructed(
    autoencoder: SparseAutoencoder, kept: Kept, u: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "batch d_out"]:
    """What these latents give of rows in the dictionary's units."""
    values, indices, row_ptr = kept
    decoder = (autoencoder.dec_rows, autoencoder.b_dec)
    y = sparse_decode(values, indices, *decoder, row_ptr=row_ptr)
    return y + autoencoder.skipped(u) if autoencoder.config.skip else y


def _shown(kept: Kept) -> Latents:
    """The latents in the form in which others than the training step see them."""
    values, indices, row_ptr = kept
    flat = Latents(values, indices) if row_ptr is None else from_csr(Csr(values, indices, row_ptr))
    return pad_silent(flat)


def _refined(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Float[Tensor, "batch d_in"]:
    """The rows with what their latents leave of them added; the rows themselves without refine."""
    u = rows.u
    if config.refine is None or is_refined(config.refine, moment.n_steps, moment.total_steps):
        return u
    weights, activation, read = autoencoder.encoder(), k_now(config, moment), u
    for _ in range(config.refine.steps):
        left = u - _reconstructed(autoencoder, _chosen(activation, read, weights, moment), u)
        read = read + config.refine.rate * left
    return read


def k_now(config: DictionaryConfig, moment: Moment) -> Activation:
    """The activation, or one with the larger k of a moment that anneals or has slack."""
    anneal, activation = config.k_anneal, config.activation
    if not isinstance(activation, TopK | BatchTopK):
        return activation
    at, k = (moment.n_steps, moment.total_steps), activation.k
    if anneal is not None:
        k = falling_k(*at, anneal.start, k, anneal.until)
    return replace(activation, k=round(k * slack_now(config.refine, *at)))


def _narrowed(latents: Kept, k: int, weights: EncoderWeights) -> Kept:
    """The k largest of each row's latents; their order stays."""
    places = topk_select(scores_of(latents, weights), k).indices
    return Kept(latents.values.gather(1, places), latents.indices.gather(1, places))


def scores_of(
    latents: Kept | Latents, weights: EncoderWeights
) -> Float[Tensor, "batch k"] | Float[Tensor, " entry"]:
    """What the selection compares: activations, times the norms if it gates by them."""
    values = latents.values.detach()
    return values if weights.norms is None else values * weights.norms.detach()[latents.indices]


def _losses(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    latents: Kept,
) -> Forward:
    with autocast(rows.u.device, False):
        y, error, loss = _decode(autoencoder, config, rows, moment, latents)
    loss = loss + common.auxk(autoencoder, config, rows, moment, y)
    if moment.losses:
        loss = loss + common.own_losses(autoencoder, rows, moment, y, _shown(latents))
    fires = latents.values > 0
    n_fired = counts(latents.indices, config.d_sae, fires)
    return Forward(loss, error, n_fired, fires.sum() / len(y), y.detach())


def _decode(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    latents: Kept,
) -> _Decoded:
    """The reconstruction, its error, and the loss: that error, or the mean over the prefixes."""
    if isinstance(config.matryoshka, NestedK):
        return _nested(autoencoder, config.matryoshka, rows, latents)
    if config.matryoshka is None:
        return _whole(autoencoder, rows, latents)
    share = common.prefix_share(config.matryoshka, moment.n_steps, moment.total_steps)
    if share == 0:
        return _whole(autoencoder, rows, latents)
    found = _prefixes(autoencoder, config, rows, moment, latents)
    if share == 1:
        return found
    whole = _whole(autoencoder, rows, latents)
    return whole._replace(loss=torch.lerp(whole.loss, found.loss, share))


def _whole(autoencoder: SparseAutoencoder, rows: Rows, latents: Kept) -> _Decoded:
    y = _reconstructed(autoencoder, latents, rows.u)
    error = losses.squared_error(rows.v, y)
    return _Decoded(y, error, error)


def _prefixes(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    latents: Kept,
) -> _Decoded:
    """The mean error of the prefixes, the whole dictionary being one of them."""
    assert config.matryoshka is not None
    ends = common.prefix_ends(config.matryoshka, config.d_sae, moment.n_steps)
    past = autoencoder.skipped(rows.u)  # 0 without a skip, which is part of every prefix
    found = sparse_decode_mse(
        latents.values,
        latents.indices,
        autoencoder.dec_rows,
        autoencoder.b_dec,
        rows.v - past,
        scale=1 / (len(rows.v) * len(ends)),
        prefixes=ends,
        row_ptr=latents.row_ptr,
    )
    return _Decoded(found.x_hat + past, found.row_loss[:, -1].mean(), found.loss)


def _nested(autoencoder: SparseAutoencoder, nested: NestedK, rows: Rows, latents: Kept) -> _Decoded:
    """The error with all k latents, and the weighted mean of those with fewer and with all."""
    weights, n = autoencoder.encoder(), len(nested.ks) + 1
    levels = [*(_narrowed(latents, k, weights) for k in nested.ks), latents]
    y = [_reconstructed(autoencoder, level, rows.u) for level in levels]
    errors = torch.stack([losses.squared_error(rows.v, one) for one in y])
    shares = torch.ones_like(errors)
    if nested.weights == "reverse":
        shares = torch.arange(n, 0, -1, dtype=errors.dtype, device=errors.device)
    return _Decoded(y[-1], errors[-1], (errors * shares).sum() / shares.sum())

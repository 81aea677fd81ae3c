"""Forward passes with sparse latents: TopK and BatchTopK, with AuxK, multi-TopK and Matryoshka."""

from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from sae import activations, losses
from sae.activations import EncoderWeights, Latents
from sae.architecture import Activation, BatchTopK, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import together
from sae.train.forward.result import Forward, Moment, Rows, autocast
from sae.train.loss_config import FixedPrefixes, Matryoshka
from sae.train.schedule import falling_k, random_prefixes
from sae_kernels import auxk, sparse_decode_mse, topk_select


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
        latents = _chosen(activation, u, weights, moment)
        found = _losses(autoencoder, config, rows, moment, latents)
        if activation.facts.threshold != "one":
            return found
        smallest = moment.ranks.smallest(_scores(latents, weights))  # of what was kept
        return found._replace(threshold=smallest)
    assert isinstance(activation, TopK), activation
    wide = TopK(k=min(multi.times * activation.k, config.d_sae))
    more = activations.encode(wide, u, weights)
    latents = narrowed(more, activation.k, weights)
    found = _losses(autoencoder, config, rows, moment, latents)
    with autocast(u.device, False):
        error = losses.squared_error(rows.v, autoencoder.decode_scaled(more, u))
    return found._replace(loss=found.loss + multi.coefficient * error)


def _chosen(
    activation: Activation, u: Float[Tensor, "batch d_in"], weights: EncoderWeights, moment: Moment
) -> Latents:
    """The latents of these rows; BatchTopK compares them with the rows of the other processes."""
    if isinstance(activation, BatchTopK) and not moment.ranks.alone:
        return together.batch_topk(u, weights, activation.k, moment.n_rows, moment.ranks)
    return activations.encode_training(activation, u, weights)


def k_now(config: DictionaryConfig, moment: Moment) -> Activation:
    """The activation, or one with the larger k of a moment before annealing is over."""
    anneal, activation = config.k_anneal, config.activation
    if anneal is None or not isinstance(activation, TopK | BatchTopK):
        return activation
    at = (moment.n_steps, moment.total_steps)
    return replace(activation, k=falling_k(*at, anneal.start, activation.k, anneal.until))


def narrowed(latents: Latents, k: int, weights: EncoderWeights) -> Latents:
    """The k largest of each row's latents; their order stays."""
    places = topk_select(_scores(latents, weights), k).indices
    return Latents(latents.values.gather(1, places), latents.indices.gather(1, places))


def _scores(latents: Latents, weights: EncoderWeights) -> Float[Tensor, "batch k"]:
    """What the selection compares: activations, times the norms if it gates by them."""
    values = latents.values.detach()
    return values if weights.norms is None else values * weights.norms.detach()[latents.indices]


def prefix_ends(matryoshka: Matryoshka, d_sae: int, n_steps: int) -> tuple[int, ...]:
    """Sizes of the prefixes at a step, the whole dictionary last."""
    if isinstance(matryoshka, FixedPrefixes):
        return (*matryoshka.ends, d_sae)
    of = matryoshka
    return random_prefixes(n_steps, of.seed, of.n, d_sae, of.exponent)


def _losses(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    latents: Latents,
) -> Forward:
    with autocast(rows.u.device, False):
        y, error, loss = _decode(autoencoder, config, rows, moment, latents)
    if config.auxk is not None and bool(moment.dead.any()):
        with autocast(rows.u.device, moment.bf16 or config.auxk.products == "bf16"):
            guess = _auxk(autoencoder, config, rows.u, moment.dead)
        loss = loss + config.auxk.coefficient * losses.squared_error((rows.v - y).detach(), guess)
    fires = latents.values > 0
    fired = latents.indices[fires].unique()
    return Forward(loss, error, fired, fires.sum(dim=1).float().mean())


def _decode(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    latents: Latents,
) -> _Decoded:
    """The reconstruction, its error, and the loss: that error, or the mean over the prefixes."""
    if config.matryoshka is None:
        y = autoencoder.decode_scaled(latents, rows.u)
        error = losses.squared_error(rows.v, y)
        return _Decoded(y, error, error)
    ends = prefix_ends(config.matryoshka, config.d_sae, moment.n_steps)
    past = autoencoder.skipped(rows.u)  # 0 without a skip, which is part of every prefix
    found = sparse_decode_mse(
        latents.values,
        latents.indices,
        autoencoder.dec_rows,
        autoencoder.b_dec,
        rows.v - past,
        scale=1 / (len(rows.v) * len(ends)),
        prefixes=ends,
    )
    return _Decoded(found.x_hat + past, found.row_loss[:, -1].mean(), found.loss)


def _auxk(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    u: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"],
) -> Float[Tensor, "batch d_out"]:
    settings, weights, dec_rows = config.auxk, autoencoder.encoder(), autoencoder.dec_rows
    assert settings is not None
    k = settings.k or max(u.shape[1] // 2, 1)
    b_in = None if weights.b_in is None else weights.b_in.detach()
    if weights.norms is not None:
        dec_rows = dec_rows / weights.norms[:, None]
    return auxk(u, weights.enc_rows, weights.b_enc, dec_rows, dead, k, b_in=b_in).to(u.dtype)

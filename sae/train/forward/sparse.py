"""Forward passes with sparse latents, with AuxK, multi-TopK and Matryoshka.

The pass of TopK and BatchTopK dictionaries on a GPU goes both ways at once, without autograd. It
reads copies of the weights in bfloat16, which the optimiser writes while it has the rows in hand.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from sae import losses
from sae.activations import EncoderWeights, Latents, from_csr, pad_silent
from sae.architecture import Activation, BatchTopK, GroupMax, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import common
from sae.train.forward.common import Forward, Moment, Rows, autocast
from sae.train.gradients import GradientSums
from sae.train.loss_config import NestedK
from sae.train.optim_config import falling_k, is_refined, slack_now
from sae_kernels import (
    Csr,
    encode_batch_topk,
    encode_group_max,
    encode_topk,
    fused,
    launch,
    sparse_decode,
    sparse_decode_mse,
    topk_select,
)
from sae_kernels.fused import StepWeights
from sae_kernels.launch import counts


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
        of_all = (moment.n_rows, moment.ranks, moment.looks)
        return Kept(*common.batch_topk(u, weights, activation.k, *of_all))
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


class _Copy(NamedTuple):
    numbers: BFloat16[Tensor, "d_sae width"]
    version: int
    """How often torch had changed the weights when it was right."""


class Shadows:
    """Copies of matrices in bfloat16.

    The optimiser's kernel, whose writing torch does not count, keeps them up to date; whatever else
    changes the weights is counted, and the copy is made anew.
    """

    def __init__(self) -> None:
        """Copy nothing yet."""
        self.copies: dict[Tensor, _Copy] = {}

    def of(self, rows: Float[Tensor, "d_sae width"]) -> BFloat16[Tensor, "d_sae width"]:
        """The copy of these weights."""
        copy = self.copies.get(rows)
        if copy is None or copy.version != rows._version or copy.numbers.device != rows.device:
            copy = self.copies[rows] = _Copy(rows.detach().bfloat16(), rows._version)
        return copy.numbers

    def to_write(self, rows: Float[Tensor, "d_sae width"]) -> BFloat16[Tensor, "..."] | None:
        """The copy that the optimiser has to write, if there is one."""
        copy = self.copies.get(rows)
        return None if copy is None else copy.numbers


def fits(autoencoder: SparseAutoencoder, config: DictionaryConfig, moment: Moment) -> bool:
    """Whether the device has the kernels, and the pass all terms of the loss."""
    form, ranks = autoencoder.config, moment.ranks
    if isinstance(form.activation, BatchTopK):
        is_known = ranks.alone
    else:
        is_known = isinstance(form.activation, TopK) and ranks.latents.size == 1
    is_plain = not (form.gate_by_decoder_norm or form.skip or moment.losses)
    has_terms = config.multi_topk is None and not isinstance(config.matryoshka, NestedK)
    on_gpu = launch.choose(autoencoder.enc_rows, None) == "triton"
    return on_gpu and is_known and is_plain and has_terms


def _shares_of(
    config: DictionaryConfig, moment: Moment
) -> tuple[tuple[int, ...] | None, tuple[float, ...]]:
    """Ends of the prefixes and their shares of the loss; the whole dictionary is the last one."""
    if config.matryoshka is None:
        return None, (1.0,)
    share = common.prefix_share(config.matryoshka, moment.n_steps, moment.total_steps)
    if share == 0:
        return None, (1.0,)
    ends = common.prefix_ends(config.matryoshka, config.d_sae, moment.n_steps)
    of_each = share / len(ends)
    return ends, (*[of_each] * (len(ends) - 1), of_each + 1 - share)


class Choices(NamedTuple):
    """What of the fused pass the number of the step decides; all else is decided on the device."""

    activation: TopK | BatchTopK
    ends: tuple[int, ...] | None
    """Ends of the prefixes."""
    shares: tuple[float, ...]
    """Their weights."""
    rounds: tuple[float, ...]
    """Rates of the rounds of refining."""


def choices(config: DictionaryConfig, moment: Moment) -> Choices:
    """Decide them."""
    activation, refine = k_now(config, moment), config.refine
    assert isinstance(activation, TopK | BatchTopK), activation
    rounds = ()
    if refine is not None and not is_refined(refine, moment.n_steps, moment.total_steps):
        rounds = (refine.rate,) * refine.steps
    return Choices(activation, *_shares_of(config, moment), rounds)


def backward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    weight: float,
    shadows: Shadows,
    sums: GradientSums | None = None,
) -> Forward:
    """Add the gradients of `weight` times the loss to the parameters; return the figures.

    The decoder's is whole before the encoder's is made, unless AuxK adds to both afterwards.
    """
    (activation, ends, shares, rounds), encoder = choices(config, moment), autoencoder.encoder()
    matrices = [autoencoder.enc_rows, autoencoder.dec_rows]
    enc_rows, dec_rows = (shadows.of(m) if moment.bf16 else m.detach() for m in matrices)
    b_in = None if encoder.b_in is None else encoder.b_in.detach()

    def on_decoder(grad: Tensor) -> None:
        _give(autoencoder.dec_rows, grad)
        if sums is not None and config.auxk is None and config.preact is None:
            sums.whole("dec_rows")

    found = fused.fused_topk_step(
        rows.u,
        rows.v,
        StepWeights(enc_rows, encoder.b_enc.detach(), b_in, dec_rows, autoencoder.b_dec.detach()),
        activation.k,
        scale=weight / len(rows.v),
        of_batch=isinstance(activation, BatchTopK),
        prefixes=ends,
        shares=shares,
        rounds=rounds,
        on_decoder=on_decoder,
    )
    _give(autoencoder.enc_rows, found.enc_rows)
    _give(autoencoder.b_enc, found.b_enc)
    _give(autoencoder.b_dec, found.b_dec)
    if encoder.b_in is not None:  # it may be b_dec
        _give(encoder.b_in, found.b_in)
    errors = found.row_loss.mean(dim=0)
    loss = errors @ launch.on_device(shares, errors.device).to(errors.dtype)
    aux = common.auxk(autoencoder, config, rows, moment, found.x_hat)
    squares = found.squares
    if isinstance(aux, Tensor):
        (aux * weight).backward()
        loss, squares = loss + aux.detach(), None  # of gradients that are others now
    threshold = None
    if activation.facts.threshold == "one":
        threshold = moment.ranks.smallest(found.values)
    l0 = (found.values > 0).sum() / len(rows.v)
    figures = (loss, errors[-1], found.n_fired, l0, found.x_hat, threshold)
    return Forward(*figures, squares=squares)


def _give(parameter: Tensor, grad: Tensor) -> None:
    """Add a gradient to the one that the parameter has."""
    if parameter.requires_grad:
        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

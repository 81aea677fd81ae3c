"""The pass of TopK and BatchTopK dictionaries on a GPU: both ways at once, without autograd.

It reads copies of the weights in bfloat16, which the optimiser writes while it has the rows in its
hands. Losses that it does not know go by way of `run.forward`.
"""

from typing import NamedTuple

from jaxtyping import BFloat16, Float
from torch import Tensor

from sae.architecture import BatchTopK, TopK
from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import common
from sae.train.forward.common import Forward, Moment, Rows
from sae.train.forward.sparse import k_now
from sae.train.loss_config import NestedK
from sae.train.schedule import is_refined
from sae_kernels import fused, launch
from sae_kernels.fused import FusedStep, StepWeights


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


def _prefixes(
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


def backward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    weight: float,
    shadows: Shadows,
) -> Forward:
    """Add the gradients of `weight` times the loss to the parameters; return the figures."""
    activation, encoder = k_now(config, moment), autoencoder.encoder()
    assert isinstance(activation, TopK | BatchTopK), activation
    ends, shares = _prefixes(config, moment)
    refine, at, rounds = config.refine, (moment.n_steps, moment.total_steps), ()
    if refine is not None and not is_refined(refine, *at):
        rounds = (refine.rate,) * refine.steps
    matrices = [autoencoder.enc_rows, autoencoder.dec_rows]
    enc_rows, dec_rows = (shadows.of(m) if moment.bf16 else m.detach() for m in matrices)
    b_in = None if encoder.b_in is None else encoder.b_in.detach()
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
    )
    _give(autoencoder, found, encoder.b_in)
    errors = found.row_loss.mean(dim=0)
    loss = errors @ launch.on_device(shares, errors.device).to(errors.dtype)
    aux = common.auxk(autoencoder, config, rows, moment, found.x_hat)
    if isinstance(aux, Tensor):
        (aux * weight).backward()
        loss = loss + aux.detach()
    threshold = None
    if activation.facts.threshold == "one":
        threshold = moment.ranks.smallest(found.values)
    l0 = (found.values > 0).sum() / len(rows.v)
    return Forward(loss, errors[-1], found.n_fired, l0, found.x_hat, threshold)


def _give(
    autoencoder: SparseAutoencoder, found: FusedStep, b_in: Float[Tensor, " d_in"] | None
) -> None:
    """Add the gradients to those that the parameters have; b_in may be b_dec."""
    pairs: list[tuple[Tensor, Tensor]] = [
        (autoencoder.enc_rows, found.enc_rows),
        (autoencoder.b_enc, found.b_enc),
        (autoencoder.dec_rows, found.dec_rows),
        (autoencoder.b_dec, found.b_dec),
    ]
    if b_in is not None:
        pairs.append((b_in, found.b_in))
    for parameter, grad in pairs:
        if parameter.requires_grad:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

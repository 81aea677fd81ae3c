"""The forward pass that fits the activation.

The forward and the backward pass of a batch, whole or in parts that fit into memory.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import assert_never

from jaxtyping import Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward import dense, sharded, sparse
from sae.train.forward.common import Forward, Moment, Rows, autocast, controlled
from sae.train.gradients import GradientSums
from sae_kernels import launch


def forward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
) -> Forward:
    """Losses of rows in the dictionary's units."""
    found = _forward(autoencoder, config, rows, moment)
    return found if config.control is None else controlled(config.control, found, rows, moment)


def _forward(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, rows: Rows, moment: Moment
) -> Forward:
    trains = autoencoder.config.activation.facts.trains
    with autocast(rows.u.device, moment.bf16):
        if moment.ranks.latents.size > 1:
            return sharded.forward(autoencoder, config, rows, moment)
        match trains:
            case "sparse":
                return sparse.forward(autoencoder, config, rows, moment)
            case "dense":
                return dense.forward(autoencoder, config, rows, moment)
            case "gated":
                return dense.gated_forward(autoencoder, config, rows, moment)
            case _:
                assert_never(trains)


def choices(
    autoencoder: SparseAutoencoder, config: DictionaryConfig, moment: Moment
) -> sparse.Choices | dense.DenseChoices | None:
    """What the number of the step decides, where nothing else is the host's; None elsewhere."""
    if launch.choose(autoencoder.enc_rows, None) != "triton":
        return None
    if config.activation.facts.trains != "sparse":
        return dense.choices(config, moment)
    return sparse.choices(config, moment) if sparse.fits(autoencoder, config, moment) else None


def backward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    loss_of: Callable[[Forward], Float[Tensor, ""]] | None = None,
    shadows: sparse.Shadows | None = None,
    sums: GradientSums | None = None,
) -> Forward:
    """Add the gradients of these rows' part of the loss to the parameters; return their figures.

    All terms that may be accumulated are means over rows, so the parts weigh as their rows do.
    `loss_of` makes another loss of what the forward pass found, where all rows are one part. With
    `shadows` the pass may be the fused one. The `sums` of the gradients over processes begin in the
    last part's pass.
    """
    last_pass = nullcontext if sums is None else sums.last_pass
    if loss_of is not None:
        found = forward(autoencoder, config, rows, moment)
        loss = loss_of(found)
        with last_pass():
            (loss * moment.share).backward()
        return found._replace(loss=loss.detach(), error=found.error.detach(), l0=found.l0.detach())
    u_parts, v_parts = (r.tensor_split(config.accumulate) for r in rows)
    parts = list(map(Rows, u_parts, v_parts))
    shares = [len(part.u) / len(rows.u) for part in parts]
    first = None
    for n, (part, share) in enumerate(zip(parts, shares, strict=True), 1):
        with last_pass() if n == len(parts) else nullcontext():
            other = _part(autoencoder, config, part, moment, share, shadows, sums)
        first = other if first is None else _added(first, other)
    assert first is not None
    return first


def _added(first: Forward, other: Forward) -> Forward:
    return first._replace(
        loss=first.loss + other.loss,
        error=first.error + other.error,
        n_fired=first.n_fired + other.n_fired,
        l0=first.l0 + other.l0,
        squares=None,
    )


def _part(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    share: float,
    shadows: sparse.Shadows | None,
    sums: GradientSums | None,
) -> Forward:
    """One part; loss, error and L0 are its share of the whole batch's."""
    weight = share * moment.share
    if shadows is not None and sparse.fits(autoencoder, config, moment):
        found = sparse.backward(autoencoder, config, rows, moment, weight, shadows, sums)
    else:
        found = forward(autoencoder, config, rows, moment)
        (found.loss * weight).backward()
    loss, error, l0 = (f.detach() * share for f in (found.loss, found.error, found.l0))
    return found._replace(loss=loss, error=error, l0=l0)

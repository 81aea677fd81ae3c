"""The forward and the backward pass of a batch, whole or in parts that fit into memory."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward.result import Forward, Moment, Rows
from sae.train.forward.run import forward


def backward(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    loss_of: Callable[[Forward], Float[Tensor, ""]] | None = None,
) -> Forward:
    """Add the gradients of these rows' part of the loss to the parameters; return their figures.

    All terms that may be accumulated are means over rows, so the parts weigh as their rows do.
    `loss_of` makes another loss of what the forward pass found, where all rows are one part.
    """
    if loss_of is not None:
        found = forward(autoencoder, config, rows, moment)
        loss = loss_of(found)
        (loss * moment.share).backward()
        return found._replace(loss=loss.detach(), error=found.error.detach(), l0=found.l0.detach())
    u_parts, v_parts = (r.tensor_split(config.accumulate) for r in rows)
    parts = list(map(Rows, u_parts, v_parts))
    shares = [len(part.u) / len(rows.u) for part in parts]
    first = _part(autoencoder, config, parts[0], moment, shares[0])
    for part, share in zip(parts[1:], shares[1:], strict=True):
        other = _part(autoencoder, config, part, moment, share)
        first = first._replace(
            loss=first.loss + other.loss,
            error=first.error + other.error,
            n_fired=first.n_fired + other.n_fired,
            l0=first.l0 + other.l0,
        )
    return first


def _part(
    autoencoder: SparseAutoencoder,
    config: DictionaryConfig,
    rows: Rows,
    moment: Moment,
    share: float,
) -> Forward:
    """One part; loss, error and L0 are its share of the whole batch's."""
    found = forward(autoencoder, config, rows, moment)
    (found.loss * (share * moment.share)).backward()
    loss, error, l0 = (f.detach() * share for f in (found.loss, found.error, found.l0))
    return found._replace(loss=loss, error=error, l0=l0)

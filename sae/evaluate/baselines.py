"""What a dictionary must beat: baselines that are dictionaries themselves, so all measures fit.

Trained baselines (a frozen random decoder or encoder) are entries of a training config; those here
need no training.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from activations_cache.progress import Progress, silent
from activations_cache.reader import ActivationCache
from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise

ROWS_AT_ONCE = 4096


def random_dictionary(
    like: SparseAutoencoder, l0: float, generator: torch.Generator
) -> SparseAutoencoder:
    """Random directions, the encoder their transpose; the round(l0) largest of each row fire.

    Args:
        like: Gives the sizes, the units and b_dec.
        l0: Of what it is held against.
        generator: Draws the directions.
    """
    k = min(max(1, round(l0)), like.config.d_sae)
    config = replace(
        like.config, activation=TopK(k=k), b_in="b_dec", gate_by_decoder_norm=False, skip=False
    )
    random = SparseAutoencoder(config)
    initialise(random, generator)
    random.b_dec.data.copy_(like.b_dec)
    return random.requires_grad_(False)


def permuted_decoder(like: SparseAutoencoder, generator: torch.Generator) -> SparseAutoencoder:
    """The same encoder with the decoder's rows exchanged.

    A control of measures: those of the encoder must stay, those of the decoder must break down.
    """
    permuted = SparseAutoencoder(like.config)
    permuted.load_state_dict(like.state_dict())
    order = torch.randperm(like.config.d_sae, generator=generator)
    permuted.dec_rows.data.copy_(like.dec_rows.detach()[order])
    return permuted.requires_grad_(False)


def raw_neurons(mean: Float[Tensor, " d_model"], k: int) -> SparseAutoencoder:
    """The stream's own dimensions: the k that are farthest from their means, as they are.

    Raises:
        ValueError: If k is not in 1..d_model.
    """
    _check_k(k, len(mean))
    return _both_ways(torch.eye(len(mean)), mean, TopK(k=k))


def principal_components(
    mean: Float[Tensor, " d_model"], covariance: Float64[Tensor, "d_model d_model"], k: int
) -> SparseAutoencoder:
    """The first k principal components, all in use: its FVU is the share of the eigenvalues' tail.

    Raises:
        ValueError: If k is not in 1..d_model.
    """
    _check_k(k, len(mean))
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :k].T
    return _both_ways(axes.float(), mean, ReLU())


def covariance_of(
    cache: ActivationCache,
    hook_point: str,
    rows: Int[Tensor, " row"],
    *,
    progress: Progress | None = None,
) -> Float64[Tensor, "d_model d_model"]:
    """Mean outer product of centred rows, streamed.

    Args:
        cache: Where the rows are.
        hook_point: Which stream.
        rows: Row numbers.
        progress: Called with the unit "rows of the covariance".

    Raises:
        ValueError: If there is no row.
    """
    if len(rows) == 0:
        raise ValueError("rows must be at least 1, got none; take another split")
    source, tell = cache[hook_point], progress or silent
    mean = source.mean.double()
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    shift = torch.zeros(len(mean), dtype=torch.float64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        x = source[rows[start : start + ROWS_AT_ONCE]].double() - mean
        total += x.T @ x
        shift += x.sum(dim=0)
        tell(min(start + ROWS_AT_ONCE, len(rows)), len(rows), "rows of the covariance")
    shift /= len(rows)
    return total / len(rows) - shift[:, None] * shift


def _both_ways(
    axes: Float[Tensor, "k d_model"], mean: Float[Tensor, " d_model"], activation: ReLU | TopK
) -> SparseAutoencoder:
    """A pair of latents for each axis, one for either sign."""
    n, d_model = axes.shape
    dictionary = SparseAutoencoder(SAEConfig(d_in=d_model, d_sae=2 * n, activation=activation))
    rows = torch.cat([axes, -axes])
    dictionary.enc_rows.data.copy_(rows)
    dictionary.dec_rows.data.copy_(rows)
    dictionary.b_dec.data.copy_(mean)
    return dictionary.requires_grad_(False)


def _check_k(k: int, d_model: int) -> None:
    if not 1 <= k <= d_model:
        raise ValueError(f"k must be in 1..{d_model}, the width of the rows, got {k}")

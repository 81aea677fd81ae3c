"""What a dictionary must beat: baselines that are dictionaries themselves, so all measures fit.

Trained baselines (a frozen random decoder or encoder) are entries of a training config; those here
need no training.

Latents that nobody trained, for comparison: random directions and raw neurons of the stream.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress, silent
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
        raise MonosemaError("rows must be at least 1, got none; take another split")
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
        raise MonosemaError(f"k must be in 1..{d_model}, the width of the rows, got {k}")


@torch.no_grad()
def baseline_dictionary(
    rows: Float[Tensor, "row d_in"], n: int, density: float | Sequence[float], seed: int
) -> SparseAutoencoder:
    """A dictionary of n random directions followed by n neurons, each as dense as asked.

    Latent i fires by what its direction exceeds the (1 - density) quantile of the rows by, so it
    competes with trained latents of that density on equal terms. A neuron is a coordinate of the
    stream with a random sign.

    Args:
        rows: A sample, in the model's units, from which mean and quantiles are taken.
        n: Latents of each kind; neurons repeat where there are fewer coordinates.
        density: Share of the rows on which each is to fire; or one for each of the n.
        seed: Of directions, coordinates and signs.

    Raises:
        ValueError: If a density does not lie between 0 and 1.
    """
    densities = list(density) if isinstance(density, Sequence) else [density] * n
    wrong = [each for each in densities if not 0 < each < 1]
    if wrong:
        raise MonosemaError(f"density must lie between 0 and 1, got {wrong[0]}")
    d_in = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * n, d_in, generator=generator)
    neurons = torch.randperm(d_in, generator=generator).repeat(-(-n // d_in))[:n]
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0
    directions[n:] = torch.nn.functional.one_hot(neurons, d_in) * signs[:, None]
    directions /= directions.norm(dim=1, keepdim=True)
    dictionary = SparseAutoencoder(
        SAEConfig(d_in=d_in, d_sae=2 * n, activation=ReLU(), b_in="none")
    )
    dictionary.enc_rows.copy_(directions)
    dictionary.dec_rows.copy_(directions)
    for latent, direction in enumerate(directions):
        bar = (rows @ direction).quantile(1 - densities[latent % n])
        dictionary.b_enc[latent] = -bar
    return dictionary

"""Latents that nobody trained, for comparison: random directions and raw neurons of the stream."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder


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
        raise ValueError(f"density must lie between 0 and 1, got {wrong[0]}")
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

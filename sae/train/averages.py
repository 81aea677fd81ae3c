"""A running mean of the weights, which is what is saved where it is asked for."""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.train.rows import normalise_rows_


class EMA:
    """mean += (1 - decay) * (weights - mean) after each step.

    The decay of step n is at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Begin at these weights, which are named as in the autoencoder."""
        self.parameters, self.decay = parameters, decay
        self.means = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, n_steps: int) -> None:
        """Take the weights in after step number `n_steps`, from 0 on."""
        rate = 1 - min(self.decay, (1 + n_steps) / (10 + n_steps))
        for name, parameter in self.parameters.items():
            self.means[name].lerp_(parameter, rate)

    @torch.no_grad()
    def restart(self, name: str, latents: Int[Tensor, " latent"]) -> None:
        """Take the newest weights of some latents for their mean."""
        if name in self.means:
            self.means[name][latents] = self.parameters[name][latents]


@torch.no_grad()
def with_means(
    autoencoder: SparseAutoencoder, means: Mapping[str, Float[Tensor, "..."]], unit_norm: bool
) -> SparseAutoencoder:
    """A copy that has these weights, with what holds for weights: unit rows, thresholds from 0."""
    made = copy.deepcopy(autoencoder)
    for name, mean in means.items():
        made.get_parameter(name).copy_(mean)
    if unit_norm and "dec_rows" in means:
        normalise_rows_(made.dec_rows)
    if "threshold" in means:
        made.get_parameter("threshold").clamp_(min=0)
    return made

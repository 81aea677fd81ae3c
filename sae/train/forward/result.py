"""What goes into a forward pass of training beside the rows, and what comes out."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.train.ranks import ALONE, Ranks


class Power(NamedTuple):
    """Where p-annealing stands."""

    p: float = 1.0
    """The power of the penalty."""
    scale: float = 1.0
    """What its weight is multiplied by."""


class Rows(NamedTuple):
    """The rows of a step, in the dictionary's units."""

    u: Float[Tensor, "batch d_in"]
    """What is read."""
    v: Float[Tensor, "batch d_out"]
    """What is predicted; u itself for an autoencoder proper."""


class Forward(NamedTuple):
    """What a forward pass gives."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    error: Float[Tensor, ""]
    """The squared error of the whole dictionary, summed over d."""
    n_fired: Int[Tensor, " d_sae"]
    """In how many rows each latent fired."""
    l0: Float[Tensor, ""]
    """Mean number of latents that fired in a row."""
    y: Float[Tensor, "batch d_out"]
    """The whole dictionary's reconstruction, detached; of a batch in parts the first one's."""
    threshold: Float[Tensor, ""] | None = None
    """For BatchTopK: the smallest activation that was kept."""
    power: Power | None = None
    """For p-annealing: where it stands now."""


class Moment(NamedTuple):
    """Where training stands, as far as the losses depend on it."""

    n_steps: int
    total_steps: int
    dead: Bool[Tensor, " d_sae"]
    """Latents that are dead."""
    bf16: bool
    """Whether the encoder's and the dense products are in bfloat16."""
    power: Power = Power()
    """Where p-annealing stood after the step before."""
    ranks: Ranks = ALONE
    """The processes that train together."""
    n_rows: int = 0
    """Rows of the batch, on all processes."""
    share: float = 1.0
    """This process's part of them."""


def autocast(device: torch.device, is_on: bool) -> torch.autocast:
    """A context in which products are in bfloat16, if it is on."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_on)

"""What optimisers do with rows: turning without growing, and forgetting."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def normalise_rows_(rows: Float[Tensor, "d_sae d_out"]) -> None:
    """Bring each row to norm 1, in place; a row of zeros stays."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))


def across(
    grad: Float[Tensor, "d_sae d_out"], rows: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "d_sae d_out"]:
    """The gradient less its part along the unit rows, which would only change their norm."""
    return grad - rows * (grad * rows).sum(dim=1, keepdim=True)


def forget(
    self: torch.optim.Optimizer, parameter: torch.nn.Parameter, latents: Int[Tensor, " latent"]
) -> None:
    """Bring all states of some latents' weights to 0."""
    for value in self.state.get(parameter, {}).values():
        if value.dim():
            value[latents] = 0

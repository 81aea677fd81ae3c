"""Adam for latent-major weights, with the decoder's rows kept at norm 1."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import Adam

from sae.train import config


class LatentAdam(Adam):
    """Fused Adam; rows of `unit_rows` stay at norm 1 and only turn.

    The part of a row's gradient along the row is taken out before the step (it would only
    change the norm), and the row is brought back to norm 1 after it (Bricken et al. 2023).
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        settings: config.Adam,
        unit_rows: torch.nn.Parameter | None = None,
    ) -> None:
        """Take Adam's settings; `unit_rows` is one of the params, (d_sae, d_out), or None."""
        betas = (settings.beta1, settings.beta2)
        super().__init__(params, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
        self.unit_rows = unit_rows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step, with the norm of the unit rows unchanged."""
        if self.unit_rows is None:
            super().step(closure)
            return
        if self.unit_rows.grad is not None:
            remove_parallel_(self.unit_rows.grad, self.unit_rows)
        super().step(closure)
        normalise_rows_(self.unit_rows)


def remove_parallel_(
    grad: Float[Tensor, "d_sae d_out"], rows: Float[Tensor, "d_sae d_out"]
) -> None:
    """Take the component along each unit row out of its gradient, in place."""
    along = torch.linalg.vecdot(grad, rows).unsqueeze(1)
    grad.addcmul_(rows, along, value=-1)


def normalise_rows_(rows: Float[Tensor, "d_sae d_out"]) -> None:
    """Bring each row to norm 1, in place; a row of zeros stays."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))

"""Adam for latent-major weights, with the decoder's rows kept at norm 1."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import Adam

from sae.train import config
from sae_kernels import latent_adam_


class LatentAdam(Adam):
    """Fused Adam; rows of `unit_rows` stay at norm 1 and only turn.

    The part of a row's gradient along the row is taken out before the step (it would only
    change the norm), and the row is brought back to norm 1 after it (Bricken et al. 2023).
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter] | list[dict[str, Any]],
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
        unit = self.unit_rows
        if unit is None or unit.grad is None:
            super().step(closure)
            return
        grad, unit.grad = unit.grad, None  # Adam passes over what has no gradient
        super().step(closure)
        unit.grad = grad
        state, group = self.state[unit], self.param_groups[0]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(unit)
            state["exp_avg_sq"] = torch.zeros_like(unit)
        state["step"] += 1
        latent_adam_(
            unit.data,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            project=True,
            norm="unit",
        )


def normalise_rows_(rows: Float[Tensor, "d_sae d_out"]) -> None:
    """Bring each row to norm 1, in place; a row of zeros stays."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))

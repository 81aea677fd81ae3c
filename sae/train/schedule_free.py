"""Schedule-free Adam (Defazio et al. 2024, arXiv 2405.15682)."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from sae.train import optim_config
from sae.train.rows import across, normalise_rows_


class ScheduleFreeAdam(Optimizer):
    """z: the newest weights; x: their mean; the parameters are y = beta1 x + (1 - beta1) z.

    z -= lr g / (sqrt(v) + eps), g taken at y;  x += c (z - x), c the step's share of the sum of
    lr^2. Unit rows are brought to norm 1 in all three.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        settings: optim_config.ScheduleFree,
        unit_rows: torch.nn.Parameter | None = None,
    ) -> None:
        """Take the settings; `unit_rows` is one of the params, (d_sae, d_out), or None."""
        super().__init__(params, {"lr": settings.first_lr})
        self.settings = settings
        self.unit_rows = unit_rows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: ARG002
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, y: torch.nn.Parameter, grad: Tensor, lr: float) -> None:
        of, is_unit = self.settings, y is self.unit_rows
        state = self.state[y]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["weight"] = torch.tensor(0.0, dtype=torch.float64)
            state["z"], state["x"] = y.detach().clone(), y.detach().clone()
            state["exp_avg_sq"] = torch.zeros_like(y)
        z, x, square = state["z"], state["x"], state["exp_avg_sq"]
        state["step"] += 1
        state["weight"] += lr**2
        grad = across(grad, y) if is_unit else grad
        square.mul_(of.beta2).addcmul_(grad, grad, value=1 - of.beta2)
        root = (square / (1 - of.beta2 ** float(state["step"]))).sqrt_().add_(of.eps)
        z.addcdiv_(grad, root, value=-lr)
        if is_unit:
            normalise_rows_(z)
        x.lerp_(z, lr**2 / float(state["weight"]))
        y.copy_(x.lerp(z, 1 - of.beta1))
        if is_unit:
            normalise_rows_(x)
            normalise_rows_(y)

    def restart(self, parameter: torch.nn.Parameter, latents: Int[Tensor, " latent"]) -> None:
        """Take the parameter's values for what was known of some latents' weights."""
        state = self.state.get(parameter, {})
        if state:
            state["z"][latents] = state["x"][latents] = parameter.detach()[latents]
            state["exp_avg_sq"][latents] = 0

    def means(self) -> dict[Tensor, Tensor]:
        """The averaged weights by parameter: what is worth saving."""
        return {parameter: state["x"] for parameter, state in self.state.items()}

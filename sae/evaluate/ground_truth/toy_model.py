"""The toy model of superposition (Elhage et al. 2022): directions that training itself chose."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.evaluate.ground_truth.config import ToyModel

BATCH, LR = 256, 1e-2


def learned_directions(
    config: ToyModel,
    chance: Float[Tensor, " feature"],
    d_model: int,
    generator: torch.Generator,
) -> Float[Tensor, "feature d_model"]:
    """Rows of W of the best of the restarts; their norms say how well features are represented.

    h = x W, x' = relu(h W^T + b), loss = sum_i importance^i (x_i - x'_i)^2, x uniform in 0..1 where
    it fires.
    """
    n_features, device = len(chance), chance.device
    shape = (config.restarts, n_features, d_model)
    # Short at first, so that a feature that is never learned does not count as represented.
    weights = 0.1 * torch.randn(shape, generator=generator, device=device) / d_model**0.5
    bias = torch.zeros(config.restarts, 1, n_features, device=device)
    params = [weights.requires_grad_(), bias.requires_grad_()]
    adam = torch.optim.Adam(params, lr=LR)
    importance = config.importance ** torch.arange(n_features, device=device)
    losses = torch.zeros(config.restarts, device=device)
    for step in range(config.steps):
        adam.param_groups[0]["lr"] = LR * min(1.0, 2 * (1 - step / config.steps))
        x = _rows(chance, generator)
        with torch.enable_grad():
            x_hat = torch.relu(x @ weights @ weights.mT + bias)
            error = (importance * (x - x_hat).square()).sum(dim=2).mean(dim=1)
            weights.grad, bias.grad = torch.autograd.grad(error.sum(), params)
        adam.step()
        losses = 0.99 * losses + 0.01 * error.detach()
    return weights.detach()[losses.argmin()]


def _rows(
    chance: Float[Tensor, " feature"], generator: torch.Generator
) -> Float[Tensor, "batch feature"]:
    drawn = torch.rand(2, BATCH, len(chance), generator=generator, device=chance.device)
    return drawn[0] * (drawn[1] < chance)

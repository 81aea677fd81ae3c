"""What is measured of a dictionary beside the figures of each step; training never reads it."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.train.forward.common import Forward, Rows, Taken
from sae.train.ranks import Ranks, of_latents

DENSITIES = {"q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
THRESHOLDS = {"q10": 0.1, "q50": 0.5, "q90": 0.9}


class Watch:
    """Counts what fires, and looks closer at the steps that are logged.

    Counting costs one addition of d_sae integers a step; all else is done where `is_due` is set.
    Every figure is that of all processes together, so all of them have to call `read`.
    """

    def __init__(self, autoencoder: SparseAutoencoder, ranks: Ranks) -> None:
        """Take what is watched: this process's part of a dictionary."""
        self.autoencoder, self.ranks = autoencoder, ranks
        self.threshold = autoencoder.config.activation.facts.threshold
        d_sae, device = len(autoencoder.enc_rows), autoencoder.enc_rows.device
        self.n_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.moved = torch.zeros(d_sae, dtype=torch.bool, device=device)
        self.n_rows = torch.zeros((), dtype=torch.int64, device=device)
        self.is_due = False
        self.figures: dict[str, float] = {}

    @torch.no_grad()
    def see(self, found: Forward, rows: Rows, n_rows: int, taken: Taken = None) -> None:
        """Take a step in, between its backward pass and the clipping of its gradients."""
        self.n_fired += found.n_fired if taken is None else taken * found.n_fired
        self.n_rows += n_rows if taken is None else taken * n_rows
        if self.threshold == "per latent":
            grad = self.autoencoder.get_parameter("threshold").grad
            moved = self.moved if grad is None else grad != 0
            self.moved |= moved if taken is None else moved & taken
        if self.is_due and (taken is None or bool(taken)):
            self.figures = {"shrinkage": self._shrinkage(found.y, rows), **self._grad_norms()}

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """The figures since the last reading, and those of the last step; then begin anew."""
        n_fired = self.n_fired.clone()
        self.ranks.rows.sum_(n_fired)
        density = self._whole(n_fired).double() / self.n_rows.clamp(min=1)
        found = {"shrinkage": math.nan, **self.figures, **_quantiles("density", density, DENSITIES)}
        if self.threshold == "one":
            found["threshold"] = float(self.autoencoder.get_buffer("threshold"))
        elif self.threshold == "per latent":
            thresholds = self._whole(self.autoencoder.get_parameter("threshold"))
            found |= _quantiles("threshold", thresholds, THRESHOLDS)
            found["threshold_stuck"] = 1 - float(self._whole(self.moved).float().mean())
        self.n_fired.zero_()
        self.moved.zero_()
        self.n_rows.zero_()
        self.is_due, self.figures = False, {}
        return found

    def _shrinkage(self, y: Float[Tensor, "batch d_out"], rows: Rows) -> float:
        """E |s|^2 / E <s, t>, s being what the latents add and t what is left for them to add.

        1 without shrinkage, below it where s is too short. Of a batch in parts it is the first's.
        """
        u, v = (part[: len(y)] for part in rows)
        base = self.autoencoder.b_dec + self.autoencoder.skipped(u)
        added, left = y - base, v - base
        sums = torch.stack([added.square().sum(), (added * left).sum()]).double()
        self.ranks.rows.sum_(sums)
        return float(sums[0] / sums[1])

    def _grad_norms(self) -> dict[str, float]:
        """The norm of each parameter's gradient, which is summed over the processes already."""
        norms = {}
        for name, parameter in self.autoencoder.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.double().square().sum()
                if of_latents(name, parameter):
                    self.ranks.latents.sum_(square)
                norms[f"grad_norm_{name}"] = float(square.sqrt())
        return norms

    def _whole(
        self, own: Float[Tensor, " part"] | Bool[Tensor, " part"] | Tensor
    ) -> Float[Tensor, " d_sae"] | Bool[Tensor, " d_sae"] | Tensor:
        """What all processes' latents have."""
        return self.ranks.latents.gather(own.detach()).flatten()


def _quantiles(name: str, values: Tensor, places: dict[str, float]) -> dict[str, float]:
    """The values at these shares of all that are sorted, each one that is there."""
    ranked = values.double().sort().values
    at = {key: round(share * (len(ranked) - 1)) for key, share in places.items()}
    found = ranked[[*at.values()]].tolist()
    return {f"{name}_{key}": value for key, value in zip(at, found, strict=True)}

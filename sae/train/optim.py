"""The optimisers; Adam for latent-major weights, with the decoder's rows kept at norm 1."""

from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import Adam

from sae.train import optim_config
from sae.train.muon import LatentMuon
from sae.train.rows import forget
from sae.train.schedule_free import ScheduleFreeAdam
from sae_kernels import adam_states, latent_adam_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}


def optimizer_of(
    params: list[dict[str, Any]],
    settings: optim_config.Optimizer,
    unit_rows: torch.nn.Parameter | None,
) -> "LatentAdam | LatentMuon | ScheduleFreeAdam":
    """The optimiser of these groups of parameters; `unit_rows` is one of them, or None."""
    match settings:
        case optim_config.Adam():
            return LatentAdam(params, settings, unit_rows)
        case optim_config.Muon():
            return LatentMuon(params, settings, unit_rows)
        case optim_config.ScheduleFree():
            return ScheduleFreeAdam(params, settings, unit_rows)
        case _:
            assert_never(settings)


class LatentAdam(Adam):
    """Fused Adam; rows of `unit_rows` stay at norm 1 and only turn.

    The part of a row's gradient along the row is taken out before the step (it would only
    change the norm), and the row is brought back to norm 1 after it (Bricken et al. 2023).
    States in fewer bits are those of matrices; vectors keep float32.
    """

    restart = forget

    def __init__(
        self,
        params: list[torch.nn.Parameter] | list[dict[str, Any]],
        settings: optim_config.Adam,
        unit_rows: torch.nn.Parameter | None = None,
    ) -> None:
        """Take Adam's settings; `unit_rows` is one of the params, (d_sae, d_out), or None."""
        betas = (settings.beta1, settings.beta2)
        lr = settings.first_lr
        super().__init__(params, lr=lr, betas=betas, eps=settings.eps, fused=True)
        self.unit_rows = unit_rows
        self.dtype = DTYPES[settings.states]
        small = self.dtype != torch.float32
        self.matrices: list[tuple[torch.nn.Parameter, dict[str, Any]]] = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p is unit_rows or (p.dim() == 2 and small)
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step, with the norm of the unit rows unchanged."""
        grads = [p.grad for p, _ in self.matrices]
        for parameter, _ in self.matrices:
            parameter.grad = None  # Adam passes over what has no gradient
        super().step(closure)
        for seed, (parameter, group) in enumerate(self.matrices):
            parameter.grad = grads[seed]
            if parameter.grad is not None:
                self._move(parameter, parameter.grad, group, seed)

    def _move(
        self,
        rows: torch.nn.Parameter,
        grad: Float[Tensor, "d_sae d_out"],
        group: dict[str, Any],
        seed: int,
    ) -> None:
        state, is_unit = self.state[rows], rows is self.unit_rows
        if not state:
            state.update(self._start(rows))
        state["step"] += 1
        packed = self.dtype == torch.uint8
        latent_adam_(
            rows.data,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            project=is_unit,
            norm="unit" if is_unit else "none",
            scales=(state["exp_avg_scale"], state["exp_avg_sq_scale"]) if packed else None,
            seed=seed,
        )

    def _start(self, rows: torch.nn.Parameter) -> dict[str, Tensor]:
        """States of 0; a code of 8 bits with a scale of 0 is 0."""
        names = ("exp_avg", "exp_avg_sq")
        dtype = self.dtype if self.dtype != torch.float32 else rows.dtype
        start = {name: torch.zeros_like(rows.data, dtype=dtype) for name in names}
        start["step"] = torch.tensor(0.0)
        if dtype == torch.uint8:
            shape = (len(rows), adam_states.n_blocks(rows.shape[1]))
            start |= {f"{name}_scale": rows.data.new_zeros(shape) for name in names}
        return start

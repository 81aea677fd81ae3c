"""Muon for the matrices of a dictionary, Adam for its vectors."""

from typing import Any

import torch
from torch.optim import Muon
from torch.optim.adam import Adam

from sae.train import optim_config
from sae.train.rows import across, forget, normalise_rows_


class LatentMuon(Adam):
    """torch's Muon and Adam over one set of states; unit rows stay at norm 1 and only turn."""

    restart = forget

    def __init__(
        self,
        params: list[dict[str, Any]],
        settings: optim_config.Muon,
        unit_rows: torch.nn.Parameter | None = None,
    ) -> None:
        """Take Muon's settings; `unit_rows` is one of the params, (d_sae, d_out), or None."""
        super().__init__(params, lr=settings.first_lr, fused=True)
        every = [p for group in self.param_groups for p in group["params"]]
        self.matrices = [p for p in every if p.dim() == 2]
        self.unit_rows = unit_rows
        self.muon = Muon(
            self.matrices,
            lr=settings.first_lr,
            weight_decay=0.0,
            momentum=settings.momentum,
            ns_steps=settings.newton_schulz,
            adjust_lr_fn="match_rms_adamw",
        )
        self.muon.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step, with the norm of the unit rows unchanged."""
        unit = self.unit_rows
        grads = [p.grad for p in self.matrices]
        for parameter in self.matrices:
            parameter.grad = None  # Adam passes over what has no gradient
        super().step(closure)
        for parameter, grad in zip(self.matrices, grads, strict=True):
            parameter.grad = grad
        if unit is not None and unit.grad is not None:
            unit.grad = across(unit.grad, unit)
        self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.muon.step()
        if unit is not None:
            normalise_rows_(unit)

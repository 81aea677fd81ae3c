"""What a loss is held against: a dictionary, rows and the parts of the formulas, in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from sae.autoencoder import SparseAutoencoder
from sae.train.config import DictionaryConfig
from sae.train.forward.common import Moment, Power
from sae.train.loss_config import L1

D_IN, D_SAE, BATCH, K = 7, 29, 11, 3
ENDS = (2, 5, 13)
STEP, TOTAL = 3, 10
DEAD = torch.arange(D_SAE) % 3 == 1


class Case(NamedTuple):
    """A config and its loss, written out with `h` (pre-activations) and what is needed."""

    config: DictionaryConfig
    loss: Callable


def moment() -> Moment:
    return Moment(STEP, TOTAL, DEAD, False, Power(0.75, 1.3))


def filled(config: DictionaryConfig) -> SparseAutoencoder:
    made = SparseAutoencoder(config.architecture(D_IN, 1.0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
            if name == "threshold":
                parameter.abs_()
    made.is_still = config.control is not None  # b_dec within the encoder
    return made.double()


def rows() -> torch.Tensor:
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0)).double() * 2


def sq(residual: torch.Tensor) -> torch.Tensor:
    return residual.square().sum(dim=1).mean()


def linear(d, u):
    b_dec = d.b_dec.detach() if d.is_still else d.b_dec
    b_in = {"none": 0.0, "b_dec": b_dec, "own": getattr(d, "b_in", None)}[d.config.b_in]
    return (u - b_in) @ d.enc_rows.T


def top(h, k):
    return torch.relu(h) * (h >= h.sort(dim=1, descending=True).values[:, k - 1 : k])


def decoded(d, a, end=D_SAE):
    return a[:, :end] @ d.dec_rows[:end] + d.b_dec


def config(activation, **fields) -> DictionaryConfig:
    return DictionaryConfig(d_sae=D_SAE, activation=activation, **{"unit_norm": False, **fields})


L1_NOW = L1(coefficient=0.7, ramp=0.0)


def grads_of(loss, dictionary, *, without=()):
    named = [(n, p) for n, p in dictionary.named_parameters() if n not in without]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, found, strict=True)
    }

"""The golden run of a recipe: 30 steps at toy size, and its numbers to the last bit."""

import hashlib
from typing import NamedTuple

import torch

from sae.train.config import DictionaryConfig
from tests.sae.train.test_recipes import D_IN, ENTRIES, STEPS, given, step_of

__all__ = ["ENTRIES", "GoldenRun", "golden_run"]
BATCH = 101


class GoldenRun(NamedTuple):
    """What a training gave."""

    weights_sha256: str
    """Of the dictionary's tensors in order of name."""
    losses: str
    """The loss of each step, float32 in hexadecimal, one after the other."""


def golden_run(config: DictionaryConfig) -> GoldenRun:
    """Train one entry of a recipe on planted rows."""
    step = step_of(config)
    losses = torch.stack([step(*given(config, x)).loss.detach().float() for x in rows()])
    digest = hashlib.sha256()
    for name, tensor in sorted(step.autoencoder.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return GoldenRun(digest.hexdigest(), losses.numpy().tobytes().hex())


def rows() -> list[torch.Tensor]:
    """Sparse mixes of 29 planted directions, far from the origin."""
    generator = torch.Generator().manual_seed(7)
    atoms = torch.randn(29, D_IN, generator=generator)
    shape = (STEPS, BATCH, 29)
    fires = torch.rand(shape, generator=generator) < 0.07
    sizes = torch.rand(shape, generator=generator) + 0.5
    return list((fires * sizes) @ atoms + 3.0)

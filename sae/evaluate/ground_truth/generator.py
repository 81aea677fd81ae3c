"""Rows of a world with the activations behind them, as a function of the world and the row number.

Rows are made in blocks of BLOCK, each from its own generator, so the stream does not depend on how
it is cut into batches, and any place of it is reached at once.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosema.checks import MonosemaError
from sae.activations import Latents, to_latents
from sae.evaluate.ground_truth.config import Normal, Uniform
from sae.evaluate.ground_truth.world import World, generator_of

BLOCK = 256
"""Rows that come from one generator."""

Split = Literal["train", "score"]
"""Streams of one world that share no row."""


class TrueBatch(NamedTuple):
    """Rows, and what they are made of."""

    x: Float[Tensor, "batch d_model"]
    """The rows."""
    truth: Latents
    """Activations of the features in sparse form; numbers are those of the world's features."""


def batches(
    world: World, batch: int, n_batches: int, *, split: Split = "train", start: int = 0
) -> Iterator[TrueBatch]:
    """Batches number start, start + 1, ... of a stream.

    Args:
        world: Where the rows come from; they lie on its device.
        batch: Rows of each batch.
        n_batches: How many batches.
        split: Which stream.
        start: Number of the first batch.
    """
    for number in range(start, start + n_batches):
        x, acts = rows(world, number * batch, (number + 1) * batch, split=split)
        yield TrueBatch(x, to_latents(acts))


class DenseRows(NamedTuple):
    """Rows with dense true activations."""

    x: Float[Tensor, "batch d_model"]
    """The rows."""
    acts: Float[Tensor, "batch feature"]
    """Activation of each feature, 0 where it does not fire."""


@torch.no_grad()
def rows(world: World, first: int, end: int, *, split: Split = "train") -> DenseRows:
    """Rows number first..end - 1 of a stream; the same numbers give the same bits."""
    if not 0 <= first < end:
        raise MonosemaError(
            f"rows must begin at 0 or later and before their end, got {first}, {end}"
        )
    numbers = range(first // BLOCK, (end - 1) // BLOCK + 1)
    blocks = [_block(world, split, number) for number in numbers]
    cut = slice(first - numbers[0] * BLOCK, end - numbers[0] * BLOCK)
    return DenseRows(*(torch.cat(parts)[cut] for parts in zip(*blocks, strict=True)))


def _block(world: World, split: Split, number: int) -> DenseRows:
    device = world.directions.device
    generator = generator_of(world.seed, split, number, device=device)
    fires = _candidates(world, generator)
    _keep_within_trees(world, fires, generator)
    acts = _activations(world, fires, generator)
    x = acts @ world.directions + world.bias
    if world.config.noise > 0:
        x += world.config.noise * torch.randn(x.shape, generator=generator, device=device)
    return DenseRows(x, acts)


def _candidates(world: World, generator: torch.Generator) -> Bool[Tensor, "batch feature"]:
    """Threshold a Gaussian of unit variance and low-rank correlation (a copula)."""
    loadings, device = world.loadings, generator.device
    own = (1 - loadings.square().sum(dim=1)).sqrt()
    causes = torch.randn(BLOCK, loadings.shape[1], generator=generator, device=device)
    drawn = torch.randn(BLOCK, len(loadings), generator=generator, device=device)
    level = -torch.special.ndtri(world.chance.double()).float()  # -inf for a chance of 1
    return torch.addmm(drawn * own, causes, loadings.T) > level


def _keep_within_trees(
    world: World, fires: Bool[Tensor, "batch feature"], generator: torch.Generator
) -> None:
    """Silence, in place, children of silent parents and all but one of exclusive siblings."""
    hierarchy = world.config.hierarchy
    for level in world.levels:
        assert hierarchy is not None
        children = fires[:, level.children]
        children &= fires[:, level.parents]
        if hierarchy.exclusive:
            siblings = children.view(BLOCK, -1, hierarchy.branching)
            lots = torch.rand(siblings.shape, generator=generator, device=generator.device)
            winner = (lots * siblings).argmax(dim=2, keepdim=True)
            children &= torch.zeros_like(siblings).scatter_(2, winner, True).view_as(children)


def _activations(
    world: World, fires: Bool[Tensor, "batch feature"], generator: torch.Generator
) -> Float[Tensor, "batch feature"]:
    places = fires.nonzero(as_tuple=True)
    mean, std = world.mean[places[1]], world.std[places[1]]
    match world.config.magnitude:
        case Normal():
            drawn = torch.randn(len(mean), generator=generator, device=generator.device)
            values = (mean + std * drawn).relu()
        case Uniform():
            drawn = torch.rand(len(mean), generator=generator, device=generator.device)
            values = 2 * mean * drawn
        case _:
            assert_never(world.config.magnitude)
    acts = torch.zeros(fires.shape, device=generator.device)
    acts[places] = values
    for level in world.levels:
        parents = acts[:, level.parents]
        hierarchy = world.config.hierarchy
        scaled = hierarchy is not None and hierarchy.scaled
        acts[:, level.children] *= parents / world.mean[level.parents] if scaled else parents > 0
    return acts

"""A world whose features are known, and its rows.

The truth: directions, firing probabilities, trees and magnitudes; or the toy model of superposition
(Elhage et al. 2022), whose directions training itself chose. Rows come with the activations behind
them. They are made in blocks of BLOCK, each from its own generator, so the stream does not depend
on how it is cut into batches, and any place of it is reached at once.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from monosema.checks import MonosemaError
from sae.activations import Latents, to_latents
from sae.evaluate.ground_truth.config import (
    GroundTruthConfig,
    Hierarchy,
    Normal,
    Orthogonalised,
    ToyModel,
    Uniform,
    Zipf,
)

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


REPRESENTED = 0.5
"""Norm of a toy model's direction from which its feature is part of the world."""


class Level(NamedTuple):
    """One level of the trees below the roots; siblings lie side by side."""

    children: slice
    """Numbers of its features."""
    parents: Int[Tensor, " feature"]
    """The parent of each of them."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that is true of a world; all tensors on one device."""

    config: GroundTruthConfig
    """What it was made from."""
    seed: int
    """What it was made from, and what its rows come from."""
    directions: Float[Tensor, "feature d_model"]
    """Unit direction of each feature, the most frequent first."""
    bias: Float[Tensor, " d_model"]
    """In every row."""
    chance: Float[Tensor, " feature"]
    """Probability that a feature is a candidate, before its parent and siblings are asked."""
    rates: Float[Tensor, " feature"]
    """Share of the rows in which it fires; exact where the correlation is absent."""
    loadings: Float[Tensor, "feature k"]
    """Weight of each feature on the k common causes; k = 0 without correlation."""
    mean: Float[Tensor, " feature"]
    """Mean activation of a candidate."""
    std: Float[Tensor, " feature"]
    """Standard deviation of its activation (uniform: of width sqrt(12) times this)."""
    levels: tuple[Level, ...]
    """The trees, from the roots down."""

    @property
    def n_features(self) -> int:
        """Features; fewer than the config names where a toy model left some out."""
        return len(self.directions)


def make_world(
    config: GroundTruthConfig, seed: int, *, device: torch.device | str = "cpu"
) -> World:
    """The world of a config and a seed, the same for the same kind of device and versions."""
    generator = generator_of(seed, "world", device=device)
    chance = _zipf(config.firing, config.n_features).to(device)
    weighted = _directions(config, chance, generator)  # not unit for a toy model
    represented = weighted.norm(dim=1) >= REPRESENTED
    weighted, chance = weighted[represented], chance[represented]
    norms = weighted.norm(dim=1)
    magnitudes = _magnitudes(config.magnitude, norms, generator)
    levels = () if config.hierarchy is None else _levels(config.hierarchy, device)
    rates = chance
    if config.hierarchy is not None:
        chance = _compensated(chance, config.hierarchy, levels)
        rates = _rates(chance, config.hierarchy, levels)
    bias = torch.randn(config.d_model, generator=generator, device=device)
    return World(
        config=config,
        seed=seed,
        directions=weighted / norms[:, None],
        bias=bias / bias.norm() * config.bias,
        chance=chance,
        rates=rates,
        loadings=_loadings(config, len(weighted), generator),
        mean=magnitudes.mean,
        std=magnitudes.std,
        levels=levels,
    )


def generator_of(seed: int, *of: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, independent of those for other purposes and seeds."""
    name = "/".join(str(part) for part in (seed, *of)).encode()
    number = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())
    return torch.Generator(device).manual_seed(number)


def _zipf(firing: Zipf, n_features: int) -> Float[Tensor, " feature"]:
    share = torch.arange(1, n_features + 1, dtype=torch.float64) ** -firing.exponent
    width = float(share[0] - share[-1])
    share = (share - share[-1]) / width if width > 0 else torch.ones_like(share)
    return (firing.lowest + (firing.highest - firing.lowest) * share).float()


def _directions(
    config: GroundTruthConfig, chance: Float[Tensor, " feature"], generator: torch.Generator
) -> Float[Tensor, "feature d_model"]:
    match config.geometry:
        case Orthogonalised() as geometry:
            return _orthogonalised(geometry, config, generator)
        case ToyModel() as geometry:
            return learned_directions(geometry, chance, config.d_model, generator)
        case _:
            assert_never(config.geometry)


def _orthogonalised(
    geometry: Orthogonalised, config: GroundTruthConfig, generator: torch.Generator
) -> Float[Tensor, "feature d_model"]:
    """Descend sum_{i != j} <e_i, e_j>^2 + n sum_i (|e_i|^2 - 1)^2.

    The first sum is |E^T E|_F^2 - sum_i |e_i|^4, so no (feature, feature) matrix is made.
    """
    shape = (config.n_features, config.d_model)
    rows = torch.randn(shape, generator=generator, device=generator.device)
    rows = (rows / rows.norm(dim=1, keepdim=True)).requires_grad_()
    adam = torch.optim.Adam([rows], lr=geometry.lr)
    for _ in range(geometry.steps):
        with torch.enable_grad():
            squares = rows.square().sum(dim=1)
            overlap = (rows.T @ rows).square().sum() - squares.square().sum()
            loss = overlap + len(rows) * (squares - 1).square().sum()
        (rows.grad,) = torch.autograd.grad(loss, rows)
        adam.step()
    rows = rows.detach()
    return rows / rows.norm(dim=1, keepdim=True)


class _Magnitudes(NamedTuple):
    mean: Float[Tensor, " feature"]
    std: Float[Tensor, " feature"]


def _magnitudes(
    magnitude: Normal | Uniform, norms: Float[Tensor, " feature"], generator: torch.Generator
) -> _Magnitudes:
    match magnitude:
        case Normal():
            mean = torch.linspace(magnitude.first, magnitude.last, len(norms), device=norms.device)
            drawn = torch.randn(len(norms), generator=generator, device=norms.device)
            std = (magnitude.std_mean + magnitude.std_std * drawn).abs()
            return _Magnitudes(mean * norms, std * norms)
        case Uniform():
            return _Magnitudes(norms / 2, norms / 12**0.5)
        case _:
            assert_never(magnitude)


def _loadings(
    config: GroundTruthConfig, n_features: int, generator: torch.Generator
) -> Float[Tensor, "feature k"]:
    if config.correlation is None:
        return torch.zeros(n_features, 0, device=generator.device)
    shape = (n_features, config.correlation.rank)
    loadings = torch.randn(shape, generator=generator, device=generator.device)
    loadings *= config.correlation.scale
    # Each feature keeps at least 1 % of its variance to itself.
    return loadings * (0.99 / loadings.square().sum(dim=1).max().clamp_min(0.99)).sqrt()


def _levels(hierarchy: Hierarchy, device: torch.device | str) -> tuple[Level, ...]:
    levels, first, n = [], 0, hierarchy.n_roots
    for _ in range(hierarchy.depth):
        parents = torch.arange(first, first + n, device=device)
        first, n = first + n, n * hierarchy.branching
        levels.append(
            Level(slice(first, first + n), parents.repeat_interleave(hierarchy.branching))
        )
    return tuple(levels)


def _compensated(
    wanted: Float[Tensor, " feature"], hierarchy: Hierarchy, levels: tuple[Level, ...]
) -> Float[Tensor, " feature"]:
    """Chances that make up, as SynthSAEBench does, for what parents and siblings take away.

    p_i / p_parent (1 + sum of the siblings' p / p_parent), at most 1; so rates stay below `wanted`
    where the children of a parent would fire more often than it.
    """
    chance = wanted.clone()
    for level in levels:
        share = wanted[level.children] / wanted[level.parents]
        others = share.view(-1, hierarchy.branching).sum(dim=1, keepdim=True) - share.view(
            -1, hierarchy.branching
        )
        rivals = others.flatten() if hierarchy.exclusive else torch.zeros_like(share)
        chance[level.children] = (share * (1 + rivals)).clamp_max(1)
    return chance


def _rates(
    chance: Float[Tensor, " feature"], hierarchy: Hierarchy, levels: tuple[Level, ...]
) -> Float[Tensor, " feature"]:
    """How often features fire when the candidates are independent."""
    rates = chance.clone()
    for level in levels:
        child_chance = chance[level.children].double()
        if hierarchy.exclusive:
            child_chance = (
                child_chance * _chosen(child_chance.view(-1, hierarchy.branching)).flatten()
            )
        rates[level.children] = (rates[level.parents] * child_chance).float()
    return rates


def _chosen(chance: Float64[Tensor, "parent k"]) -> Float64[Tensor, "parent k"]:
    """Probability that a candidate is chosen among its siblings, each of these as likely.

    E[1 / (1 + B)] for the number B of sibling candidates is the integral over t in 0..1 of
    prod (1 - q + q t), a polynomial, for which Gauss-Legendre quadrature is exact.
    """
    places, weights = np.polynomial.legendre.leggauss(chance.shape[1])
    t = torch.as_tensor((places + 1) / 2, device=chance.device)
    terms = 1 - chance[:, :, None] * (1 - t)
    others = terms.prod(dim=1, keepdim=True) / terms
    return others @ torch.as_tensor(weights / 2, device=chance.device)


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
    rest = (1 - loadings.square().sum(dim=1)).sqrt()
    causes = torch.randn(BLOCK, loadings.shape[1], generator=generator, device=device)
    drawn = torch.randn(BLOCK, len(loadings), generator=generator, device=device)
    level = -torch.special.ndtri(world.chance.double()).float()  # -inf for a chance of 1
    return torch.addmm(drawn * rest, causes, loadings.T) > level


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

"""An autoencoder as a training config and the statistics of a cache make it."""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from activations_cache.config import TRAINING_SPLITS
from sae.architecture import SAEConfig, Slice
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import DictionaryConfig
from sae.train.initial import refine_
from sae.train.sites import Sites
from sae.train.warm_start import start_from

if TYPE_CHECKING:
    from activations_cache import ActivationCache


def new_autoencoder(
    cache: "ActivationCache", where: Sites, entry: DictionaryConfig, seed: int
) -> SparseAutoencoder:
    """The dictionary of these hook points of a cache that training begins with, on the CPU."""
    inputs = [_unit(cache, point, entry) for point in where.inputs]
    outputs = [_unit(cache, point, entry) for point in where.outputs]
    form = architecture(entry, inputs, outputs)
    if entry.init_from is not None:
        return start_from(entry.init_from, form, unit_norm=entry.unit_norm)
    autoencoder = SparseAutoencoder(form)
    generator = torch.Generator().manual_seed(seed if entry.seed is None else entry.seed)
    initialise(
        autoencoder,
        generator,
        mean=_mean(outputs or inputs),
        mean_in=_mean(inputs),
        decoder_norm=entry.decoder_norm,
    )
    refine_(autoencoder, entry, lambda: _drawn(cache, where, entry.init.n_rows, generator))
    return autoencoder


def _drawn(
    cache: "ActivationCache", where: Sites, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]:
    """Rows of the cache that are trained on: what is read, and what is predicted."""
    every = cache.rows(TRAINING_SPLITS)
    rows = every[torch.randperm(len(every), generator=generator)[:n]]
    both = [
        torch.cat([cache[point][rows] for point in points], dim=1)
        for points in (where.inputs, where.outputs or where.inputs)
    ]
    return both[0], both[1]


class Unit(NamedTuple):
    """A hook point, and what its statistics say of its part of a dictionary."""

    part: Slice
    mean: Float[Tensor, " d_model"] | None


def _unit(cache: "ActivationCache", hook_point: str, entry: DictionaryConfig) -> Unit:
    rows = cache[hook_point]
    scale, mean = units(rows.mean, rows.mean_square_norm, entry)
    return Unit(Slice(hook_point=hook_point, width=len(rows.mean), scale=scale), mean)


def _mean(found: list[Unit]) -> Float[Tensor, " d_in"] | None:
    means = [unit.mean for unit in found if unit.mean is not None]
    return torch.cat(means) if means else None


def architecture(entry: DictionaryConfig, inputs: list[Unit], outputs: list[Unit]) -> SAEConfig:
    """The form of a dictionary of these hook points; a single one's scale is that of the whole."""
    (scale_in, parts_in), (scale_out, parts_out) = _whole(inputs), _whole(outputs)
    return entry.architecture(
        sum(part.width for part in parts_in),
        scale_in,
        d_out=sum(part.width for part in parts_out) if outputs else None,
        output_scale=scale_out if outputs else None,
        inputs=parts_in,
        outputs=parts_out,
    )


def _whole(found: list[Unit]) -> tuple[float, tuple[Slice, ...]]:
    parts = tuple(unit.part for unit in found)
    if len(parts) != 1:
        return 1.0, parts
    return parts[0].scale, (replace(parts[0], scale=1.0),)


def units(
    mean: Float[Tensor, " d_in"], mean_square_norm: float, entry: DictionaryConfig
) -> tuple[float, Float[Tensor, " d_in"] | None]:
    """The scale that brings centred rows to a mean square norm of d_in, and where b_dec starts.

    Normed rows have that size by themselves, and their mean is not that of the cache: b_dec starts
    at 0 then.
    """
    if entry.input_norm != "none":
        return 1.0, None
    variance = mean_square_norm - float(mean.double().square().sum())
    return (mean.shape[0] / variance) ** 0.5, mean.float()

"""What each dictionary gets of rows in which several hook points stand side by side."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.train.hook_points import Sites


class Columns(NamedTuple):
    """The columns that one dictionary reads, and those that it predicts."""

    inputs: tuple[slice, ...]
    """One for each hook point that is read."""
    outputs: tuple[slice, ...]
    """One for each that is predicted; empty where these are the inputs."""

    def pick(self, x: Float[Tensor, "batch width"]) -> tuple[Float[Tensor, "batch _"], ...]:
        """The rows that are read and, where they are others, those that are predicted."""
        parts = (self.inputs, self.outputs) if self.outputs else (self.inputs,)
        return tuple(_beside(x, columns) for columns in parts)


class Reads(NamedTuple):
    """What is read of the cache, and what of it is whose."""

    hook_points: tuple[str, ...]
    """Those that any dictionary needs, side by side in the order of the cache."""
    columns: dict[str, Columns]
    """By dictionary."""


def reads(sites: Mapping[str, Sites], widths: Mapping[str, int]) -> Reads:
    """Lay out the hook points of all dictionaries; `widths` are the cache's, in its order."""
    needed = {point for of in sites.values() for point in (*of.inputs, *of.outputs)}
    found: dict[str, slice] = {}
    start = 0
    for point in (point for point in widths if point in needed):
        found[point] = slice(start, start + widths[point])
        start += widths[point]
    columns = {
        name: Columns(*(tuple(found[point] for point in points) for points in of))
        for name, of in sites.items()
    }
    return Reads(tuple(found), columns)


def _beside(x: Float[Tensor, "batch width"], columns: Sequence[slice]) -> Float[Tensor, "batch _"]:
    """The columns in memory of their own, as they are in rows that hold nothing else."""
    if len(columns) == 1:
        return x[:, columns[0]].contiguous()
    return torch.cat([x[:, part] for part in columns], dim=1)

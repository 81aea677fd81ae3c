"""A cache as a dictionary of several hook points reads it."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache import ActivationCache
from sae.autoencoder import SparseAutoencoder


class _Rows(NamedTuple):
    cache: ActivationCache
    hook_points: tuple[str, ...]

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row d_in"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([self.cache[point][rows] for point in self.hook_points], dim=1)


def beside(cache: ActivationCache, dictionary: SparseAutoencoder, hook_point: str) -> Any:
    """The cache with what the dictionary reads; `hook_point` if it records nothing."""
    return _Beside(cache, dictionary.config.sites(hook_point)[0])


class _Beside:
    """A cache whose one stream is several hook points side by side."""

    def __init__(self, cache: ActivationCache, hook_points: tuple[str, ...]) -> None:
        """Take the hook points in their order."""
        self._cache, self._hook_points = cache, hook_points

    def __getitem__(self, hook_point: str) -> Any:
        """Their rows, whatever the name; a single one's are the cache's own."""
        points = self._hook_points
        return self._cache[points[0]] if len(points) == 1 else _Rows(self._cache, points)

    def __getattr__(self, name: str) -> Any:
        """All else is the cache's."""
        return getattr(self._cache, name)

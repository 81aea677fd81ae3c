"""Which hook points the dictionaries of a run read and predict; no torch here."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from monosema.checks import require
from sae.train.config import DictionaryConfig


class HookPoints(NamedTuple):
    """The hook points of one dictionary."""

    inputs: tuple[str, ...]
    """Those that are read, side by side."""
    outputs: tuple[str, ...]
    """Those that are predicted; empty where these are the inputs."""

    @property
    def predicted(self) -> tuple[str, ...]:
        """The hook points of what the dictionary gives."""
        return self.outputs or self.inputs


def hook_points_of(
    saes: Mapping[str, DictionaryConfig], hook_points: Sequence[str], prefix: str = ""
) -> dict[str, HookPoints]:
    """The hook points of each entry of `saes:` among those of a cache.

    Raises:
        ValueError: If an entry names a hook point that the cache has not, or none where the cache
            has several.
    """
    return {
        name: _hook_points_of(entry, hook_points, f"{prefix}saes.{name}")
        for name, entry in saes.items()
    }


def _hook_points_of(entry: DictionaryConfig, hook_points: Sequence[str], where: str) -> HookPoints:
    among = f"name hook points of the cache ({', '.join(hook_points)})"
    for field in ("inputs", "outputs"):
        for point in getattr(entry, field):
            require(point in hook_points, f"{where}.{field}", among, point)
    only = tuple(hook_points) if len(hook_points) == 1 else ()
    inputs = entry.inputs or only
    require(len(inputs) > 0, f"{where}.inputs", among, inputs)
    require(entry.outputs != inputs, f"{where}.outputs", "differ from inputs", entry.outputs)
    return HookPoints(inputs, entry.outputs)

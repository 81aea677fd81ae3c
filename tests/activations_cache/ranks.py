"""Several processes that build one cache."""

import os
import traceback
import warnings
from pathlib import Path

from activations_cache.builder import build
from activations_cache.config import CacheConfig


def build_in_ranks(n_ranks: int, config: CacheConfig, path: Path) -> list[int]:
    """Build one cache in forked processes; return their exit statuses."""
    children = [_build_as(rank, n_ranks, config, path) for rank in range(n_ranks)]
    return [os.waitpid(child, 0)[1] for child in children]


def _build_as(rank: int, n_ranks: int, config: CacheConfig, path: Path) -> int:
    with warnings.catch_warnings():
        # Only this thread goes on in the child, which touches none of what the others hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
        try:
            build(config, path)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

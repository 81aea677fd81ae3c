"""Several processes that build one cache."""

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Generator
from multiprocessing.synchronize import Barrier
from pathlib import Path

from activations_cache.builder import build
from activations_cache.config import CacheConfig
from activations_cache.writer import CacheWriter


def build_in_ranks(n_ranks: int, config: CacheConfig, path: Path) -> list[int]:
    """Build one cache in forked processes; return their exit statuses.

    Each keeps the first shard that it claims until all have one, however late it was scheduled. So
    the cache must have at least a shard for each.
    """
    all_have_one = multiprocessing.get_context("fork").Barrier(n_ranks)
    children = [_build_as(rank, n_ranks, config, path, all_have_one) for rank in range(n_ranks)]
    return [os.waitpid(child, 0)[1] for child in children]


def _build_as(
    rank: int, n_ranks: int, config: CacheConfig, path: Path, all_have_one: Barrier
) -> int:
    with warnings.catch_warnings():
        # Only this thread goes on in the child, which touches none of what the others hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
        try:
            _wait_at_the_first(all_have_one)
            build(config, path)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def _wait_at_the_first(all_have_one: Barrier) -> None:
    """Let this process's writers wait for the others once they have claimed a shard."""
    claims = CacheWriter._claims

    def waiting(self: CacheWriter, n_ranks: int) -> Generator[int, None, None]:
        for number, shard in enumerate(claims(self, n_ranks)):
            if number == 0:
                all_have_one.wait(timeout=120)
            yield shard

    CacheWriter._claims = waiting

"""What 8 bits a number and compression do to a cache: size, error, and the FVU of a dictionary.

`python -m benchmarks.bench_storage CACHE` copies the rows of a bfloat16 cache into an int8 one and
a compressed one, trains the same TopK dictionary on the bfloat16 and the int8 rows, and measures
both on the held-out bfloat16 rows.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import activations_cache
from activations_cache.builder import write_shards
from activations_cache.checks import silent
from activations_cache.manifest import Plan
from activations_cache.reader import ActivationCache
from activations_cache.text import NO_TOKEN
from activations_cache.writer import CacheWriter
from benchmarks.rows import append, surroundings
from sae import pretrained
from sae.architecture import TopK
from sae.autoencoder import SparseAutoencoder
from sae.metrics import FVU
from sae.train.config import Adam, AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train


class Copy:
    """The rows of a cache as the source of another one."""

    def __init__(self, cache: ActivationCache, **changes: Any) -> None:
        self._cache = cache
        self._grid = cache.refs(cache.rows())
        self.examples = cache.examples
        self.plan: Plan = dataclasses.replace(cache.manifest.plan, **changes)

    def __call__(self, numbers: range) -> Mapping[str, Float[Tensor, "example pos _"]]:
        """Return the rows of some examples where they stood; the rest is not finite."""
        here = (self._grid.example >= numbers.start) & (self._grid.example < numbers.stop)
        rows, at = self._cache.rows()[here], self._grid.example[here] - numbers.start
        results = {}
        for name in self._cache.hook_points:
            shape = (len(numbers), self.plan.context, self._cache.d_model(name))
            results[name] = torch.full(shape, torch.nan)
            results[name][at, self._grid.position[here]] = self._cache[name][rows]
        return results


def copied(cache: ActivationCache, path: Path, **changes: Any) -> ActivationCache:
    """Write the same rows in another storage."""
    source = Copy(cache, **changes)
    with CacheWriter(path, source.plan) as writer:
        write_shards(writer, source, 256, 1, silent)
        writer.finish({})
    return activations_cache.open(path)


def trained(cache: ActivationCache, seed: int, path: Path) -> SparseAutoencoder:
    """Train the demo's TopK dictionary on a cache, in one pass."""
    recipe = DictionaryConfig(
        d_sae=4608,
        activation=TopK(k=32),
        auxk=AuxK(coefficient=0.5),
        dead_after_tokens=10_000,
        optimizer=Adam(lr=2e-3),
    )
    config = TrainConfig(saes={"topk": recipe}, batch=512, seed=seed)
    train(cache, config, path)
    return pretrained.load(path / "topk")


@torch.no_grad()
def held_out_fvu(model: SparseAutoencoder, cache: ActivationCache) -> float:
    """Return the centred FVU on the held-out rows."""
    result = FVU()
    for rows in cache.rows(("hold",)).split(4096):
        x = cache[cache.hook_points[0]][rows]
        result.update(x, model(x))
    return result.compute()


def error_of(cache: ActivationCache, other: ActivationCache) -> float:
    """Return the share of the rows' variance that the other storage loses."""
    name, result = cache.hook_points[0], FVU()
    for rows, same in zip(cache.rows().split(8192), other.rows().split(8192), strict=True):
        result.update(cache[name][rows], other[name][same])
    return result.compute()


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path, help="a finished bfloat16 cache with one hook point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to results/storage.jsonl")
    given = parser.parse_args()
    cache = activations_cache.open(given.cache)
    assert cache.manifest.plan.dtype == "bfloat16", cache.manifest.plan.dtype
    assert (cache.examples.tokens != NO_TOKEN).all()
    with tempfile.TemporaryDirectory() as folder:
        eight = copied(cache, Path(folder) / "int8", dtype="int8")
        packed = copied(cache, Path(folder) / "zstd", compression="zstd")
        row = {
            "case": "storage of the demo's cache",
            "hook_point": cache.hook_points[0],
            "rows": cache.n_rows,
            "bytes": {
                "bfloat16": cache.n_bytes,
                "int8": eight.n_bytes,
                "bfloat16, zstd": packed.n_bytes,
            },
            "int8_error_fvu": error_of(cache, eight),
            "seed": given.seed,
            "fvu": {
                "trained on bfloat16": held_out_fvu(
                    trained(cache, given.seed, Path(folder) / "a"), cache
                ),
                "trained on int8": held_out_fvu(
                    trained(eight, given.seed, Path(folder) / "b"), cache
                ),
            },
        }
    print(row)
    if given.record:
        print(append("storage", [surroundings(("numcodecs",)) | row]))


if __name__ == "__main__":
    main()

"""What collecting windows costs beside the work that nobody can spare: the forward and the encoder.

`sae bench windows --cache CACHE DICT`. Seconds are of the processor, one thread, so that others on
the machine count little. The forward is that of the cache's model up to the hook point, over a
sample of its contexts, scaled to the rows; encoder and pass read the same rows.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

import activations_cache
from activations_cache import ActivationCache, capture
from activations_cache.models import load_model
from benchmarks.rows import append, surroundings
from sae import pretrained
from sae.autoencoder import SparseAutoencoder
from sae.explain.collect import collect
from sae.explain.config import WindowConfig
from sae.explain.reservoir import State
from sae.run.caches import model_of

N_CONTEXTS = 32
ROWS_PER_CHUNK = WindowConfig().rows_per_chunk

T = TypeVar("T")


class FirstRows:
    """The first rows of each split of a cache."""

    def __init__(self, cache: ActivationCache, n_rows: int) -> None:
        """Keep how many rows the explain split gives; the others give as large a share."""
        self._cache = cache
        self._share = min(n_rows / len(cache.rows(("explain", "score"))), 1.0)

    def rows(self, splits: tuple[str, ...]) -> torch.Tensor:
        """Ids of the first rows of these splits."""
        ids = self._cache.rows(splits)
        return ids[: round(len(ids) * self._share)]

    def __getitem__(self, hook_point: str) -> Any:
        """The cache's rows."""
        return self._cache[hook_point]

    def __getattr__(self, name: str) -> Any:
        """All else is the cache's."""
        return getattr(self._cache, name)


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds of some work, and what it gave."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


@torch.no_grad()
def encode(
    dictionary: SparseAutoencoder, cache: ActivationCache, hook_point: str, ids: torch.Tensor
) -> None:
    """Read and encode rows, and drop what it gives."""
    for chunk in ids.split(ROWS_PER_CHUNK):
        dictionary.encode(cache[hook_point][chunk])


def forward_per_row(cache: ActivationCache, hook_point: str) -> float:
    """Processor seconds of the model up to the hook, for each row of the cache."""
    model = load_model(model_of(cache, None)).model
    tokens = cache.examples.tokens[:N_CONTEXTS].clamp_min(0).long()

    def forward() -> None:
        for batch in tokens.split(8):
            with capture(model, [hook_point]) as run:
                run(batch)

    forward()  # warms up
    return seconds(forward)[0] / (
        tokens.numel() * len(cache.rows()) / cache.examples.tokens.numel()
    )


def nbytes(state: State) -> int:
    """What the pass holds."""
    arrays = [*state.counts.values(), *state.reservoir.rows, *state.pool]
    return sum(array.nbytes for array in arrays)


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dictionary", metavar="DICT")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--record", action="store_true", help="append to results/windows.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = activations_cache.open(arguments.cache)
    hook_point = cache.hook_points[0]
    dictionary = pretrained.load(arguments.dictionary)
    sizes, passes, encoders, ids = [], [], [], torch.empty(0)
    for n_rows in (arguments.rows // 4, arguments.rows):
        part: Any = FirstRows(cache, n_rows)
        ids = part.rows(("explain", "score"))
        took, state = seconds(partial(collect, dictionary, part, hook_point, WindowConfig()))
        passes.append(took)
        encoders.append(seconds(partial(encode, dictionary, cache, hook_point, ids))[0])
        sizes.append(nbytes(state))
    forward = forward_per_row(cache, hook_point) * len(ids)
    row = {
        "case": "windows of every latent, one pass",
        "rows": len(ids), "d_sae": dictionary.config.d_sae,
        "forward_s": forward, "encoder_s": encoders[-1], "pass_s": passes[-1],
        "ratio": (forward + passes[-1]) / (forward + encoders[-1]),
        "bytes_at_a_quarter": sizes[0], "bytes": sizes[-1],
    }  # fmt: skip
    print(row)
    if arguments.record:
        print(append("windows", [{**surroundings(), **row}]))


if __name__ == "__main__":
    main()

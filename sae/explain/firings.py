"""What every latent does on every row: one streaming pass, sparse and sorted by latent.

From it come latents that fire on the same rows (the correlation of firing), and latents that fire
as units of the model do, with what a search for safety-relevant latents must say.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from scipy import sparse
from torch import Tensor, nn

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.hooks import capture
from sae.autoencoder import SparseAutoencoder

_ROWS_PER_CHUNK = 4096


class Firings(NamedTuple):
    """Where one latent fires, rows ascending."""

    rows: Int32[np.ndarray, " entry"]
    """Indices into the rows that were encoded."""
    values: Float32[np.ndarray, " entry"]
    """Activations, none of them 0."""


class FiringEntries(NamedTuple):
    """The firings of several latents in one array."""

    group: Int64[np.ndarray, " entry"]
    """Place of the entry's latent in the list of latents that was asked for; ascends."""
    row: Int32[np.ndarray, " entry"]
    """Index into the rows that were encoded."""


@dataclass(frozen=True)
class Codes:
    """Sparse activations of a dictionary on a sequence of rows, sorted by latent, then by row.

    8 bytes an entry: 45 million entries are 0.36 GB, and `encode_rows` needs at most about twice
    that while it builds them.
    """

    n_fired: Int64[np.ndarray, " d_sae"]
    """Rows on which each latent fires."""
    row: Int32[np.ndarray, " entry"]
    """Index of the entry's row among the rows that were encoded."""
    value: Float32[np.ndarray, " entry"]
    """Activation, never 0."""
    n_rows: int
    """How many rows were encoded."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.n_fired)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.n_fired.nbytes + self.row.nbytes + self.value.nbytes

    @cached_property
    def start(self) -> Int64[np.ndarray, " d_sae"]:
        """Index of each latent's first entry."""
        return np.cumsum(self.n_fired) - self.n_fired

    def of(self, latent: int) -> Firings:
        """Rows and activations of one latent."""
        part = slice(self.start[latent], self.start[latent] + self.n_fired[latent])
        return Firings(self.row[part], self.value[part])

    def part(self, first: int, last: int) -> "Codes":
        """The latents first, ..., last - 1 alone, without a copy."""
        n_fired = self.n_fired[first:last]
        start = int(self.start[first])
        entries = slice(start, start + int(n_fired.sum()))
        return Codes(n_fired, self.row[entries], self.value[entries], self.n_rows)

    def block(self, first: int, last: int) -> FiringEntries:
        """Entries of the latents first, ..., last - 1, without a copy of the rows."""
        counts = self.n_fired[first:last]
        start = int(self.start[first])
        row = self.row[start : start + int(counts.sum())]
        return FiringEntries(np.repeat(np.arange(last - first), counts), row)

    def take(self, latents: Int64[np.ndarray, " k"]) -> FiringEntries:
        """Entries of any latents, in the order of `latents`."""
        counts = self.n_fired[latents]
        index = concatenated_ranges(self.start[latents], counts)
        return FiringEntries(np.repeat(np.arange(len(latents)), counts), self.row[index])


def concatenated_ranges(
    starts: Int64[np.ndarray, " k"], lengths: Int64[np.ndarray, " k"]
) -> Int64[np.ndarray, " entry"]:
    """The integers starts[0], ..., starts[0] + lengths[0] - 1, starts[1], ... in one array."""
    skipped = starts - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum()) + np.repeat(skipped, lengths)


@runtime_checkable
class ActivationRows(Protocol):
    """One hook point of a cache: rows by their ids."""

    def __getitem__(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row d_in"]:
        """The rows with these ids, float32."""
        ...


def encode_rows(
    dictionary: SparseAutoencoder,
    activations: ActivationRows,
    rows: Int[Tensor, " row"],
    progress: Progress | None = None,
) -> Codes:
    """Encode rows chunk by chunk and keep what fires.

    Args:
        dictionary: What encodes.
        activations: Where the rows are read, such as `cache[hook_point]`.
        rows: Ids of the rows; entry `row` i of the result is the row with id rows[i].
        progress: Called after each chunk with the number of rows done.

    Raises:
        ValueError: If an activation of the dictionary is not finite.
    """
    report, d_sae = progress or silent, dictionary.config.d_sae
    chunks = []
    for start in range(0, len(rows), _ROWS_PER_CHUNK):
        ids = rows[start : start + _ROWS_PER_CHUNK]
        row, latent, value = encode_chunk(dictionary, activations, ids)
        n_fired = np.bincount(latent, minlength=d_sae)
        chunks.append(_FiringChunk(n_fired, row.astype(np.int32) + np.int32(start), value))
        report(start + len(ids), len(rows), "rows encoded")
    return _merged(chunks, d_sae, len(rows))


class ChunkFirings(NamedTuple):
    """The firings on some rows, ordered by latent, then row."""

    row: Int64[np.ndarray, " entry"]
    """Which of the rows."""
    latent: Int64[np.ndarray, " entry"]
    """Which latent fires on it."""
    value: Float32[np.ndarray, " entry"]
    """Activation, never 0."""


@torch.no_grad()
def encode_chunk(
    dictionary: SparseAutoencoder, activations: ActivationRows, ids: Int[Tensor, " row"]
) -> ChunkFirings:
    """Encode rows at once.

    Raises:
        ValueError: If an activation of the dictionary is not finite.
    """
    latents = dictionary.encode(activations[ids].to(dictionary.enc_rows.device))
    if not torch.isfinite(latents.values).all():
        raise MonosemaError(
            f"activations must be finite, got others in rows {int(ids[0])} to {int(ids[-1])}; "
            "run `sae verify` on the cache and check the dictionary"
        )
    fires = latents.values != 0
    row, latent = fires.nonzero()[:, 0].cpu().numpy(), latents.indices[fires].cpu().numpy()
    value = latents.values[fires].float().cpu().numpy()
    # NumPy sorts 16-bit integers by radix, which is several times faster.
    narrow = latent.astype(np.uint16 if dictionary.config.d_sae <= 1 << 16 else np.uint32)
    order = np.argsort(narrow, kind="stable")
    return ChunkFirings(row[order], latent[order], value[order])


class _FiringChunk(NamedTuple):
    n_fired: np.ndarray
    row: np.ndarray
    value: np.ndarray


def _merged(chunks: list[_FiringChunk], d_sae: int, n_rows: int) -> Codes:
    """Put every chunk's run of a latent behind the runs of the chunks before it."""
    n_fired = np.zeros(d_sae, np.int64)
    for chunk in chunks:
        n_fired += chunk.n_fired
    row = np.empty(n_fired.sum(), np.int32)
    value = np.empty(n_fired.sum(), np.float32)
    free = np.cumsum(n_fired) - n_fired
    chunks.reverse()
    while chunks:  # each is given up as soon as it is copied: that halves the peak
        chunk = chunks.pop()
        place = concatenated_ranges(free, chunk.n_fired)
        row[place] = chunk.row
        value[place] = chunk.value
        free += chunk.n_fired
    return Codes(n_fired, row, value, n_rows)


_LATENTS_AT_ONCE = 512


class CofiringPairs(NamedTuple):
    """A latent that fires where another one fires."""

    latent: int
    """Its number."""
    correlation: float
    """Phi: the Pearson correlation of firing, 1 or 0, over rows; chance gives 0 at any density."""
    n_rows: int
    """Rows on which both fire."""


def cofiring(
    codes: Codes, k: int, *, least: int = 5, progress: Progress | None = None
) -> list[tuple[CofiringPairs, ...]]:
    """For every latent the k others whose firing correlates most with its own, best first.

    Args:
        codes: Firings on a sample of rows.
        k: How many at most; only positive correlations count.
        least: Rows on which both must fire: fewer say nothing.
        progress: Called after each chunk of latents.
    """
    report = progress or silent
    start = np.append(codes.start, len(codes.row))
    ones = np.ones(len(codes.row), np.float32)  # counts below 2^24 stay exact
    fires = sparse.csr_array((ones, codes.row, start), shape=(codes.d_sae, codes.n_rows))
    by_row = sparse.csr_array(fires.T)
    results: list[tuple[CofiringPairs, ...]] = []
    for first in range(0, codes.d_sae, _LATENTS_AT_ONCE):
        both = sparse.csr_array(fires[first : first + _LATENTS_AT_ONCE] @ by_row)
        for place in range(len(both.indptr) - 1):
            entries = slice(both.indptr[place], both.indptr[place + 1])
            counts = both.data[entries].astype(np.int64)
            results.append(_best(codes, first + place, both.indices[entries], counts, k, least))
        report(len(results), codes.d_sae, "latents' co-firing")
    return results


def _best(
    codes: Codes, latent: int, others: np.ndarray, both: np.ndarray, k: int, least: int
) -> tuple[CofiringPairs, ...]:
    keep = (both >= least) & (others != latent)
    others, both = others[keep], both[keep].astype(np.float64)
    n, n_fired, theirs = codes.n_rows, float(codes.n_fired[latent]), codes.n_fired[others]
    spread = n_fired * (n - n_fired) * theirs * (n - theirs)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.where(spread > 0, (n * both - n_fired * theirs) / np.sqrt(spread), 0.0)
    order = np.lexsort((others, -phi))[:k]
    order = order[phi[order] > 0]
    return tuple(CofiringPairs(int(others[i]), float(phi[i]), int(both[i])) for i in order)


CAUTION = (
    "That a latent exists which fires on such texts says nothing about what the model does, knows "
    "or intends: with enough latents some fire on anything."
)
"""To be shown beside every result of a search for safety-relevant latents."""


class MaxCorrelation:
    """Largest |Pearson correlation| of each latent with any of some units, over streamed rows."""

    def __init__(self, d_sae: int, n_units: int) -> None:
        """Start with no rows; memory is d_sae x n_units."""
        self._n = 0
        self._sums = [torch.zeros(n, dtype=torch.float64) for n in (d_sae, d_sae, n_units, n_units)]
        self._cross = torch.zeros(d_sae, n_units, dtype=torch.float64)
        self._middles: tuple[Tensor, ...] = ()

    def update(
        self, acts: Float[Tensor, "batch d_sae"], units: Float[Tensor, "batch d_model"]
    ) -> None:
        """Add rows."""
        given = (acts.float(), units.float())
        if self._n == 0:  # taken off all rows, so that float32 holds the products
            self._middles = tuple(values.mean(dim=0) for values in given)
        a, u = (values - middle for values, middle in zip(given, self._middles, strict=True))
        self._n += len(a)
        terms = (a.double().sum(0), a.double().square().sum(0))
        terms += (u.double().sum(0), u.double().square().sum(0))
        self._sums = [known + term for known, term in zip(self._sums, terms, strict=True)]
        self._cross += a.T @ u

    def compute(self) -> Float[Tensor, " d_sae"]:
        """The largest for each latent; nan where the latent or all units are constant."""
        a, aa, u, uu = self._sums
        spread_a, spread_u = self._n * aa - a.square(), self._n * uu - u.square()
        spread = (spread_a.clamp_min(0)[:, None] * spread_u.clamp_min(0)[None, :]).sqrt()
        correlation = (self._n * self._cross - a[:, None] * u[None, :]) / spread
        result = correlation.abs().nan_to_num(nan=-1.0, posinf=-1.0).amax(dim=1)
        return torch.where(result >= 0, result, torch.nan).float()


SMALL = 0.3
"""A latent whose largest correlation with a unit is at most this stands for something else."""
_LARGEST = 1 << 25  # latents x units of which sums are held at once


def summary_of_largest(correlation: Float[Tensor, " d_sae"]) -> dict[str, float]:
    """Median and share of small ones over the latents that have one; empty if none has."""
    known = correlation[torch.isfinite(correlation)]
    if not len(known):
        return {}
    small = float((known <= SMALL).float().mean())
    return {"median": float(known.median()), "share_at_most_0.3": small, "n": len(known)}


def before(hook_point: str, among: Sequence[str]) -> tuple[str, ...]:
    """The hook points of blocks before this one's, and what lies inside its own before its end.

    Blocks go by the first number in a name, such as 15 in "model.layers.15.mlp.act_fn:out".
    """
    block = _block(hook_point)
    is_end = bool(re.fullmatch(r"\D*\d+:out", hook_point))
    places = [(point, _block(point)) for point in among if point != hook_point]
    return tuple(
        point
        for point, of in places
        if block is not None and of is not None and (of < block or (of == block and is_end))
    )


def _block(hook_point: str) -> int | None:
    number = re.search(r"\d+", hook_point)
    return None if number is None else int(number[0])


def neurons_before(model: nn.Module, hook_point: str, d_model: int) -> tuple[str, ...]:
    """The neurons of all earlier layers: what goes into a matrix that leads back to the stream.

    Args:
        model: The model.
        hook_point: Whose earlier layers.
        d_model: Width of the stream; a layer has more neurons than that.
    """
    names = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            # GPT-2's layers hold their matrices the other way round
            n_out, n_in = weight.shape[::-1] if hasattr(module, "nf") else weight.shape
            is_embedding = isinstance(module, nn.Embedding)
            if n_out == d_model < n_in and not is_embedding and "expert" not in name:
                names.append(f"{name}:in")
    return before(hook_point, names)


@torch.no_grad()
def correlate_with_neurons(
    model: nn.Module,
    placed: SparseAutoencoder,
    texts: Sequence[Int[Tensor, " _"]],
    points: Sequence[str],
    skipped: int = 0,
    progress: Progress | None = None,
) -> Float[Tensor, " d_sae"]:
    """Each latent's largest |correlation| with a unit of any of these hook points, over texts.

    Args:
        model: Is run on each text, once for as many hook points as memory allows.
        placed: The dictionary, which reads one hook point.
        texts: Token ids.
        points: Hook points.
        skipped: Positions at the start of a text that do not count.
        progress: Called after each text.
    """
    device, d_sae = next(model.parameters()).device, placed.config.d_sae
    largest, done = torch.full((d_sae,), -1.0), 0
    with capture(model, list(points)) as run:
        widths = {p: x.shape[-1] for p, x in run(texts[0][None].to(device)).items()}
    at_once = max(1, _LARGEST // (d_sae * max(widths.values())))
    groups = [points[i : i + at_once] for i in range(0, len(points), at_once)]
    for group in groups:
        meters = {point: MaxCorrelation(d_sae, widths[point]) for point in group}
        for ids in texts:
            with capture(model, [placed.hook_point, *group]) as run:
                streams = {p: x[0, skipped:].float() for p, x in run(ids[None].to(device)).items()}
            acts = placed.encode_dense(streams[placed.hook_point]).cpu()
            for point, meter in meters.items():
                meter.update(acts, streams[point].cpu())
            done += 1
            (progress or silent)(done, len(groups) * len(texts), "texts with neurons")
        for meter in meters.values():
            largest = torch.maximum(largest, meter.compute().nan_to_num(nan=-1.0))
    return torch.where(largest >= 0, largest, torch.nan)

"""How well dictionaries reconstruct rows, and how often their latents fire: one pass over rows.

Description length: how many bits a row's activations take, and what the rounding costs.

Meta-dictionaries: whether a dictionary's directions are sums of fewer directions.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.reader import ActivationCache
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.metrics import FVU, Agreement, Firing, L0Histogram, fvu

L0_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the rows' L0, in a report."""

N_WORST = 8
"""Dimensions that a report names."""

ROWS_PER_CHUNK = 4096
"""Rows that are encoded at once where the caller does not say."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How well a dictionary reconstructs a set of rows (the definitions are in `sae.metrics`)."""

    n_rows: int
    """Rows that were reconstructed."""
    fvu: float
    """Fraction of variance unexplained, centred per dimension over these rows."""
    fvu_uncentred: float
    """Squared error over squared norm."""
    cosine: float
    """Mean cosine of a row and its reconstruction."""
    norm_ratio: float
    """Mean of ||x_hat|| / ||x||."""
    relative_bias: float
    """E ||x_hat||^2 / E <x, x_hat>; below 1 where reconstructions are too short."""
    l0: float
    """Mean number of latents that fire in a row."""
    l0_quantiles: dict[str, int]
    """The same at the quantiles L0_QUANTILES."""
    fvu_per_hook_point: dict[str, float] = field(default_factory=dict)
    """The FVU of each hook point's part, where several are predicted."""
    worst_dimensions: dict[str, float] = field(default_factory=dict)
    """FVU of the N_WORST dimensions that are reconstructed worst, by number, the worst first."""


@dataclass(frozen=True, kw_only=True)
class FiringSummary:
    """How often the latents of a dictionary fire."""

    n_rows: int
    """Rows that were encoded."""
    d_sae: int
    """Latents."""
    n_dead: int
    """Latents that fired in none of these rows."""
    dead_fraction: float
    """n_dead / d_sae."""
    dead_density_bound: float
    """3 / n_rows: with 95 % confidence a silent latent fires in fewer rows than this share."""
    density_edges: tuple[float, ...]
    """Edges of the histogram: powers of ten up to 1."""
    density_histogram: tuple[int, ...]
    """Latents that fire in a share of the rows from one edge up to the next; dead ones excepted."""


class ReconstructionFigures(NamedTuple):
    """What one pass over rows tells of a dictionary."""

    reconstruction: Reconstruction
    """How well it reconstructs them."""
    firing: Firing
    """How often its latents fire in them."""


@torch.no_grad()
def measure_reconstruction(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    rows: Int[Tensor, " row"],
    *,
    rows_per_chunk: int = ROWS_PER_CHUNK,
    progress: Progress | None = None,
) -> dict[str, ReconstructionFigures]:
    """Reconstruct rows with several dictionaries, reading each row once.

    A dictionary reads and predicts the hook points that it records.

    Args:
        dictionaries: By name; each on its device.
        cache: Where the rows are.
        hook_point: Which stream, for dictionaries that record none.
        rows: Row numbers, such as `cache.rows(("hold",))`.
        rows_per_chunk: Rows at once; the figures do not depend on it.
        progress: Called after each chunk.

    Raises:
        ValueError: If a dictionary is not as wide as the rows.
    """
    _require_width(dictionaries, cache, hook_point)
    sums = {name: _ReconstructionSums(dictionary) for name, dictionary in dictionaries.items()}
    where = {name: d.config.hook_points_or(hook_point) for name, d in dictionaries.items()}
    points = [point for of in where.values() for side in of for point in side]
    for x in _chunks(cache, points, rows, rows_per_chunk, progress or silent):
        for name, of_one in sums.items():
            of_one.update(*(_concatenated(x, side) for side in where[name]))
    return {name: of_one.result() for name, of_one in sums.items()}


@torch.no_grad()
def firing_statistics(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    rows: Int[Tensor, " row"],
    *,
    rows_per_chunk: int = ROWS_PER_CHUNK,
    progress: Progress | None = None,
) -> dict[str, Firing]:
    """Count how often each latent fires, and its largest activation, reading each row once.

    The result is what steering takes as its unit: `Firing.save` writes it beside the dictionary.
    The arguments are those of `measure_reconstruction`.

    Raises:
        ValueError: If a dictionary is not as wide as the rows.
    """
    firing = {name: Firing(d.config.d_sae) for name, d in dictionaries.items()}
    _require_width(dictionaries, cache, hook_point)
    where = {name: d.config.hook_points_or(hook_point)[0] for name, d in dictionaries.items()}
    points = [point for read in where.values() for point in read]
    for x in _chunks(cache, points, rows, rows_per_chunk, progress or silent):
        for name, dictionary in dictionaries.items():
            rows_read = _concatenated(x, where[name]).to(dictionary.dec_rows.device)
            firing[name].update(dictionary.encode(rows_read))
    return firing


def summary(firing: Firing) -> FiringSummary:
    """What a report says of the firing statistics of a dictionary."""
    fired = firing.n_fired[firing.n_fired > 0]
    decades = max(1, math.ceil(math.log10(max(firing.n_rows, 10))))
    # In whole numbers, so that a density on an edge falls into the class above it.
    at_least = [int((fired * 10**power >= firing.n_rows).sum()) for power in range(decades, 0, -1)]
    counts = [lower - upper for lower, upper in itertools.pairwise([*at_least, 0])]
    return FiringSummary(
        n_rows=firing.n_rows,
        d_sae=len(firing.n_fired),
        n_dead=firing.n_dead,
        dead_fraction=firing.dead_fraction,
        dead_density_bound=firing.dead_density_bound,
        density_edges=tuple(10.0**-power for power in range(decades, -1, -1)),
        density_histogram=tuple(counts),
    )


def _chunks(
    cache: ActivationCache,
    hook_points: Iterable[str],
    rows: Int[Tensor, " row"],
    rows_per_chunk: int,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """Rows by hook point, each read once."""
    sources = {point: cache[point] for point in hook_points}
    for start in range(0, len(rows), rows_per_chunk):
        numbers = rows[start : start + rows_per_chunk]
        yield {point: source[numbers] for point, source in sources.items()}
        progress(min(start + rows_per_chunk, len(rows)), len(rows), "rows")


def _concatenated(x: Mapping[str, Tensor], hook_points: Sequence[str]) -> Float[Tensor, "row _"]:
    parts = [x[point] for point in hook_points]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _require_hook_points(name: str, config: SAEConfig, cache: ActivationCache) -> None:
    """Refuse recorded hook points that the cache has not, or has in another width."""
    for part in (*config.inputs, *config.outputs):
        known = part.hook_point in cache.hook_points
        width = cache.d_model(part.hook_point) if known else None
        if width != part.width:
            has = ", ".join(f"{point} ({cache.d_model(point)})" for point in cache.hook_points)
            raise MonosemaError(
                f"dictionary {name!r} must have hook points of the cache, which are {has}, got "
                f"{part.hook_point} ({part.width}); build a cache with it"
            )


def _require_width(
    dictionaries: Mapping[str, SparseAutoencoder], cache: ActivationCache, hook_point: str
) -> None:
    d_model = cache.d_model(hook_point)
    for name, dictionary in dictionaries.items():
        if dictionary.config.inputs:
            _require_hook_points(name, dictionary.config, cache)
        elif dictionary.config.d_in != d_model or dictionary.config.width_out != d_model:
            raise MonosemaError(
                f"dictionary {name!r} must have d_in = d_out = {d_model}, the width of {hook_point}"
                f", got {dictionary.config.d_in} and {dictionary.config.width_out}"
            )


class _ReconstructionSums:
    """The streaming metrics of one dictionary."""

    def __init__(self, dictionary: SparseAutoencoder) -> None:
        self._dictionary = dictionary
        self._fvu, self._agreement, self._l0 = FVU(), Agreement(), L0Histogram()
        self._firing = Firing(dictionary.config.d_sae)
        parts = dictionary.config.slices_out
        self._parts = {part.hook_point: FVU() for part in parts} if len(parts) > 1 else {}

    def update(self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]) -> None:
        """Add rows, and those that are predicted."""
        x, target = (rows.to(self._dictionary.dec_rows.device) for rows in (x, target))
        latents = self._dictionary.encode(x)
        x_hat = self._dictionary.decode(latents, x)
        self._fvu.update(target, x_hat)
        self._agreement.update(target, x_hat)
        widths = [part.width for part in self._dictionary.config.slices_out]
        for part, *pair in zip(
            self._parts.values(), target.split(widths, 1), x_hat.split(widths, 1), strict=False
        ):
            part.update(*pair)
        self._l0.update(latents.values)
        self._firing.update(latents)

    def result(self) -> ReconstructionFigures:
        """The figures over all rows."""
        reconstruction = Reconstruction(
            n_rows=self._fvu.n_rows,
            fvu=self._fvu.compute(),
            fvu_uncentred=self._fvu.compute_uncentred(),
            cosine=self._agreement.cosine,
            norm_ratio=self._agreement.norm_ratio,
            relative_bias=self._agreement.relative_bias,
            l0=self._l0.mean,
            fvu_per_hook_point={name: part.compute() for name, part in self._parts.items()},
            l0_quantiles={str(share): self._l0.quantile(share) for share in L0_QUANTILES},
            worst_dimensions=_worst(self._fvu.per_dimension()),
        )
        return ReconstructionFigures(reconstruction, self._firing)


def _worst(fvu: Float[Tensor, " d_out"]) -> dict[str, float]:
    """The largest that are finite: a dimension that does not vary has no figure."""
    order = fvu.masked_fill(~fvu.isfinite(), -math.inf).argsort(descending=True, stable=True)
    worst = order[:N_WORST].tolist()
    return {str(i): float(fvu[i]) for i in worst if math.isfinite(float(fvu[i]))}


@dataclass(frozen=True, kw_only=True)
class DescriptionLength:
    """Bits per row of a code, at the fidelity that its rounding leaves."""

    step: float
    """What activations were rounded to multiples of."""
    bits: float
    """Entropy of the rounded activations, summed over latents as if they were independent."""
    fvu: float
    """Of what is decoded from the rounded activations."""


@torch.no_grad()
def description_length(
    dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"], step: float
) -> DescriptionLength:
    """Entropy of the latents' rounded activations (Ayonrinde et al. 2024, arXiv 2410.11179).

    Compare dictionaries at equal FVU: a coarser step always takes fewer bits. The entropies are
    those of the sample, which are too low where latents fire in few rows.

    Raises:
        ValueError: If step is not above 0 or there is no row.
    """
    if step <= 0 or len(x) == 0:
        raise MonosemaError(f"step must be above 0 and x have rows, got {step} and {len(x)} rows")
    acts = dictionary.encode_dense(x)
    level = (acts / step).round()
    fvu = FVU()
    fvu.update(x, dictionary.decode(level * step, x))
    bits = float(entropies(level.long()).sum())
    return DescriptionLength(step=step, bits=bits, fvu=fvu.compute())


def entropies(level: Int64[Tensor, "row d_sae"]) -> Float64[Tensor, " d_sae"]:
    """Entropy of each column in bits."""
    ordered = level.sort(dim=0).values.T  # (d_sae, row)
    n = ordered.shape[1]
    result = torch.zeros(len(ordered), dtype=torch.float64)
    for i, column in enumerate(ordered):
        share = torch.unique_consecutive(column, return_counts=True)[1].double() / n
        result[i] = -(share * share.log2()).sum()
    return result


BATCH = 256
"""Directions in a step."""


@dataclass(frozen=True, kw_only=True)
class MetaScore:
    """How much of the decoder's rows a small dictionary of them explains."""

    explained: float
    """1 - FVU of the unit decoder rows."""
    chance: float
    """The same of as many random unit directions, by a dictionary trained the same way."""


def meta_score(
    dec_rows: Float[Tensor, "d_sae d_model"],
    *,
    d_meta: int | None = None,
    k: int = 4,
    steps: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> MetaScore:
    """Train a dictionary of a dictionary (Leask et al. 2025, arXiv 2502.04878; SAEBench).

    A high share beside a low chance says that latents are composed of common parts.

    Args:
        dec_rows: Decoder rows; their norms do not matter.
        d_meta: Meta-latents; a quarter of d_sae when absent.
        k: Meta-latents in each direction.
        steps: Of Adam, for each of the two dictionaries.
        seed: Decides first weights, order and random directions.
        progress: Called with the unit "steps".

    Raises:
        ValueError: If there are too few directions for k meta-latents.
    """
    width = len(dec_rows) // 4 if d_meta is None else d_meta
    if not 1 <= k <= width:
        raise MonosemaError(f"k must be in 1..{width}, the number of meta-latents, got {k}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dec_rows.shape, generator=generator)
    results = []
    for part, rows in enumerate((dec_rows.detach(), drawn)):
        unit = torch.nn.functional.normalize(rows.float().cpu())
        tell = _shifted(progress or silent, part * steps, 2 * steps)
        meta = train_meta(unit, SAEConfig(d_in=unit.shape[1], d_sae=width, activation=TopK(k=k)),
                          steps, generator, tell)  # fmt: skip
        with torch.no_grad():
            results.append(1 - fvu(unit, meta(unit)))
    return MetaScore(explained=results[0], chance=results[1])


def train_meta(
    rows: Float[Tensor, "d_sae d_model"],
    config: SAEConfig,
    steps: int,
    generator: torch.Generator,
    progress: Progress,
) -> SparseAutoencoder:
    """A small loop of its own, as evaluation does not know training: Adam, decaying to 0."""
    meta = SparseAutoencoder(config)
    initialise(meta, generator, mean=rows.mean(dim=0))
    adam = torch.optim.Adam(meta.parameters(), lr=3e-3)
    for step in range(steps):
        x = rows[torch.randint(len(rows), (min(BATCH, len(rows)),), generator=generator)]
        loss = (meta(x) - x).square().sum(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
        adam.step()
        progress(step + 1, steps, "steps")
    return meta.requires_grad_(False)


def _shifted(progress: Progress, done_before: int, total: int) -> Progress:
    return lambda done, _, unit: progress(done_before + done, total, unit)

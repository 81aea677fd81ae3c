"""How alike sets of rows are: caches, hook points, layers of a model, dictionaries' latents."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from jaxtyping import Float, Float64, Int, Int64
from matplotlib.figure import Figure
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.manifest import MANIFEST
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.config import ConfigError
from sae.evaluate.geometry import RowsShape, shape_of
from sae.evaluate.probe_tasks import check_hook_point
from sae.evaluate.report import write_record
from sae.evaluate.spaces import MEASURES, Draws, MeasureName, Similarity, compare
from sae.run.context import (
    CacheOrPath,
    DictionaryOrPath,
    Section,
    Steps,
    fitted,
    holds_images,
    opened,
    silent_steps,
    steps_to,
    wrong_class,
)
from sae.run.measuring import short_names

Target = ActivationCache | DictionaryOrPath
"""A cache or its path, alone or as CACHE::HOOK_POINT; or a dictionary."""
Pool = Literal["row", "example"]

PAIR, SPACE = "::", " "
SHOWN_PAIRS = 6
"""So many pairs have every figure on the screen; of more, the file and the picture hold them."""
FILE, PICTURE = "similar.json", "similar.png"


class SimilarRequest(NamedTuple):
    """What is compared, and how."""

    targets: tuple[Target, ...]
    cache: ActivationCache | str | Path | None = None
    """What dictionaries are read on."""
    rows: int = 2000
    measures: tuple[MeasureName, ...] = MEASURES
    permutations: int = 200
    draws: int = 200
    neighbours: int = 10
    pool: Pool = "row"
    """Whether single rows are compared, or the mean row of each example."""
    seed: int = 0


class SpaceSimilarity(NamedTuple):
    """Every pair of sets by every measure."""

    spaces: dict[str, RowsShape]
    """The shape of each set."""
    constant: dict[str, int]
    """Columns of a dictionary that are the same in all rows, and left out."""
    pairs: dict[tuple[str, str], dict[str, Similarity]]
    """By the names of both sets, then by measure; a measure that the rows do not allow is absent.
    """
    notes: tuple[str, ...]
    """What was left out and why, a line each."""
    n_rows: int

    def matrix(self, measure: str) -> Float64[Tensor, "space space"]:
        """The values of a measure, 1 on the diagonal, nan where there is none."""
        names = list(self.spaces)
        result = torch.full((len(names), len(names)), math.nan, dtype=torch.float64)
        result.fill_diagonal_(1)
        for (a, b), by_measure in self.pairs.items():
            if measure in by_measure:
                i, j = names.index(a), names.index(b)
                result[i, j] = result[j, i] = by_measure[measure].value
        return result

    @property
    def sections(self) -> list[Section]:
        """The pairs, then the sets."""
        return [_pairs_section(self), _spaces_section(self)]

    @property
    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "rows": self.n_rows,
            "spaces": {
                name: {**one._asdict(), "constant": self.constant[name]}
                for name, one in self.spaces.items()
            },
            "pairs": [
                {"a": a, "b": b, "measure": measure, **asdict(figure)}
                for (a, b), by_measure in self.pairs.items()
                for measure, figure in by_measure.items()
            ],
            "notes": self.notes,
        }

    def write(self, out: Path) -> dict[str, Path]:
        """Write all figures and a heat map of each measure; returns the files by their kind."""
        out.mkdir(parents=True, exist_ok=True)
        files = {"figures": out / FILE, "picture": out / PICTURE}
        write_record(files["figures"], self.record)
        draw(self, files["picture"])
        return files


def similar(  # noqa: PLR0913
    *targets: Target,
    cache: ActivationCache | str | Path | None = None,
    rows: int = 2000,
    measures: Sequence[MeasureName] = MEASURES,
    permutations: int = 200,
    draws: int = 200,
    neighbours: int = 10,
    pool: Pool = "row",
    seed: int = 0,
    progress: Progress = silent,
) -> SpaceSimilarity:
    """Hold sets of rows of the same examples against each other, pair by pair.

    Args:
        *targets: Caches (all their hook points), "CACHE::HOOK_POINT", or dictionaries, whose
            latents are compared.
        cache: What dictionaries are read on.
        rows: So many rows at most, from as many examples as there are.
        measures: Which of `sae.evaluate.spaces.MEASURES`.
        permutations: Exchanges of the rows for the null; of the costly measures 19 at most.
        draws: Resamples of the examples for the intervals.
        neighbours: Of cknna.
        pool: "example" compares the mean rows of examples, such as images that two models cut
            into other patches.
        seed: Decides rows, permutations and resamples.
        progress: Called in every step.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the caches hold other rows, or in another order, or a column is constant.
    """
    request = SimilarRequest(
        targets, cache, rows, tuple(measures), permutations, draws, neighbours, pool, seed
    )
    return similar_spaces(request, steps_to(progress))


def similar_spaces(request: SimilarRequest, steps: Steps = silent_steps) -> SpaceSimilarity:
    """Read what a request names, and compare."""
    if unknown := [name for name in request.measures if name not in MEASURES]:
        raise ConfigError(f"measures must be among {', '.join(MEASURES)}, got {unknown[0]!r}")
    with steps("read") as progress:
        read, constant, example = _read(request, progress)
    draws = Draws.of(example, request.permutations, request.draws, request.seed)
    with steps("shape") as progress:
        spaces = {}
        for name, x in read.items():
            spaces[name] = shape_of(x)
            progress(len(spaces), len(read), "sets of rows")
    names, notes = list(read), []
    numbers = list(combinations(range(len(names)), 2))
    pairs: dict[tuple[str, str], dict[str, Similarity]] = {
        (names[a], names[b]): {} for a, b in numbers
    }
    for measure in request.measures:
        with steps(measure) as progress:
            figures, problems = compare(
                read, numbers, measure, draws, k=request.neighbours, progress=progress
            )
        if problems:
            notes.append(f"{measure} is left out for {len(problems)} pairs: {problems[0]}")
        for (a, b), figure in figures.items():
            pairs[names[a], names[b]][measure] = figure
    return SpaceSimilarity(spaces, constant, pairs, tuple(notes), len(example))


class _Side(NamedTuple):
    """Where the rows of one set come from."""

    name: str
    cache: ActivationCache
    hook_points: tuple[str, ...]
    dictionary: SparseAutoencoder | None


def _read(
    request: SimilarRequest, report: Progress
) -> tuple[dict[str, Tensor], dict[str, int], Int[Tensor, " row"]]:
    """The rows of every set, its constant columns, and the example of each row."""
    sides = _sides(request)
    if len(sides) < 2:
        raise ConfigError(f"there must be two sets of rows to compare, got {len(sides)}")
    first = sides[0].cache
    for side in sides[1:]:
        _require_same_rows(first, side.cache, request.pool)
    places = _chosen(first, request)
    read, constant = {}, {}
    for done, side in enumerate(sides, start=1):
        x = _rows_of(side, first, places, request.pool)
        if not bool(x.isfinite().all()):
            raise MonosemaError(f"{side.name} must be finite, got nan or inf; leave such rows out")
        varies = x.amax(dim=0) > x.amin(dim=0)
        constant[side.name] = int((~varies).sum())
        if side.dictionary is None and not bool(varies.all()):
            raise MonosemaError(
                f"{side.name} must vary in every column, got {constant[side.name]} constant ones, "
                f"the first {int((~varies).nonzero()[0])}; take more rows or another hook point"
            )
        if not bool(varies.any()):
            raise MonosemaError(f"{side.name} must fire on some row, got none; take more rows")
        read[side.name] = x[:, varies]
        report(done, len(sides), "sets of rows")
    example = first.refs(places).example if request.pool == "row" else places
    return read, constant, example


def _sides(request: SimilarRequest) -> list[_Side]:
    sides = []
    for name, target in zip(_names(request.targets), request.targets, strict=True):
        if isinstance(target, str | Path) and PAIR in str(target):
            path, _, hook_point = str(target).partition(PAIR)
            cache = opened(path)
            check_hook_point(cache, hook_point)
            sides.append(_Side(name, cache, (hook_point,), None))
        elif _is_cache(target):
            cache = opened(target)
            alone = len(request.targets) == 1
            sides += [
                _Side(point if alone else f"{name}{SPACE}{point}", cache, (point,), None)
                for point in cache.hook_points
            ]
        elif isinstance(target, SparseAutoencoder | str | Path):
            if request.cache is None:
                raise ConfigError(f"--cache must be given for a dictionary, got none for {name}")
            cache = opened(request.cache)
            one = fitted(target, cache)
            sides.append(_Side(name, cache, one.inputs, one.dictionary))
        else:
            raise wrong_class("targets", "be caches or dictionaries", target, "or their paths")
    return sides


def _names(targets: Sequence[Target]) -> list[str]:
    paths = [str(t) for t in targets if isinstance(t, str | Path)]
    ends = iter(short_names(paths))
    return [
        next(ends) if isinstance(target, str | Path) else f"set {number}"
        for number, target in enumerate(targets, start=1)
    ]


def _is_cache(target: Target) -> TypeGuard[CacheOrPath]:
    is_path = isinstance(target, str | Path)
    return isinstance(target, ActivationCache) or (is_path and (Path(target) / MANIFEST).is_file())


def _require_same_rows(a: ActivationCache, b: ActivationCache, pool: Pool) -> None:
    """Refuse caches of other examples, rows or another order.

    Raises:
        ValueError: If they are not of the same.
    """
    if a is b or a.fingerprint == b.fingerprint:
        return
    where = f"{a.path} and {b.path} must hold the same rows in the same order, got"
    advice = "; build both from the same data with the same settings"
    if holds_images(a) != holds_images(b):
        raise MonosemaError(f"{where} images in one and texts in the other{advice}")
    if holds_images(a):
        images = [cache.identity["images"]["table_sha256"] for cache in (a, b)]
        if images[0] != images[1]:
            raise MonosemaError(f"{where} other images or another order{advice}")
        if pool == "example":
            return
    refs = [cache.refs(cache.rows()) for cache in (a, b)]
    if len(refs[0].example) != len(refs[1].example):
        n = [f"{len(one.example):,}" for one in refs]
        raise MonosemaError(f"{where} {n[0]} and {n[1]} rows{advice}")
    for field in refs[0]._fields:
        one, other = (getattr(ref, field) for ref in refs)
        if len(differs := (one != other).nonzero()):
            at = int(differs[0])
            raise MonosemaError(
                f"{where} {field} {int(one[at])} and {int(other[at])} in row {at}{advice}"
            )


def _chosen(cache: ActivationCache, request: SimilarRequest) -> Int64[Tensor, " row"]:
    """Row numbers, of as many examples as there are; or numbers of examples."""
    generator = torch.Generator().manual_seed(request.seed)
    rows = cache.rows()
    example = cache.refs(rows).example
    if request.pool == "example":
        known = example.unique()
        return known[torch.randperm(len(known), generator=generator)[: request.rows]].sort().values
    order = torch.randperm(len(rows), generator=generator)
    order = order[example[order].argsort(stable=True)]
    counts = torch.bincount(example)
    turn = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[example[order]]
    keys = turn + torch.rand(len(rows), generator=generator)  # first one row of each example
    return rows[order[keys.argsort()[: request.rows]]].sort().values


@torch.no_grad()
def _rows_of(
    side: _Side, first: ActivationCache, places: Int[Tensor, " row"], pool: Pool
) -> Float[Tensor, "row _"]:
    cache = side.cache
    if pool == "example":
        numbers = cache.rows()
        example = cache.refs(numbers).example
        parts = [_encoded(side, numbers[example == one]).mean(dim=0) for one in places]
        return torch.stack(parts)
    if cache is not first:  # shards may be of another size, so rows are counted, not numbered
        places = cache.rows()[torch.searchsorted(first.rows(), places)]
    return _encoded(side, places)


def _encoded(side: _Side, rows: Int[Tensor, " row"]) -> Float[Tensor, "row _"]:
    x = torch.cat([side.cache[point][rows] for point in side.hook_points], dim=1)
    return x if side.dictionary is None else side.dictionary.encode_dense(x)


def _pairs_section(similarity: SpaceSimilarity) -> Section:
    columns = ("a", "b", "measure", "value", "95 %", "chance", "p")
    shown = list(similarity.pairs.items())[:SHOWN_PAIRS]
    rows = [
        (
            a,
            b,
            measure,
            f"{one.value:.3f}",
            f"{one.low:.3f}..{one.high:.3f}",
            f"{one.chance:.3f}..{one.chance_high:.3f}",
            f"{one.p:.3f}",
        )
        for (a, b), by_measure in shown
        for measure, one in by_measure.items()
    ]
    note = (
        f"{similarity.n_rows:,} rows; larger is more alike (procrustes: 1 - half the distance; "
        "pwcca weighs by a); 95 %: bootstrap over examples, to first order; chance: mean and 95 % "
        "quantile with the rows of b exchanged; p: the share of exchanges that reach the value"
    )
    if len(similarity.pairs) > len(shown):
        note += f"; the first {len(shown)} of {len(similarity.pairs):,} pairs"
    note = "; ".join([note, *similarity.notes])
    return Section("similarity", ResultTable(columns, tuple(rows), note))


def _spaces_section(similarity: SpaceSimilarity) -> Section:
    columns = ("rows of", "width", "RankMe", "dimension", "kurtosis", "outliers")
    rows = [
        (
            name,
            f"{one.width:,}" + (f" (+{n:,} constant)" if n else ""),
            f"{one.rankme:.1f}",
            "-" if math.isnan(one.dimension) else f"{one.dimension:.1f}",
            f"{one.kurtosis:.2f}",
            "-" if one.outliers is None else str(one.outliers),
        )
        for (name, one), n in zip(
            similarity.spaces.items(), similarity.constant.values(), strict=True
        )
    ]
    note = (
        "RankMe: effective rank of the rows as they are; dimension: TwoNN; kurtosis: median over "
        "columns, 3 for a Gaussian; outliers: columns of 6 times the median root mean square"
    )
    return Section("shape", ResultTable(columns, tuple(rows), note))


def draw(similarity: SpaceSimilarity, path: Path) -> None:
    """Draw a heat map of each measure, all with one scale from 0 to 1."""
    measures = list(dict.fromkeys(m for figures in similarity.pairs.values() for m in figures))
    names, n_columns = list(similarity.spaces), min(4, max(1, len(measures)))
    n_rows = max(1, math.ceil(len(measures) / n_columns))
    figure = Figure(figsize=(4 * n_columns, 3.8 * n_rows), dpi=120, layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axis in axes[len(measures) :]:
        axis.axis("off")
    for axis, measure in zip(axes, measures, strict=False):
        image = axis.imshow(similarity.matrix(measure).numpy(), vmin=0, vmax=1, cmap="viridis")
        axis.set_title(measure, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks(range(len(names)), names, fontsize=6)
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.savefig(path)

"""What `sae similar` holds against each other: sets of rows of the same examples, by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeGuard

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress
from activations_cache.config import ModelConfig
from activations_cache.manifest import MANIFEST
from activations_cache.towers import load_towers
from sae.autoencoder import SparseAutoencoder
from sae.config import ConfigError
from sae.evaluate.probe_tasks import check_hook_point, labels_of, read_labels
from sae.evaluate.report import held_out_rows
from sae.evaluate.spaces import MEASURES, MeasureName
from sae.run.caches import captions_of
from sae.run.context import (
    CacheOrPath,
    DictionaryOrPath,
    fitted,
    holds_images,
    opened,
    recorded_model,
    wrong_class,
)
from sae.run.measuring import short_names

Target = ActivationCache | DictionaryOrPath
"""A cache or its path, alone or as CACHE::HOOK_POINT; CAPTIONS::TOWER; or a dictionary."""
Pool = Literal["row", "example"]

PAIR, SPACE = "::", " "


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
    check: bool = False
    """Whether each measure is checked on these sets."""
    model: bool = False
    """Whether each set is stitched into the place of the next, in the caches' model."""
    contexts: int = 24
    """Held-out contexts that stitched streams are read in."""
    labels: str | Path | None = None
    """Concepts of the rows: a file as `read_labels` takes it, or "cache" for the cache's own."""


class RowSet(NamedTuple):
    """Where the rows of one set come from."""

    name: str
    cache: ActivationCache
    hook_points: tuple[str, ...]
    dictionary: SparseAutoencoder | None
    rows: Float[Tensor, "example _"] | None = None
    """Of each example, where they come from no model of the cache."""


class ReadSets(NamedTuple):
    """The rows of every set, and what they are of."""

    rows: dict[str, Tensor]
    constant: dict[str, int]
    """Columns that were the same in all rows, and are left out."""
    example: Int[Tensor, " row"]
    concept: Int[Tensor, " row"] | None
    """Number of each row's label, -1 without one; None where none were asked for."""


def read_sets(sides: Sequence[RowSet], request: SimilarRequest, report: Progress) -> ReadSets:
    """Read them.

    Raises:
        ValueError: If the sides are of other rows, a column is constant, or of the rows there are
            fewer than two labels.
    """
    first = sides[0].cache
    for side in sides[1:]:
        _require_same_rows(first, side.cache, request.pool)
    places = _chosen(first, request)
    concept = _concepts(first, request, places)
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
    return ReadSets(read, constant, example, concept)


def _concepts(
    cache: ActivationCache, request: SimilarRequest, places: Int[Tensor, " row"]
) -> Int[Tensor, " row"] | None:
    """The label of each row, or of each example where these are compared."""
    if request.labels is None:
        return None
    is_own = request.labels == "cache"
    labels = labels_of(cache) if is_own else read_labels(request.labels, cache)
    is_row = request.pool == "row"
    found = labels.of(cache, places) if is_row else labels.label[places].amax(dim=1)
    n = len(found[found >= 0].unique())
    if n < 2:
        raise MonosemaError(
            f"the rows must have at least 2 labels of --labels {request.labels}, got {n}; give "
            "a file, or build the cache from labelled data"
        )
    return found


def row_sets(request: SimilarRequest) -> list[RowSet]:
    """What a request names, opened; no row is read yet.

    Raises:
        ValueError: If a target is none, or there are fewer than two sets.
    """
    sides: list[RowSet] = []
    for name, target in zip(_names(request.targets), request.targets, strict=True):
        if isinstance(target, str | Path) and PAIR in str(target):
            path, _, hook_point = str(target).partition(PAIR)
            if Path(path).is_file():
                sides.append(_captioned(name, path, hook_point, request))
                continue
            cache = opened(path)
            check_hook_point(cache, hook_point)
            sides.append(RowSet(name, cache, (hook_point,), None))
        elif _is_cache(target):
            cache = opened(target)
            alone = len(request.targets) == 1
            sides += [
                RowSet(point if alone else f"{name}{SPACE}{point}", cache, (point,), None)
                for point in cache.hook_points
            ]
        elif isinstance(target, SparseAutoencoder | str | Path):
            if request.cache is None:
                raise ConfigError(f"--cache must be given for a dictionary, got none for {name}")
            cache = opened(request.cache)
            one = fitted(target, cache)
            sides.append(RowSet(name, cache, one.inputs, one.dictionary))
        else:
            raise wrong_class("targets", "be caches or dictionaries", target, "or their paths")
    if len(sides) < 2:
        raise ConfigError(f"there must be two sets of rows to compare, got {len(sides)}")
    return sides


def require_models(sides: Sequence[RowSet], request: SimilarRequest) -> None:
    """Refuse, before anything slow, what cannot be stitched into a model.

    Raises:
        ValueError: If rows are means, nothing is held out, or a set is no place in a language
            model.
    """
    if request.pool != "row":
        raise ConfigError(f"--model must go with --pool row, got {request.pool}")
    for side in sides:
        held_out_rows(side.cache)
        is_place = side.dictionary is None and side.rows is None and not holds_images(side.cache)
        if not is_place or recorded_model(side.cache) is None:
            raise ConfigError(
                "--model must go with hook points of caches of texts that record their model, got "
                f"{side.name}; leave it out"
            )


def _captioned(name: str, path: str, tower: str, request: SimilarRequest) -> RowSet:
    """Captions of a cache's images, embedded by a tower for texts."""
    caches = [
        one for one in (*request.targets, request.cache) if one is not None and _is_cache(one)
    ]
    split = (str(one).partition(PAIR)[0] for one in request.targets if isinstance(one, str | Path))
    caches += [one for one in split if (Path(one) / MANIFEST).is_file()]
    images = next((cache for one in caches if holds_images(cache := opened(one))), None)
    if images is None or request.pool != "example":
        raise ConfigError(
            f"{path} must be captions of a cache of images that stands among the targets, with "
            f"--pool example, got --pool {request.pool} and {'no' if images is None else 'one'} "
            "such cache"
        )
    towers = load_towers(ModelConfig(path=tower, dtype="float32"))
    name = f"{Path(path).name}{PAIR}{name}"  # which is the shortest end of the tower's path
    return RowSet(name, images, (), None, towers.texts(captions_of(images, path).texts))


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
    side: RowSet, first: ActivationCache, places: Int[Tensor, " row"], pool: Pool
) -> Float[Tensor, "row _"]:
    cache = side.cache
    if side.rows is not None:
        return side.rows[places]
    if pool == "example":
        numbers = cache.rows()
        example = cache.refs(numbers).example
        parts = [_encoded(side, numbers[example == one]).mean(dim=0) for one in places]
        return torch.stack(parts)
    if cache is not first:  # shards may be of another size, so rows are counted, not numbered
        places = cache.rows()[torch.searchsorted(first.rows(), places)]
    return _encoded(side, places)


def _encoded(side: RowSet, rows: Int[Tensor, " row"]) -> Float[Tensor, "row _"]:
    x = torch.cat([side.cache[point][rows] for point in side.hook_points], dim=1)
    return x if side.dictionary is None else side.dictionary.encode_dense(x)

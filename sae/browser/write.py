"""Write the browser of a run: a folder that opens by double click, at any number of latents.

`index.html` and the scripts of `assets` are the same for every run; `data` holds what they show, in
files that are loaded when they are looked at. The fields are those of docs/browser.md.
"""

import html
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from itertools import groupby
from pathlib import Path
from string import Template

from activations_cache import io, seals
from activations_cache.checks import MonosemaError, Progress, require, silent
from sae.browser.detail import LATENTS_PER_FILE as SIZE
from sae.browser.detail import (
    LATENTS_PER_TABLE,
    Row,
    f32,
    group,
    i32,
    row,
    script,
    search,
    short,
    table,
)
from sae.browser.latent import Latent
from sae.browser.site import DENSE_ABOVE, Curve, Dictionary, Map, ShownComparison, Site

FORMAT = 3
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""Content security policy: nothing runs that is not a file of the folder."""

INDEX = "index.html"
_OURS = {INDEX, "assets", "data", "done.json", seals.LIST}


def write_site(
    site: Site, path: str | os.PathLike[str], *, progress: Progress | None = None
) -> Path:
    """Write the browser of a run into a folder.

    The folder appears whole or not at all: it is written beside `path` and renamed. One that was
    written before is replaced.

    Args:
        site: What the browser shows.
        path: The folder.
        progress: Called after each file of latents.

    Returns:
        The path of its index.html.

    Raises:
        ValueError: If the parts do not fit together, or the folder holds other files.
    """
    target = Path(path).resolve()
    _check_target(target)
    io.make_directory(target.parent)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with io.naming_path(target):
            _write_all(site, unfinished, progress or silent)
        files = (path for path in unfinished.rglob("*") if path.is_file())
        seals.add(unfinished, (path.relative_to(unfinished).as_posix() for path in files))
        for directory in (unfinished, *filter(Path.is_dir, unfinished.rglob("*"))):
            io.sync_directory(directory)
        former = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.rename(former)
        unfinished.rename(target)
        io.sync_directory(target.parent)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target / INDEX


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    names = {entry.name for entry in target.iterdir()} if target.is_dir() else {target.name}
    if target.is_dir() and names <= _OURS:
        return
    other = ", ".join(sorted(names - _OURS)[:3]) or target.name
    raise MonosemaError(
        f"the browser's folder {target} must be new or one of an earlier browser, got {other}; "
        "name another one"
    )


def _write_all(site: Site, path: Path, progress: Progress) -> None:
    (path / "assets").mkdir(parents=True)
    source = resources.files("sae.browser")
    for asset in source.iterdir():
        if asset.name.endswith((".js", ".css", ".svg")):
            (path / "assets" / asset.name).write_bytes(asset.read_bytes())
    page = Template(source.joinpath(INDEX).read_text(encoding="utf-8")).substitute(
        policy=html.escape(POLICY, quote=False), title=html.escape(site.title)
    )
    # A lone surrogate in the title has no UTF-8; in the data it is escaped.
    (path / INDEX).write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
    ids = {dictionary.name: f"d{i}" for i, dictionary in enumerate(site.dictionaries)}
    known = [_dictionary(d, ids[d.name], path, progress) for d in site.dictionaries]
    compared = [_comparison(c, f"c{i}", ids, path) for i, c in enumerate(site.comparisons)]
    for number, picture in site.pictures:
        require(picture[:2] == b"\xff\xd8", f"picture {number}", "be a JPEG", picture[:8])
        file = path / "data" / "images" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
    index = _overview(site) | {"dictionaries": known, "comparisons": compared}
    _put(path, "index", index)
    _put(path, "server", None)


def _put(path: Path, key: str, value: object) -> None:
    file = path / "data" / f"{key}.js"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script(key, value), encoding="utf-8", newline="\n")


def _overview(site: Site) -> dict[str, object]:
    return {
        "format": FORMAT,
        "title": site.title,
        "subtitle": site.subtitle,
        "facts": site.facts,
        "cautions": site.cautions,
        "results": site.results and asdict(site.results),
        "curves": [_curve(curve) for curve in site.curves],
        "steering": [asdict(example) for example in site.steering],
    }


def _curve(curve: Curve) -> dict[str, object]:
    metrics = [
        (metric, [short(value) if math.isfinite(value) else None for value in values])
        for metric, values in curve.values.items()
    ]
    return {"name": curve.name, "steps": curve.steps, "metrics": metrics}


def _dictionary(result: Dictionary, key: str, path: Path, progress: Progress) -> dict[str, object]:
    parts = _write_latents(result, key, path, progress)
    if result.map is not None:
        _put(path, f"{key}/map", _points(result.map))
    columns = [
        {"id": "density", "name": "density", "kind": "share", "floor": None, "note": ""},
        {"id": "max_activation", "name": "largest", "kind": "number", "floor": None,
         "note": "activation"},
        *(asdict(column) for column in result.columns),
    ]  # fmt: skip
    plain = ("name", "summary", "kind", "d_sae", "n_rows", "n_live", "n_dead", "n_dense", "facts")
    return {
        "id": key,
        **{field: getattr(result, field) for field in plain},
        "dense_above": DENSE_ABOVE,
        "columns": columns,
        "density_histogram": result.density_histogram and asdict(result.density_histogram),
        "size": SIZE,
        "parts": parts,
        "table_size": LATENTS_PER_TABLE,
        "n_tables": math.ceil(result.d_sae / LATENTS_PER_TABLE),
        "map": result.map
        and {
            "layouts": [{"name": one.name, "note": one.note} for one in result.map.layouts],
            "clusters": result.map.clusters,
        },
        "completeness": result.completeness and asdict(result.completeness),
    }


def _points(result: Map) -> dict[str, object]:
    cluster = i32(result.cluster) if result.clusters else None
    layouts = [{"x": f32(one.x), "y": f32(one.y)} for one in result.layouts]
    return {"layouts": layouts, "cluster": cluster}


def _write_latents(result: Dictionary, key: str, path: Path, progress: Progress) -> list[int]:
    """Write the latents, their table and its search lines; the numbers of the latents' files."""
    tables = _Tables(result, key, path)
    parts: list[int] = []
    for part, members in groupby(_ascending(result), lambda latent: latent.number // SIZE):
        latents = list(members)
        for latent in latents:
            tables.add(latent)
        _put(path, f"{key}/latents/{part}", group(part * SIZE, latents))
        parts.append(part)
        progress(min((part + 1) * SIZE, result.d_sae), result.d_sae, "latents for the browser")
    tables.finish(result.d_sae)
    return parts


class _Tables:
    """The rows of the part of the table that is being filled; full parts are on the disk."""

    def __init__(self, result: Dictionary, key: str, path: Path) -> None:
        self.dictionary, self.key, self.path = result, key, path
        self.absent = Row("", 0, (math.nan,) * (2 + len(result.columns)), "")
        self.first = 0
        self.rows = self._empty()

    def _empty(self) -> list[Row]:
        return [self.absent] * min(self.dictionary.d_sae - self.first, LATENTS_PER_TABLE)

    def add(self, latent: Latent) -> None:
        """Take the next latent."""
        self.finish(latent.number // LATENTS_PER_TABLE * LATENTS_PER_TABLE)
        self.rows[latent.number - self.first] = row(latent, self.dictionary.columns)

    def finish(self, upto: int) -> None:
        """Write the parts that lie before a latent."""
        while self.first < upto:
            number = self.first // LATENTS_PER_TABLE
            _put(self.path, f"{self.key}/table/{number}", table(self.first, self.rows))
            _put(self.path, f"{self.key}/search/{number}", search(self.first, self.rows))
            self.first += len(self.rows)
            self.rows = self._empty()


def _ascending(result: Dictionary) -> Iterator[Latent]:
    last = -1
    for latent in result.latents:
        inside = last < latent.number < result.d_sae
        rule = f"ascend and be below d_sae={result.d_sae}"
        require(inside, "latents' numbers", rule, latent.number)
        last = latent.number
        yield latent


def _comparison(
    result: ShownComparison, key: str, ids: dict[str, str], path: Path
) -> dict[str, object]:
    sides: dict[str, object] = {"least": result.least, "chance": short(result.chance)}
    for side, nearest in (("in_b", result.in_b), ("in_a", result.in_a)):
        sides[side] = i32(latent for latent, _ in nearest)
        sides[f"{side}_cosine"] = f32(cosine for _, cosine in nearest)
    _put(path, key, sides)
    return {"id": key, "a": ids[result.a], "b": ids[result.b], "note": result.note}

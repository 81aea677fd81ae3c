"""What `sae convert`, `sae push` and `sae verify-release` do."""

import math
from dataclasses import asdict
from pathlib import Path

import torch

import activations_cache
from activations_cache import ActivationCache
from sae import pretrained
from sae.autoencoder import SparseAutoencoder
from sae.cli import console
from sae.evaluate.report import read_json
from sae.pretrained import monosema_format
from sae.pretrained.export import TARGETS, export
from sae.pretrained.loading import Readings
from sae.pretrained.push import Card, Pushed
from sae.pretrained.push import push as push_to_hub
from sae.pretrained.verify import (
    BATCH,
    FVU_WITHIN,
    L0_WITHIN,
    Measured,
    measure,
    meets,
    published,
)

LATER, FIRST, ALL = "after the first", "the first", "all"


def convert_dictionary(
    source: str, target: str, to: str, format: str | None, allow_pt: bool
) -> None:
    """Read one format, write another, and print what was folded."""
    if Path(target).exists() and any(Path(target).iterdir()):
        raise ValueError(f"{target} must be empty to be written to, got files in it; name another")
    dictionary, origin = pretrained.load_with_source(source, format, allow_pt)
    if to == monosema_format.FORMAT:
        pretrained.save(dictionary, target, {"source": asdict(origin)})
        done = origin.folds_applied
    elif to in TARGETS:
        site = hook_points_of(dictionary) | origin.site
        done = (*origin.folds_applied, *export(dictionary, target, to, site).folds)
    else:
        raise ValueError(f"--to must be one of {[monosema_format.FORMAT, *TARGETS]}, got {to!r}")
    rows = [("from", f"{source}, {origin.source_format}"), ("to", f"{target}, {to}")]
    rows += [("folded", fold) for fold in done] or [
        ("folded", "nothing: every number is as it was")
    ]
    console.facts("converted", rows)


def hook_points_of(dictionary: SparseAutoencoder) -> dict[str, str]:
    """What a dictionary of ours knows of its hook points, in the words of other libraries."""
    config = dictionary.config
    read, predicted = (s[0].hook_point for s in (config.slices_in, config.slices_out))
    found = {"hook_name": read, "submodule_name": read.rpartition(":")[0]} if read else {}
    return found | ({"hook_name_out": predicted} if predicted not in {"", read} else {})


def push_dictionary(
    source: str,
    repo: str,
    about: tuple[str, str, str | None],
    metrics: str | None,
    *,
    public: bool,
) -> Pushed:
    """Send a dictionary with its card and print its name."""
    licence, model, hook_point = about
    path = Path(source)
    read = hook_points_of(pretrained.load(path, format=monosema_format.FORMAT)).get("hook_name")
    if hook_point is not None and read not in {None, hook_point}:
        raise ValueError(f"--hook-point must be that of the dictionary, {read}, got {hook_point}")
    point = hook_point or read
    if point is None:
        raise ValueError(f"--hook-point must be given, for {path} does not name one, got none")
    done = push_to_hub(
        path, repo, Card(licence, model, point, figures_of(path, metrics)), private=not public
    )
    console.facts("pushed", [("name", done.name), *(("file", name) for name in done.files)])
    return done


def figures_of(path: Path, report: str | None) -> dict[str, object]:
    """The figures of a dictionary in a report of `sae evaluate`, or in that of its run."""
    file = Path(report) if report else path.resolve().parent.parent / "evaluate" / "report.json"
    if not file.exists() and report is None:
        return {}
    found = read_json(file).reconstruction
    if path.resolve().name not in found:
        raise ValueError(
            f"{file} must have figures of {path.resolve().name}, got those of {sorted(found)}"
        )
    figures = asdict(found[path.resolve().name])
    return {
        key.replace("_", " "): value
        for key, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def verify(
    name: str,
    readings: Readings,
    cache_path: str,
    hook_points: str | None,
    given: str | None,
    n_rows: int,
) -> int:
    """Print what each reading gives on the cache's rows; 0 if one meets the published figures."""
    cache = activations_cache.open(cache_path)
    stated = published(readings.site, given)
    reads, predicts = _chosen(cache, hook_points)
    table, met = [], []
    for which, rows in _rows(cache, n_rows).items():
        pairs = [(cache[reads][part], cache[predicts][part]) for part in rows.split(BATCH)]
        for reading, dictionary in readings.dictionaries.items():
            found = measure(reading, dictionary, pairs)
            is_met = meets(found, stated)
            table.append(_line(which, found, is_met))
            met += [reading] if is_met and which != FIRST else []
    said = ", ".join(f"{k} {v:g}" for k, v in stated._asdict().items() if v is not None)
    console.table(
        f"{name}, {readings.format}; published: {said}",
        ("positions", "reading", "L0", "FVU", "permuted", "rows", "meets it"),
        table,
        f"meets it: L0 within {L0_WITHIN:.0%}, FVU at most {FVU_WITHIN:.0%} above, and twice as "
        "bad with a permuted decoder",
    )
    console.OUT.print(f"meets the published figures: {', '.join(met) or 'no reading'}")
    return 0 if met else 1


def _line(name: str, found: Measured, is_met: bool) -> tuple[str, ...]:
    verdict = "yes" if is_met else "no"
    figures = (f"{found.l0:.1f}", f"{found.fvu:.4f}", f"{found.fvu_permuted:.4f}")
    return (name, found.reading, *figures, f"{found.n_rows:,}", verdict)


def _rows(cache: ActivationCache, most: int) -> dict[str, torch.Tensor]:
    """Rows spread over the cache: those after the first position, and those of it, apart."""
    every = cache.rows()
    spread = every[torch.linspace(0, len(every) - 1, min(most, len(every))).long()]
    is_first = cache.refs(spread).position == 0
    parts = {LATER: spread[~is_first], FIRST: spread[is_first]}
    if not len(parts[LATER]):  # rows that stand for a whole input each
        return {ALL: spread}
    return {name: rows for name, rows in parts.items() if len(rows)}


def _chosen(cache: ActivationCache, hook_points: str | None) -> tuple[str, str]:
    """The hook points that are read and predicted."""
    names = hook_points.split(",") if hook_points else list(cache.hook_points)
    if len(names) > 1 + bool(hook_points) or not set(names) <= set(cache.hook_points):
        raise ValueError(
            f"--hook-points must name one of {list(cache.hook_points)}, or two of them, got "
            f"{hook_points}"
        )
    return names[0], names[-1]

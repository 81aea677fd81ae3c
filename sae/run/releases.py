"""Dictionaries of others and for others: inspect, convert, push, verify a release."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from activations_cache import ActivationCache
from monosema.checks import MonosemaError
from sae import pretrained
from sae.architecture import Gated, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.evaluate.report import read_json
from sae.pretrained import Source, catalogue, monosema_format
from sae.pretrained.export import TARGETS, export
from sae.pretrained.hook_names import family_of, lens_name
from sae.pretrained.loading import load_readings
from sae.pretrained.origin import Origin, origin_of
from sae.pretrained.push import Card, Pushed
from sae.pretrained.push import push as push_to_hub
from sae.pretrained.verify import (
    BATCH,
    FVU_WITHIN,
    L0_WITHIN,
    ReadingFigures,
    measure,
    meets,
    published,
)
from sae.run.context import (
    CacheOrPath,
    FactTable,
    Section,
    opened,
    require_origin,
    results_of,
    with_differences,
)
from sae.run.neuronpedia import write_pages

LATER, FIRST, ALL = "after the first", "the first", "all"


class VerifiedRelease(NamedTuple):
    """What each reading of a release gives on real rows."""

    meeting: tuple[str, ...]
    """Readings that meet the published figures."""
    measured: dict[str, list[ReadingFigures]]
    """By the positions of the rows."""
    section: Section
    """The same as a table."""

    def _repr_html_(self) -> str:
        return self.section._repr_html_()


def convert(
    source: str | Path,
    target: str | Path,
    to: str = monosema_format.FORMAT,
    *,
    format: str | None = None,
    allow_pt: bool = False,
    model: str | None = None,
) -> FactTable:
    """Read one format and write another, exactly, or say why that format cannot hold it.

    Args:
        source: A directory, a file or org/name.
        target: The directory to write.
        to: monosema, saelens, sparsify, dictionary_learning, saebench or circuit_tracer; or
            neuronpedia, for pages of a dictionary that was explained.
        format: Of the source, where two fit.
        allow_pt: Read a pickle in a closed process.
        model: For neuronpedia: the model, to show the tokens that each latent promotes.

    Returns:
        What was folded.

    Raises:
        ValueError: If the target holds files, or its format cannot hold the dictionary.
    """
    # a set of transcoders is one directory, to which each layer adds a file
    is_set = to == "circuit_tracer"
    if Path(target).exists() and any(Path(target).iterdir()) and not is_set:
        raise MonosemaError(
            f"{target} must be empty to be written to, got files in it; name another"
        )
    dictionary, origin, _ = pretrained.load_with_source(source, format, allow_pt)
    if to == monosema_format.FORMAT:
        pretrained.save(dictionary, target, {"source": asdict(origin)})
        done = origin.folds_applied
    elif to in TARGETS:
        site = origin.site | site_of(dictionary, origin, _record_of(dictionary, origin))
        done = (*origin.folds_applied, *export(dictionary, target, to, site).folds)
    elif to == PAGES:
        site = origin.site | site_of(dictionary, origin, _record_of(dictionary, origin))
        explained = results_of(source, origin) / "explain"
        done = write_pages(explained, Path(target), dictionary, site, Path(source).name, model)
    else:
        known = [monosema_format.FORMAT, *TARGETS, PAGES]
        raise MonosemaError(f"--to must be one of {known}, got {to!r}")
    rows = [("from", f"{source}, {origin.source_format}"), ("to", f"{target}, {to}")]
    folded = done or ("nothing: every number is as it was",)
    rows += [("folded", fold) for fold in folded]
    return FactTable("converted", rows)


def hook_points_of(dictionary: SparseAutoencoder) -> dict[str, str]:
    """What a dictionary of ours knows of its hook points, as module paths."""
    config = dictionary.config
    read, predicted = (s[0].hook_point for s in (config.slices_in, config.slices_out))
    names = {"hook_name": read, "submodule_name": read.rpartition(":")[0]} if read else {}
    return names | ({"hook_name_out": predicted} if predicted not in {"", read} else {})


def _record_of(dictionary: SparseAutoencoder, origin: Source) -> Mapping[str, Any]:
    """The provenance of a dictionary of ours; empty for others."""
    return dictionary.provenance if origin.source_format == monosema_format.FORMAT else {}


def site_of(
    dictionary: SparseAutoencoder, origin: Source, provenance: Mapping[str, Any]
) -> dict[str, str]:
    """What is known of model, hook points and training, in the words of other libraries.

    A hook point has TransformerLens' word where it has one, else its module's path, which stands
    for the module's output there; `hook_point` is ours.

    Args:
        dictionary: Its hook points.
        origin: What it was read from.
        provenance: What its directory says of its training; empty for others.
    """
    recorded = provenance.get("model")
    model = recorded if isinstance(recorded, dict) else {"path": str(recorded or "")}
    name = origin.site.get("model_name") or model.get("path", "")
    family = family_of(model.get("model", "")) or catalogue.family_of_model(name)
    points = hook_points_of(dictionary)
    if not points and (trained := provenance.get("hook_points")):
        points = {"hook_name": trained[0], "submodule_name": trained[0].rpartition(":")[0]}
    site = {**points, "model_name": name}
    for key in ("hook_name", "hook_name_out"):
        if point := points.get(key):
            module, _, side = point.rpartition(":")
            site[key] = lens_name(point, family) or (module if side == "out" else point)
            site[key.replace("name", "point")] = point
    trained_on = {
        "model_dtype": model.get("dtype", ""),
        "context_size": provenance.get("context", ""),
        "training_tokens": provenance.get("rows", ""),
    }
    return {key: str(text) for key, text in (site | trained_on).items() if text}


PAGES = "neuronpedia"


def push(
    source: str | Path,
    repo: str,
    *,
    licence: str,
    model: str,
    hook_point: str | None = None,
    metrics: str | Path | None = None,
    public: bool = False,
) -> Pushed:
    """Put a dictionary of our own format and a card on the hub.

    Args:
        source: Its directory.
        repo: org/name[/subfolder].
        licence: As the hub names it.
        model: The model that it reads, a name of the hub.
        hook_point: The place in the model, where the dictionary has no name.
        metrics: A report.json of an evaluation; that of the run when absent.
        public: Make a new repository public.

    Raises:
        ValueError: If the place is unknown or another, or the report has no such dictionary.
    """
    path = Path(source)
    read = hook_points_of(pretrained.load(path, format=monosema_format.FORMAT)).get("hook_name")
    if hook_point is not None and read not in {None, hook_point}:
        raise MonosemaError(
            f"--hook-point must be that of the dictionary, {read}, got {hook_point}"
        )
    point = hook_point or read
    if point is None:
        raise MonosemaError(f"--hook-point must be given, for {path} does not name one, got none")
    card = Card(licence, model, point, figures_of(path, metrics))
    return push_to_hub(path, repo, card, private=not public)


def figures_of(path: Path, report: str | Path | None) -> dict[str, object]:
    """The figures of a dictionary in a report of `sae evaluate`, or in that of its run."""
    file = Path(report) if report else path.resolve().parent.parent / "evaluate" / "report.json"
    if not file.exists() and report is None:
        return {}
    reported = read_json(file).reconstruction
    if path.resolve().name not in reported:
        raise MonosemaError(
            f"{file} must have figures of {path.resolve().name}, got those of {sorted(reported)}"
        )
    figures = asdict(reported[path.resolve().name])
    return {
        key.replace("_", " "): value
        for key, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def verify_release(  # noqa: PLR0913
    source: str | Path,
    cache: CacheOrPath,
    *,
    hook_points: str | None = None,
    figures: str | None = None,
    rows: int = 2048,
    format: str | None = None,
    allow_pt: bool = False,
    force: bool = False,
) -> VerifiedRelease:
    """Say which reading of a release meets its published figures on a cache's rows.

    Args:
        source: A directory, a file or org/name.
        cache: Rows of the model that it is for.
        hook_points: READ, or READ,PREDICTED of a transcoder; else the release's, or the only one.
        figures: "l0=50,fvu=0.2" or one of them; the L0 in its files when absent.
        rows: How many to measure on.
        format: Where two fit.
        allow_pt: Read a pickle in a closed process.
        force: Measure on another model or place than the release names too; the table names it.

    Raises:
        ValueError: If the cache has no such hook points, or is of another model or place.
    """
    readings = load_readings(source, format, allow_pt)
    cache, stated = opened(cache), published(readings.site, figures)
    origin = origin_of(next(iter(readings.dictionaries.values())).config, words=readings.site)
    hook_read, predicts = _chosen(cache, hook_points, origin)
    outputs = None if hook_read == predicts else (predicts,)
    differs = require_origin(str(source), origin, cache, (hook_read,), outputs, force)
    lines, met, measured = [], [], {}
    for which, numbers in _rows(cache, rows).items():
        pairs = [(cache[hook_read][part], cache[predicts][part]) for part in numbers.split(BATCH)]
        measured[which] = [measure(r, d, pairs) for r, d in readings.dictionaries.items()]
        for one in measured[which]:
            is_met = meets(one, stated)
            lines.append(_line(which, one, is_met))
            met += [one.reading] if is_met and which != FIRST else []
    wanted = ", ".join(f"{k} {v:g}" for k, v in stated._asdict().items() if v is not None)
    columns = ("positions", "reading", "L0", "FVU", "permuted", "rows", "meets it")
    note = (
        f"meets it: L0 within {L0_WITHIN:.0%}, FVU at most {FVU_WITHIN:.0%} above, and twice as "
        "bad with a permuted decoder"
    )
    title = f"{source}, {readings.format}; published: {wanted}"
    note = with_differences(note, {str(source): differs} if differs else {})
    section = Section(title, ResultTable(columns, tuple(lines), note))
    return VerifiedRelease(tuple(met), measured, section)


def _line(name: str, measured: ReadingFigures, is_met: bool) -> tuple[str, ...]:
    figures = (f"{measured.l0:.1f}", f"{measured.fvu:.4f}", f"{measured.fvu_permuted:.4f}")
    return (name, measured.reading, *figures, f"{measured.n_rows:,}", "yes" if is_met else "no")


def _rows(cache: ActivationCache, most: int) -> dict[str, torch.Tensor]:
    """Rows spread over the cache: those after the first position, and those of it, apart."""
    every = cache.rows()
    spread = every[torch.linspace(0, len(every) - 1, min(most, len(every))).long()]
    is_first = cache.refs(spread).position == 0
    parts = {LATER: spread[~is_first], FIRST: spread[is_first]}
    if not len(parts[LATER]):  # rows that stand for a whole input each
        return {ALL: spread}
    return {name: rows for name, rows in parts.items() if len(rows)}


def _chosen(cache: ActivationCache, hook_points: str | None, origin: Origin) -> tuple[str, str]:
    """The hook points that are read and predicted."""
    recorded = [*origin.inputs, *origin.outputs]
    if not hook_points and recorded and set(recorded) <= set(cache.hook_points):
        return recorded[0], recorded[-1]
    names = hook_points.split(",") if hook_points else list(cache.hook_points)
    if len(names) > 1 + bool(hook_points) or not set(names) <= set(cache.hook_points):
        raise MonosemaError(
            f"--hook-points must name one of {list(cache.hook_points)}, or two of them, got "
            f"{hook_points}"
        )
    return names[0], names[-1]


def inspect(path: str | Path, *, format: str | None = None, allow_pt: bool = False) -> FactTable:
    """Say what a dictionary is, where it comes from, and how it will be applied.

    Args:
        path: A directory, a file or org/name.
        format: Where two fit.
        allow_pt: Read a pickle in a closed process.
    """
    dictionary, source, _ = pretrained.load_with_source(path, format, allow_pt)
    config = dictionary.config
    rows = [
        ("format", source.source_format),
        ("its reader", f"checked against {source.checked_against}; not run on released weights"),
        *(("sha256", f"{name} {digest[:16]}") for name, digest in source.source_sha256.items()),
        *((name.replace("_", " "), text) for name, text in source.site.items()),
        ("latents", f"{config.d_sae:,}"),
        ("width", f"{config.d_in:,} -> {config.width_out:,}"),
        *_hook_points(config),
        *((name, _range(tensor)) for name, tensor in _tensors(dictionary).items()),
        *(("folded", fold) for fold in source.folds_applied),
        *equations_of(config),
    ]
    return FactTable(str(path), rows, "u, h, a, y, x_hat: how it is applied")


def _hook_points(config: SAEConfig) -> list[tuple[str, str]]:
    """What is read and, if it is something else, what is predicted; nothing if not recorded."""
    sides = {"reads": config.inputs, "predicts": config.outputs}
    return [
        (side, ", ".join(p.hook_point for p in parts)) for side, parts in sides.items() if parts
    ]


def equations_of(config: SAEConfig) -> list[tuple[str, str]]:
    """How the dictionary is applied: the left and the right side of each equation."""
    norm = {"none": "x", "layer_norm": "layer_norm(x)", "rms": "x / rms(x)"}[config.input_norm]
    scaled = norm if config.input_scale == 1 else f"{norm} * {config.input_scale:.6g}"
    scaled += "" if len(config.slices_in) == 1 else " * each hook point's own factor"
    centred = "u" if config.b_in == "none" else f"(u - {config.b_in.replace('own', 'b_in')})"
    through = "u" if config.undo_norm else "x" + scaled.removeprefix(norm)
    y = "a @ W_dec + b_dec" + (f" + {through} @ W_skip" if config.skip else "")
    brought = "y" if config.scale_out == 1 else f"y / {config.scale_out:.6g}"
    brought += "" if len(config.slices_out) == 1 else " / each hook point's own factor"
    undone = {"none": "", "layer_norm": " * std(x) + mean(x)", "rms": " * rms(x)"}
    brought += undone[config.input_norm] if config.undo_norm else ""
    bias = "" if isinstance(config.activation, Gated) else " + b_enc"
    return [
        ("u", scaled),
        ("h", f"{centred} @ W_enc{bias}"),
        ("a", _activation(config)),
        ("y", y),
        ("x_hat", brought),
    ]


def _activation(config: SAEConfig) -> str:
    h = "h * |W_dec|" if config.gate_by_decoder_norm else "h"
    facts, k = config.activation.facts, config.activation.per_row
    text = facts.equation.format(h=h, k=k)
    return f"({text}) / |W_dec|" if config.gate_by_decoder_norm else text


def _tensors(dictionary: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """What tells a wrong reading by its range."""
    tensors = {
        "norms of decoder rows": dictionary.W_dec.norm(dim=1),
        "norms of encoder rows": dictionary.W_enc.norm(dim=0),
        "norm of b_dec": dictionary.b_dec.detach().norm(),
    }
    if dictionary.threshold is not None:
        tensors["threshold"] = dictionary.threshold.detach()
    return tensors


def _range(tensor: torch.Tensor) -> str:
    low, high = float(tensor.min()), float(tensor.max())
    return f"{low:.4g}" if tensor.dim() == 0 else f"{low:.4g} to {high:.4g}"

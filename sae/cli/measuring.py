"""`sae evaluate DICT... --cache CACHE`: dictionaries and their baselines in one table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import activations_cache
from activations_cache import ActivationCache, io
from activations_cache.checks import Progress
from activations_cache.config import TRAINING_SPLITS, ModelConfig
from activations_cache.models import LoadedModel
from activations_cache.vision import LoadedVisionModel, load_any_model
from sae import pretrained
from sae.autoencoder import SparseAutoencoder
from sae.baselines import (
    covariance_of,
    permuted_decoder,
    principal_components,
    random_dictionary,
    raw_neurons,
)
from sae.browser import ResultTable
from sae.cli import console
from sae.cli.evaluation_page import write_page
from sae.cli.image_runs import holds_images, with_downstream
from sae.cli.image_table import image_table
from sae.cli.sections import Section, details, probe_table, text_table
from sae.cli.seeds import noise_table, stability_table
from sae.cli.structure import structure_table
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.probing.labels import check_hook_point, common_labels
from sae.evaluate.probing.sparse_probe import Survey, survey
from sae.evaluate.reconstruction import measure_reconstruction
from sae.evaluate.report import EvaluationReport, plain
from sae.evaluate.run import evaluate, held_out_rows

ROWS_FOR_L0, ROWS_FOR_PCA = 4096, 65_536


class Spliced(NamedTuple):
    """Into what of the model's each dictionary is spliced."""

    contexts: int
    """Held-out contexts, of a language model."""
    images: int
    """Images to tell classes by, and as many held out, of a vision model."""


class Request(NamedTuple):
    """What is measured, and on what."""

    targets: tuple[str, ...]
    """Paths or hub names, each with GROUP= before it or not."""
    cache: str
    hook_point: str | None
    spliced: Spliced | None
    """What each dictionary is spliced into; None for no model."""
    probe: int
    baselines: bool
    structure: bool = False


class Entry(NamedTuple):
    """A dictionary that is measured."""

    dictionary: SparseAutoencoder
    path: Path
    group: str
    """Its recipe, or what the request names."""
    seed: int


class Measured(NamedTuple):
    """All figures."""

    entries: dict[str, Entry]
    """By name, without the baselines."""
    report: EvaluationReport
    probes: Survey | None
    of_images: bool
    structure: dict[str, ResultTable]
    """Tables of what `--structure` measures, by title."""

    @property
    def sections(self) -> list[Section]:
        """The one table with a row for each dictionary and baseline, and what was asked for."""
        table = image_table(self.report) if self.of_images else text_table(self.report)
        noise = noise_table(members_of(self.entries), self.report)
        probes = None if self.probes is None else probe_table(self.probes)
        more = {"seeds": noise, "k-sparse probing": probes, **self.structure}
        found = {self.report.hook_point: table, **more}
        return [Section(title, of_one) for title, of_one in found.items() if of_one is not None]

    @property
    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {"report": self.report, "probes": self.probes, "structure": self.structure}


def measure(request: Request) -> Measured:
    """Load, refuse what cannot be measured before anything slow begins, and measure."""
    cache = activations_cache.open(request.cache)
    hook_point = _hook_point(cache, request.hook_point)
    held_out_rows(cache)
    if request.probe:
        common_labels(cache)
    entries = load_entries(request.targets, cache, hook_point)
    dictionaries = {name: entry.dictionary for name, entry in entries.items()}
    if request.baselines:
        with console.step("baselines") as report:
            dictionaries |= baselines(dictionaries, cache, hook_point, report)
    loaded, config = None, EvaluateConfig()
    if request.spliced is not None:
        with console.step("model") as report:
            loaded = _model(cache, report)
        n, images = request.spliced
        config = EvaluateConfig(n_contexts=n, n_contexts_special=n // 3, n_images=images)
    model = loaded.model if isinstance(loaded, LoadedModel) else None
    with console.step("evaluate") as report:
        found = evaluate(dictionaries, cache, hook_point, model, config, progress=report)
        measured = found.report
        if isinstance(loaded, LoadedVisionModel):
            measured = with_downstream(measured, dictionaries, cache, loaded, config, report)
    for name, entry in entries.items():
        if (entry.path / "sae.safetensors").is_file():
            found.firing[name].save(entry.path)  # the unit of steering
    probes = None
    if request.probe:
        l0 = {name: of_one.l0 for name, of_one in found.report.reconstruction.items()}
        own = {name: dictionaries[name] for name in entries}
        with console.step("probe") as report:
            probes = survey(own, l0, cache, hook_point, request.probe, progress=report)
    structure = {}
    if request.structure:
        with console.step("structure") as report:
            structure = _structure(entries, cache, hook_point, report)
    return Measured(entries, measured, probes, holds_images(cache), structure)


def _structure(
    entries: dict[str, Entry], cache: ActivationCache, hook_point: str, report: Progress
) -> dict[str, ResultTable]:
    own = {name: entry.dictionary for name, entry in entries.items()}
    found = {
        "stability over seeds": stability_table(members_of(entries), own, report),
        "structure": structure_table(own, cache, hook_point, report),
    }
    return {title: table for title, table in found.items() if table is not None}


def members_of(entries: dict[str, Entry]) -> dict[str, list[str]]:
    """Names by group."""
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.group, []).append(name)
    return groups


def _hook_point(cache: ActivationCache, asked: str | None) -> str:
    points = cache.hook_points
    if asked is None and len(points) != 1:
        raise ValueError(f"--hook-point must be one of {', '.join(points)}, got none; name one")
    hook_point = asked or "".join(points)
    check_hook_point(cache, hook_point)
    return hook_point


def load_entries(
    targets: tuple[str, ...], cache: ActivationCache, hook_point: str
) -> dict[str, Entry]:
    """Load dictionaries and refuse those of another model or place."""
    paths = [target.rpartition("=")[2] for target in targets]
    recipes: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    for target, name in zip(targets, short_names(paths), strict=True):
        group, _, path = target.rpartition("=")
        provenance = _provenance(Path(path))
        _check_origin(path, provenance, cache, hook_point)
        recipe, seed = _recipe_and_seed(provenance)
        group = group or recipes.setdefault(recipe or name, name)
        n_before = sum(entry.group == group for entry in entries.values())
        entries[name] = Entry(
            pretrained.load(path), Path(path), group, n_before if seed is None else seed
        )
    return entries


def short_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]
    if len(set(map(tuple, parts))) < len(parts):
        repeated = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"dictionaries must be given once, got {repeated} again; leave it out")
    depth = 1
    while len({tuple(p[-depth:]) for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _recipe_and_seed(provenance: dict[str, Any]) -> tuple[str | None, int | None]:
    """What tells groups apart, and the seed of the first weights: an entry's own, or its run's."""
    recipe = dict(provenance.get("recipe") or {})
    own = recipe.pop("seed", None)
    seed = provenance.get("seed") if own is None else own
    return json.dumps(recipe, sort_keys=True) if recipe else None, seed


def _provenance(path: Path) -> dict[str, Any]:
    file = path / "provenance.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _check_origin(
    path: str, provenance: dict[str, Any], cache: ActivationCache, hook_point: str
) -> None:
    """What a dictionary of our own says of where it was trained must be what the cache holds."""
    points = provenance.get("hook_points") or [provenance.get("hook_point")]
    own = {
        "hook point": ", ".join(point for point in points if point),
        "model": _model_id(provenance.get("model")),
    }
    for what, held in (
        ("hook point", hook_point),
        ("model", _model_id(cache.identity.get("model"))),
    ):
        if own[what] and held and own[what] != held:
            raise ValueError(
                f"{path} must be a dictionary of the cache's {what} {held}, got one of "
                f"{own[what]}; pass the cache that it was trained on"
            )


def _model_id(recorded: object) -> str:
    """The hash of its weights, or what stands in its place; empty where nothing is recorded."""
    if isinstance(recorded, dict):
        return str(recorded.get("model_sha256", ""))
    return str(recorded or "")


def baselines(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    report: Progress,
) -> dict[str, SparseAutoencoder]:
    """Untrained rivals at the median L0; those with a frozen part come from training."""
    rows = held_out_rows(cache)
    sample = rows[:: max(1, len(rows) // ROWS_FOR_L0)]
    found = measure_reconstruction(dictionaries, cache, hook_point, sample, progress=report)
    l0 = sorted(of_one.reconstruction.l0 for of_one in found.values())[len(found) // 2]
    mean = cache[hook_point].mean
    k = min(max(1, round(l0)), len(mean))
    training = cache.rows(TRAINING_SPLITS)
    covariance = covariance_of(
        cache, hook_point, training[:: max(1, len(training) // ROWS_FOR_PCA)], progress=report
    )
    first = next(iter(dictionaries.values()))
    generator = torch.Generator().manual_seed(0)
    return {
        f"PCA, k={k}": principal_components(mean, covariance, k),
        f"raw neurons, k={k}": raw_neurons(mean, k),
        f"random, k={k}": random_dictionary(first, l0, generator),
        "permuted decoder": permuted_decoder(first, generator),
    }


def _model(cache: ActivationCache, report: Progress) -> LoadedModel | LoadedVisionModel | None:
    """The cache's model; None for caches that record none."""
    recorded = cache.manifest.plan.request.get("config", {}).get("model")
    if recorded is None:
        return None
    config = ModelConfig(
        path=recorded["path"], revision=recorded["revision"], dtype=recorded["dtype"]
    )
    return load_any_model(config, progress=report)


def show(measured: Measured, json_path: Path | None, page: Path | None) -> None:
    """Print the tables, and write all figures as JSON and as a page where they are asked for."""
    for section in measured.sections:
        table = section.table
        console.table(section.title, table.columns, table.rows, table.note)
    if json_path is not None:
        write(json_path, measured.record)
    if page is not None:
        title = f"Evaluation of {', '.join(measured.entries)}"
        write_page(page, title, [*measured.sections, *details(measured.report, measured.probes)])
        console.OUT.print(f"page: {page}", soft_wrap=True)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write JSON; nan becomes null."""
    text = json.dumps(plain(record), indent=1, allow_nan=False)
    io.write_files({path: (text + "\n").encode()})
    console.OUT.print(f"figures: {path}", soft_wrap=True)

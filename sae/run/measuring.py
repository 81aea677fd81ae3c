"""Dictionaries and their baselines on a cache's held-out rows, in one table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.models import LoadedModel
from activations_cache.vision import LoadedVisionModel
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.probe_tasks import check_hook_point, common_labels, read_labels
from sae.evaluate.report import EvaluationReport, held_out_rows
from sae.evaluate.report import evaluate as evaluate_all
from sae.evaluate.sparse_probe import Survey, survey
from sae.pretrained import Source
from sae.pretrained.loading import keep_measured
from sae.read_out import ReadOutName
from sae.run.caches import as_trained
from sae.run.config import refuse_unread
from sae.run.context import (
    CacheOrPath,
    DictionaryOrPath,
    Section,
    Steps,
    fitted,
    holds_images,
    load_model_of,
    opened,
    recorded_model,
    silent_steps,
    steps_to,
    with_differences,
    wrong_class,
)
from sae.run.images import image_table, with_downstream
from sae.run.studies import baselines, noise_table, stability_table, structure_table
from sae.run.tables import probe_table, text_table


class SplicedInto(NamedTuple):
    """Into what of the model's each dictionary is spliced."""

    contexts: int = 24
    """Held-out contexts, of a language model."""
    images: int = 2000
    """Images to tell classes by, and as many held out, of a vision model."""


class MeasureTarget(NamedTuple):
    """A dictionary to measure; without a name it is called by the end of its path that differs."""

    dictionary: DictionaryOrPath
    name: str = ""
    group: str = ""
    """Its recipe's name; told from its provenance when empty."""


class MeasureRequest(NamedTuple):
    """What is measured, and on what."""

    targets: tuple[MeasureTarget, ...]
    cache: CacheOrPath
    hook_point: str | None = None
    """The cache's only one when absent."""
    spliced: SplicedInto | None = SplicedInto()
    """What each dictionary is spliced into; None for no model."""
    probe: int = 0
    """How many labels are probed."""
    baselines: bool = True
    """Whether untrained rivals are measured as well."""
    structure: bool = False
    """Whether stability over seeds, description length and meta-score are measured."""
    force: bool = False
    """Whether dictionaries of another model or place are measured as well."""
    read_out: ReadOutName | None = None
    """How their latents are read; as each dictionary is when absent."""
    labels: str | Path | None = None
    """File of labels by example, which are probed in the place of the cache's own."""


class MeasuredDictionary(NamedTuple):
    """A dictionary that is measured; path and source are None for one that was passed as it is."""

    dictionary: SparseAutoencoder
    path: str | Path | None
    group: str
    """Its recipe, or what the request names."""
    seed: int
    hook_point: str
    """The first one that it reads."""
    differs: tuple[str, ...] = ()
    """In what the cache differs from what it was trained on."""
    source: Source | None = None


class Measurement(NamedTuple):
    """All figures."""

    entries: dict[str, MeasuredDictionary]
    """By name, without the baselines."""
    report: EvaluationReport
    """Reconstruction, firing, and what the model loses."""
    probes: Survey | None
    of_images: bool
    structure: dict[str, ResultTable]
    """Tables of what `structure` measures, by title."""

    @property
    def sections(self) -> list[Section]:
        """The one table with a row for each dictionary and baseline, and what was asked for."""
        table = image_table(self.report) if self.of_images else text_table(self.report)
        probes = None if self.probes is None else probe_table(self.probes)
        seeds = noise_table(members_of(self.entries), self.report)
        more = {"seeds": seeds, "k-sparse probing": probes, **self.structure}
        first = replace(table, note=with_differences(table.note, self.differs))
        tables = {self.report.hook_point: first, **more}
        return [Section(title, each) for title, each in tables.items() if each is not None]

    @property
    def differs(self) -> dict[str, tuple[str, ...]]:
        """By dictionary, in what the cache differs from what it was trained on; only if forced."""
        return {name: entry.differs for name, entry in self.entries.items() if entry.differs}

    @property
    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        figures = {"report": self.report, "probes": self.probes, "structure": self.structure}
        return figures | {"differs": self.differs}

    def _repr_html_(self) -> str:
        return "".join(section._repr_html_() for section in self.sections)


def evaluate(  # noqa: PLR0913
    dictionaries: DictionaryOrPath | Sequence[DictionaryOrPath] | Mapping[str, DictionaryOrPath],
    cache: CacheOrPath,
    *,
    hook_point: str | None = None,
    model: bool = True,
    contexts: int = 24,
    images: int = 2000,
    probe: int = 0,
    baselines: bool = True,
    structure: bool = False,
    force: bool = False,
    read_out: ReadOutName | None = None,
    labels: str | Path | None = None,
    progress: Progress = silent,
) -> Measurement:
    """Measure dictionaries on held-out rows; `.report` has the figures, `.sections` the tables.

    Args:
        dictionaries: One, several, or several by name; each as it is or as a path.
        cache: What they are measured on.
        hook_point: Which stream; that of the dictionaries when absent.
        model: Whether each is also spliced into the cache's model.
        contexts: Held-out contexts that each is spliced into.
        images: The same of a cache of images: to fit on, and as many to score.
        probe: Probe so many labels, those of the most rows.
        baselines: Measure untrained rivals as well.
        structure: Measure stability over seeds, description length and meta-score as well.
        force: Measure dictionaries of another model or place too; the result names what differs.
        read_out: "linear" or "refined"; as each dictionary is read when absent.
        labels: JSON lines with labels by example, probed in the place of the cache's own.
        progress: Called in every step.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If a dictionary does not fit the cache, or nothing is held out.
    """
    spliced = SplicedInto(contexts, images) if model else None
    request = MeasureRequest(
        targets_of(dictionaries), cache, hook_point, spliced, probe, baselines, structure, force,
        read_out, labels,
    )  # fmt: skip
    return measure(request, steps_to(progress))


def targets_of(
    dictionaries: DictionaryOrPath | Sequence[DictionaryOrPath] | Mapping[str, DictionaryOrPath],
) -> tuple[MeasureTarget, ...]:
    """Return what is to be measured, each with its name if it has one."""
    if isinstance(dictionaries, Mapping):
        return tuple(MeasureTarget(one, name) for name, one in dictionaries.items())
    if isinstance(dictionaries, SparseAutoencoder | str | Path):
        dictionaries = [dictionaries]
    if not isinstance(dictionaries, Sequence):
        raise wrong_class(
            "dictionaries", "be dictionaries or paths", dictionaries, "pass a list of them"
        )
    return tuple(MeasureTarget(one) for one in dictionaries)


def measure(request: MeasureRequest, steps: Steps = silent_steps) -> Measurement:
    """Load, refuse what cannot be measured before anything slow begins, and measure."""
    cache = opened(request.cache)
    if request.hook_point is not None:
        check_hook_point(cache, request.hook_point)
    held_out_rows(cache)
    if request.spliced is not None:
        n, images = request.spliced
        asked = EvaluateConfig(n_contexts=n, n_contexts_special=min(8, n), n_images=images)
        refuse_unread("evaluate", asked, of_images=holds_images(cache))
    given = None
    if request.labels is not None:
        if not request.probe:
            raise MonosemaError(f"labels must stand beside probe=N, got {request.labels} alone")
        given = read_labels(request.labels, cache)
    if request.probe:
        common_labels(cache, labels=given)
    entries = load_entries(
        request.targets, cache, request.hook_point, force=request.force, read_out=request.read_out
    )
    hook_point = _hook_point(entries, request.hook_point)
    cache = as_trained({n: entry.dictionary for n, entry in entries.items()}, cache, hook_point)
    trained = {name: entry.dictionary for name, entry in entries.items()}
    dictionaries = dict(trained)
    if request.baselines:
        with steps("baselines") as progress:
            dictionaries |= baselines(trained, cache, hook_point, progress)
    report = _report(request, entries, dictionaries, cache, hook_point, steps)
    probes = None
    if request.probe:
        l0 = {name: entry.l0 for name, entry in report.reconstruction.items()}
        alone = {
            n: d
            for n, d in trained.items()
            if d.config.hook_points_or(hook_point)[0] == (hook_point,)
        }
        with steps("probe") as progress:
            probes = survey(
                alone, l0, cache, hook_point, request.probe, labels=given, progress=progress
            )
    structure = {}
    if request.structure:
        with steps("structure") as progress:
            structure = _structure(entries, cache, hook_point, progress)
    return Measurement(entries, report, probes, holds_images(cache), structure)


def _report(
    request: MeasureRequest,
    entries: Mapping[str, MeasuredDictionary],
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    steps: Steps,
) -> EvaluationReport:
    """Measure all; the firing statistics go beside the dictionaries, for steering."""
    loaded, config = None, EvaluateConfig()
    if request.spliced is not None:
        with steps("model") as progress:
            loaded = load_model_of(cache, progress)
        n, images = request.spliced
        config = EvaluateConfig(n_contexts=n, n_contexts_special=n // 3, n_images=images)
    model, mask_token = None, None
    if isinstance(loaded, LoadedModel):
        model, mask_token = loaded.model, loaded.mask_token
    with steps("evaluate") as progress:
        result = evaluate_all(
            dictionaries, cache, hook_point, model, config,
            mask_token=mask_token, progress=progress,
        )  # fmt: skip
        report = result.report
        if isinstance(loaded, LoadedVisionModel):
            report = with_downstream(report, dictionaries, cache, loaded, config, progress)
    recorded = recorded_model(cache) or {}
    where = {key: recorded[key] for key in ("path", "dtype") if recorded.get(key)}
    for name, entry in entries.items():
        path, source = entry.path, entry.source
        if path is not None and source is not None and not entry.differs:  # the unit of steering
            keep_measured(path, source, entry.dictionary, result.firing[name], hook_point, where)
    return report


def _structure(
    entries: dict[str, MeasuredDictionary],
    cache: ActivationCache,
    hook_point: str,
    progress: Progress,
) -> dict[str, ResultTable]:
    trained = {name: entry.dictionary for name, entry in entries.items()}
    tables = {
        "stability over seeds": stability_table(members_of(entries), trained, progress),
        "structure": structure_table(trained, cache, hook_point, progress),
    }
    return {title: table for title, table in tables.items() if table is not None}


def members_of(entries: dict[str, MeasuredDictionary]) -> dict[str, list[str]]:
    """Names by group."""
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.group, []).append(name)
    return groups


def _hook_point(entries: Mapping[str, MeasuredDictionary], given: str | None) -> str:
    """The stream that all are measured on."""
    points = {entry.hook_point: name for name, entry in entries.items()}
    if given is None and len(points) > 1:
        (one, first), (other, second) = list(points.items())[:2]
        raise MonosemaError(
            f"dictionaries must be of one hook point, got {first} of {one} and {second} of "
            f"{other}; measure them apart"
        )
    return given or next(iter(points))


def load_entries(
    targets: Sequence[MeasureTarget],
    cache: ActivationCache,
    hook_point: str | None = None,
    *,
    force: bool = False,
    read_out: ReadOutName | None = None,
) -> dict[str, MeasuredDictionary]:
    """Load dictionaries and refuse those of another model or place, unless that is forced."""
    recipes: dict[str, str] = {}
    entries: dict[str, MeasuredDictionary] = {}
    for name, target in zip(_names(targets), targets, strict=True):
        is_loaded = isinstance(target.dictionary, SparseAutoencoder)
        called = name if is_loaded else str(target.dictionary)
        one = fitted(
            target.dictionary, cache, hook_point, force=force, name=called, read_out=read_out
        )
        recipe, seed = _recipe_and_seed(one.provenance)
        group = target.group or recipes.setdefault(recipe or name, name)
        n_before = sum(entry.group == group for entry in entries.values())
        seed = n_before if seed is None else seed
        entries[name] = MeasuredDictionary(
            one.dictionary, one.path, group, seed, one.hook_point, one.differs, one.source
        )
    return entries


def _names(targets: Sequence[MeasureTarget]) -> list[str]:
    """The names that are given, of paths else their shortest ends, of others their numbers."""
    paths = [
        str(target.dictionary)
        for target in targets
        if not isinstance(target.dictionary, SparseAutoencoder) and not target.name
    ]
    ends = iter(short_names(paths))
    names = []
    for number, target in enumerate(targets):
        is_loaded = isinstance(target.dictionary, SparseAutoencoder)
        names.append(target.name or (f"dictionary {number}" if is_loaded else next(ends)))
    return names


def short_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]
    if len(set(map(tuple, parts))) < len(parts):
        repeated = next(path for path in paths if paths.count(path) > 1)
        raise MonosemaError(f"dictionaries must be given once, got {repeated} again; leave it out")
    depth = 1
    while len({tuple(p[-depth:]) for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _recipe_and_seed(provenance: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """What tells groups apart, and the seed of the first weights: an entry's own, or its run's."""
    recipe = dict(provenance.get("recipe") or {})
    of_entry = recipe.pop("seed", None)
    seed = provenance.get("seed") if of_entry is None else of_entry
    return json.dumps(recipe, sort_keys=True) if recipe else None, seed

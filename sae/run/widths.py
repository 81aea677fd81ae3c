"""The Scaling Monosemanticity study: dictionaries of several widths on one cache, held together.

After the steps of `sae run` up to explaining come three. Each width is trained on shares of the
rows too, and a scaling law is fitted to all of these runs. The map says which latents descend from
which, which concepts have a latent, how specific labels are by level, how latents go along with
neurons, and which latents tell families of texts from their controls; all of it beside the frozen
twin of each width, where the config has one. The report is one page.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from activations_cache import io, seals
from activations_cache.builder import rank_of_this_process
from activations_cache.checks import MonosemaError, Progress, locate, silent
from activations_cache.config import TRAINING_SPLITS
from sae import train as training  # imports Lightning when it trains
from sae.config import ConfigError, load
from sae.evaluate.reconstruction import measure_reconstruction
from sae.evaluate.report import held_out_rows, read_json
from sae.explain.config import AtlasConfig, RuleConfig
from sae.explain.firings import (
    CAUTION,
    correlate_with_neurons,
    neurons_before,
    summary_of_largest,
)
from sae.explain.subject import by_level
from sae.explain.tables import SUMMARY, LatentRecord, as_json, read_latents, read_summary
from sae.explain.text_at_rows import ConceptFamily, concept_families
from sae.neighbours import chance_cosine, nearest, splitting
from sae.pretrained.monosema_format import PROVENANCE
from sae.run.caches import as_trained
from sae.run.config import RunConfig, StudyConfig
from sae.run.context import Run, Section, fitted, wrong_class
from sae.run.label_tables import study_panels, study_sections
from sae.run.page import plot_lines, write_page
from sae.run.pipeline import STEPS, RunStep, run_steps
from sae.run.steps import REPORT, twin_of
from sae.run.studies import FIT, PICTURE, fit_scaling
from sae.steer.search import Counting, contrast, text_peaks
from sae.train.config import DictionaryConfig

MAP, RECORD, PAGE = "map.json", "study.json", "study.html"
RUNS = "runs.jsonl"
MOST_ROWS = 4096
"""Over so many rows latents are correlated with neurons."""
N_NEAR = 5
"""Neighbours of a tree's root that are listed in each width."""


class Width(NamedTuple):
    """A trained dictionary of a study."""

    name: str
    d_sae: int
    twin: str | None
    """The entry of the same shape whose decoder is frozen."""


class StudyResult(NamedTuple):
    """What a study has made."""

    output: Path
    """Directory of everything."""
    sections: tuple[Section, ...]
    """Its tables; the first has a row for each width."""
    record: dict[str, Any]
    """All figures, as study.json has them."""
    page: Path
    """The report."""

    def _repr_html_(self) -> str:
        return "".join(section._repr_html_() for section in self.sections)


def study(config: RunConfig | str | Path, *, progress: Progress = silent) -> StudyResult:
    """Do every step of a study whose result is not there yet, as `sae study` does.

    Args:
        config: What is studied, or its YAML file: a run with one trained dictionary of each width.
        progress: Called in every step.

    Raises:
        ConfigError: If the config is wrong, or has fewer than two widths.
        TypeError: If an argument is of another class.
    """
    if isinstance(config, str | Path):
        config = load(RunConfig, config)
    if not isinstance(config, RunConfig):
        raise wrong_class("config", "be a RunConfig or the path of a YAML file", config, "see docs")
    run = Run(studied(config))
    run_steps(run, "study", progress, STUDY)
    return result_of(run)


def studied(config: RunConfig) -> RunConfig:
    """The config with all that a study needs, once it can be one.

    Raises:
        ConfigError: If it cannot.
    """
    if config.cache.images is not None:
        raise ConfigError("cache must be of texts for `sae study`, got images")
    if config.train.source != "cache":
        raise ConfigError(f"train.source must be 'cache' for a study, got {config.train.source!r}")
    if (n := rank_of_this_process()[1]) > 1:
        raise ConfigError(
            f"sae study must run as one process, got {n}; do `sae train` with several before it"
        )
    known = widths_of(config)
    if len(known) < 2 or len({width.d_sae for width in known}) < len(known):
        got = ", ".join(f"{width.name} with {width.d_sae}" for width in known) or "none"
        raise ConfigError(
            "train.saes must hold one trained dictionary of each of several widths for a study, "
            f"got {got}; `grid: {{d_sae: [1152, 4608]}}` in an entry makes them"
        )
    entries = [config.train.saes[width.name] for width in known]
    if len({(entry.inputs, entry.outputs) for entry in entries}) > 1:
        raise ConfigError("train.saes must read and predict the same hook points for a study")
    explain = config.explain
    explain = replace(
        explain, rules=explain.rules or RuleConfig(), atlas=explain.atlas or AtlasConfig()
    )
    train = replace(config.train, saes=_with_seeds(config))
    return replace(config, train=train, explain=explain, study=config.study or StudyConfig())


def _with_seeds(config: RunConfig) -> dict[str, DictionaryConfig]:
    """The entries, each width with a seed of its own; a twin has its width's.

    Dictionaries of one seed begin with the same directions, and splitting would be that of these.
    """
    saes = dict(config.train.saes)
    for place, width in enumerate(widths_of(config)):
        for name in (width.name, width.twin):
            entry = saes[name] if name else None
            if name and entry and entry.seed is None and entry.init_from is None:
                saes[name] = replace(entry, seed=config.train.seed + place)
    return saes


def widths_of(config: RunConfig) -> list[Width]:
    """The trained dictionaries, the narrowest first."""
    saes = config.train.saes
    known = [
        Width(name, entry.d_sae, twin_of(saes, name))
        for name, entry in saes.items()
        if entry.frozen == "none"
    ]
    return sorted(known, key=lambda width: width.d_sae)


def scaling(run: Run, report: Progress) -> None:
    """Train each width on shares of the rows as well, and fit what all these runs allow."""
    config, path = run.config.study or StudyConfig(), run.path("scaling")
    names = [width.name for width in widths_of(run.config)]
    measured = read_json(run.path("evaluate") / REPORT).reconstruction
    runs = [_finished(run.path("train") / name, measured[name].fvu) for name in names]
    train = replace(run.config.train, saes={name: run.config.train.saes[name] for name in names})
    total = len(run.cache.rows(TRAINING_SPLITS)) * train.epochs
    for share in config.passes:
        n_rows, place = int(share * total), path / f"rows-{share:g}"
        if n_rows < train.batch:
            raise ConfigError(
                f"study.passes must leave at least train.batch={train.batch} rows, got {share:g} "
                f"of {total}"
            )
        training.train(run.cache, train, place, n_rows=n_rows, progress=report)
        trained = {name: fitted(place / name, run.cache).dictionary for name in names}
        kept = as_trained(trained, run.cache, run.hook_point, train.max_norm)
        figures = measure_reconstruction(
            trained, kept, run.hook_point, held_out_rows(kept), progress=report
        )
        runs += [_finished(place / name, figures[name].reconstruction.fvu) for name in names]
    lines = "".join(json.dumps(one) + "\n" for one in runs)
    io.write_files({path / RUNS: lines.encode()})
    try:
        fit_scaling(
            [str(path / RUNS)], path, resamples=config.resamples, seed=config.seed, progress=report
        )
    except MonosemaError as error:
        io.write_files({path / FIT: as_json({"reason": str(error), "runs": runs})})


def _finished(place: Path, fvu: float) -> dict[str, Any]:
    """A run as a law takes it."""
    provenance = json.loads(seals.read(place / PROVENANCE))
    recipe = provenance["recipe"]
    k = recipe["activation"].get("k")
    return {"d_sae": recipe["d_sae"], "k": k, "rows": provenance["rows"], "loss": fvu}


def draw_map(run: Run, report: Progress) -> None:
    """Hold the widths together, each beside its twin."""
    config, widths = run.config.study or StudyConfig(), widths_of(run.config)
    names = [name for width in widths for name in (width.name, width.twin) if name]
    explained = {name: run.path("explain") / name for name in names}
    summaries = {name: read_summary(path / SUMMARY) for name, path in explained.items()}
    latents = {name: read_latents(path) for name, path in explained.items()}
    pairs = list(pairwise(widths))
    parents = [splitting(_rows(run, a.name), _rows(run, b.name)).parent.tolist() for a, b in pairs]
    found = {
        "widths": [width._asdict() for width in widths],
        "splitting": [_pair(run, *pair, report) for pair in pairs],
        "trees": _trees(run, widths, parents, latents, config.trees),
        "completeness": {name: summaries[name]["completeness"] for name in names},
        "levels": {n: by_level(explained[n], summaries[n], latents[n]) for n in names},
        "neurons": {name: _neurons(run, name, report) for name in names},
        "search": _search(run, names, concept_families(config.families), config, report),
        "caution": CAUTION,
    }  # fmt: skip
    seals.write(run.path("map"), {MAP: as_json(found)})


def _rows(run: Run, name: str) -> torch.Tensor:
    return run.dictionaries[name].dec_rows.detach().float().cpu()


def _neurons(run: Run, name: str, report: Progress) -> dict[str, Any]:
    """The largest correlation of each latent with any neuron of all earlier layers."""
    one, model = run.fitted[name], run.loaded.model
    points = neurons_before(model, one.hook_point, run.cache.d_model(one.hook_point))
    if not points or len(one.inputs) != 1:
        return {"reason": f"no neurons are known before {', '.join(one.inputs)}"}
    tokens = run.cache.examples.tokens[run.cache.examples.split == 0].long()
    n = max(1, MOST_ROWS // tokens.shape[1])
    skipped, spread = run.config.cache.skip_positions, tokens[:: max(1, len(tokens) // n)][:n]
    texts = [ids[ids >= 0] for ids in spread if (ids >= 0).sum() > skipped]
    placed = one.dictionary.at(one.hook_point)
    largest = correlate_with_neurons(model, placed, texts, points, skipped, report)
    return {"hook_points": points, **summary_of_largest(largest)}


def _pair(run: Run, narrow: Width, wide: Width, report: Progress) -> dict[str, Any]:
    """How one width's latents divide into those of the next, and the same of their twins."""
    result: dict[str, Any] = {"narrow": narrow.name, "wide": wide.name}
    arms = [("trained", narrow.name, wide.name)]
    if narrow.twin and wide.twin:
        arms.append(("twins", narrow.twin, wide.twin))
    for done, (arm, one, other) in enumerate(arms, 1):
        split = splitting(_rows(run, one), _rows(run, other))
        result[arm] = {
            "split": split.split, "novel": split.novel,
            "most_children": int(split.n_children.max()), "chance": chance_cosine(_rows(run, one)),
        }  # fmt: skip
        report(done, len(arms), "pairs of widths")
    return result


def _trees(
    run: Run,
    widths: Sequence[Width],
    parents: Sequence[list[int]],
    latents: Mapping[str, list[LatentRecord]],
    n: int,
) -> list[dict[str, Any]]:
    """Of the narrowest width the latents with the most descendants in the widest, with labels."""
    children: list[dict[int, list[int]]] = []
    for of_level in parents:
        children.append({})
        for child, parent in enumerate(of_level):
            children[-1].setdefault(parent, []).append(child)

    def node(level: int, latent: int) -> dict[str, Any]:
        label = latents[widths[level].name][latent].label
        below = children[level].get(latent, []) if level < len(children) else []
        return {
            "latent": latent, "label": label, "children": [node(level + 1, one) for one in below]
        }  # fmt: skip

    def size(tree: dict[str, Any]) -> int:
        return sum(map(size, tree["children"])) if tree["children"] else 1

    live = [one.latent for one in latents[widths[0].name] if one.status != "dead"]
    trees = sorted((node(0, latent) for latent in live), key=size, reverse=True)[:n]
    for tree in trees:
        row = _rows(run, widths[0].name)[[tree["latent"]]]
        near = {width.name: nearest(row, _rows(run, width.name), N_NEAR) for width in widths}
        tree["n_leaves"] = size(tree)
        tree["near"] = {
            name: [
                [latent, cosine, latents[name][latent].label]
                for latent, cosine in zip(*(part[0].tolist() for part in of_width), strict=True)
            ]
            for name, of_width in near.items()
        }
    return trees


def _search(
    run: Run,
    names: Sequence[str],
    families: Sequence[ConceptFamily],
    config: StudyConfig,
    report: Progress,
) -> dict[str, Any]:
    """For each family and dictionary the latents that tell it from its controls, beside chance."""
    asked = [family for family in families if len(family.pos)]
    if len(run.fitted[names[0]].inputs) != 1:
        return {"reason": "the dictionaries read several hook points"}
    counting = Counting(first_position=run.config.cache.skip_positions)
    results: dict[str, Any] = {}
    for done, name in enumerate(names, 1):
        placed = run.dictionaries[name].at(run.fitted[name].hook_point)
        for family in asked:
            texts = (*family.pos, *family.neg)
            peaks = text_peaks(run.loaded.model, run.loaded.tokenizer, placed, texts, counting)
            values = torch.stack([peak.values for peak in peaks]).float().cpu()
            n = len(family.pos)
            found = contrast(values[:n], values[n:], n_exchanges=config.exchanges, seed=config.seed)
            entry = results.setdefault(family.family, {"safety": family.safety, "found": {}})
            entry["found"][name] = found._asdict()
        report(done, len(names), "dictionaries searched for families")
    return results


def write_report(run: Run, report: Progress) -> None:
    """Write the page, its pictures and all figures."""
    path = run.path("study")
    record = _record(run)
    sections = study_sections(record)
    panels = study_panels(record)
    pictures = {title: f"{title.replace(' ', '-')}.png" for title in panels}
    made = {pictures[title]: plot_lines(of_one) for title, of_one in panels.items()}
    seals.write(path, {**made, RECORD: as_json(record)})
    above = {title: path / name for title, name in pictures.items()}
    law = run.path("scaling") / PICTURE
    above |= {"scaling law": law} if law.is_file() else {}
    write_page(path / PAGE, run.config.title, sections, above=above)
    report(1, 1, "pages")


def _record(run: Run) -> dict[str, Any]:
    measured = read_json(run.path("evaluate") / REPORT)
    names = run.config.train.saes
    return {
        "config": asdict(run.config.study or StudyConfig()),
        "reconstruction": {
            name: {
                "fvu": measured.reconstruction[name].fvu, "l0": measured.reconstruction[name].l0,
                "dead": measured.firing[name].dead_fraction,
            }
            for name in names
        },
        "scaling": json.loads((run.path("scaling") / FIT).read_bytes()),
        **json.loads(seals.read(run.path("map") / MAP)),
    }  # fmt: skip


def result_of(run: Run) -> StudyResult:
    """What a finished study has made."""
    record = json.loads(seals.read(run.path("study") / RECORD))
    page = (run.path("study") / PAGE).resolve()
    return StudyResult(run.output, tuple(study_sections(record)), record, page)


def _part(config: RunConfig, names: Sequence[str]) -> dict[str, Any]:
    """What of a study's settings decides a step; families by what the file holds."""
    of_study = config.study or StudyConfig()
    part = {name: getattr(of_study, name) for name in names}
    if "families" in part:
        part["families"] = seals.sha256(locate(part["families"]))
    return part


def _files(*names: str, step: str) -> Any:
    return lambda run: [run.path(step) / name for name in names]


_SCALING = partial(_part, names=("passes", "resamples", "seed"))
_MAP = partial(_part, names=("families", "exchanges", "trees", "seed"))
STUDY = (
    *STEPS[:4],
    RunStep("scaling", scaling, _SCALING, _files(RUNS, FIT, step="scaling"), of_images=False),
    RunStep("map", draw_map, _MAP, _files(MAP, step="map"), of_images=False),
    RunStep(
        "study", write_report, lambda config: {"title": config.title},
        _files(RECORD, PAGE, step="study"), of_images=False,
    ),
)  # fmt: skip
"""The steps of a study, in their order."""

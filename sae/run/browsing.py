"""The browser's site of a whole run, or of one dictionary and its labels."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

import activations_cache
from activations_cache import ActivationCache, seals
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.models import LoadedModel, load_model
from activations_cache.probe import readout, record_of
from sae import pretrained
from sae.browser import (
    Column,
    Curve,
    Dictionary,
    Histogram,
    Site,
    SteeringExample,
    write_site,
)
from sae.browser.site import DENSE_ABOVE
from sae.evaluate.report import read_json
from sae.explain.firings import CofiringPairs, cofiring, encode_rows
from sae.explain.logit_lens import promoted_tokens
from sae.explain.results import STEM
from sae.explain.subject import STEM as RULES
from sae.explain.tables import (
    EXAMPLES,
    EXPLAIN_AGAIN,
    LATENTS,
    SUMMARY,
    LatentRecord,
    iter_examples,
    read_latents,
    read_summary,
)
from sae.neighbours import nearest
from sae.read_out import ReadOutName
from sae.run.browse_latents import (
    BrowseContext,
    BrowsedDictionary,
    BrowsedLatents,
    LatentContext,
    Thumbnails,
    attributions_of,
)
from sae.run.browse_map import LEAST_ON_MAP, comparisons_of, completeness_of, map_of
from sae.run.config import RunConfig, browsed_config
from sae.run.context import Run, fitted, holds_images, model_of, pieces_of, results_of
from sae.run.tables import result_table
from sae.train.curves import read_curves

INDEX = "index.html"

N_PROMOTED, N_NEIGHBOURS = 10, 8
ROWS_FOR_COFIRING = 32_768


def dictionary_of(
    subject: BrowsedDictionary, context: BrowseContext, report: Progress
) -> Dictionary:
    """Everything about one dictionary; its latents are read from the files as they are written."""
    records = read_latents(subject.explained / LATENTS)
    summary, about = read_summary(subject.explained / SUMMARY), _about(subject, context, report)
    rows = subject.dictionary.dec_rows.detach()
    n_live = sum(record.status != "dead" for record in records)
    scorers = sorted({s["scorer"] for said in about.explained.values() for s in said["scores"]})
    return Dictionary(
        name=subject.name,
        summary=f"{_activation(subject)}, {n_live:,} live latents of {len(records):,}",
        d_sae=len(records),
        kind="image" if context.pictures else "text",
        n_rows=summary["n_rows_explain"] + summary["n_rows_score"],
        n_live=n_live,
        n_dead=len(records) - n_live,
        n_dense=sum(record.density > DENSE_ABOVE for record in records),
        columns=(
            Column("auc", "AUC", "score", 0.5, "how well the label tells where the latent fires"),
            *(Column(f"llm:{scorer}", scorer, "score") for scorer in scorers),
            Column("n_fired", "firings", "count", note="rows on which it fires"),
        ),
        density_histogram=_histogram(records),
        latents=BrowsedLatents(records, subject.explained / EXAMPLES, about),
        map=map_of(rows, records, report) if n_live >= LEAST_ON_MAP else None,
        completeness=completeness_of(summary),
    )


def _activation(subject: BrowsedDictionary) -> str:
    activation = subject.dictionary.config.activation
    k = activation.per_row
    return type(activation).__name__ + ("" if k is None else f", k = {k}")


def _about(subject: BrowsedDictionary, context: BrowseContext, report: Progress) -> LatentContext:
    rows = subject.dictionary.dec_rows.detach()
    k = min(N_NEIGHBOURS, len(rows) - 1)
    neighbours = nearest(rows, rows, k, excluded=torch.arange(len(rows))) if k else None
    report(0, 1, "latents' neighbours")
    lens = None
    if context.loaded is not None and _has_lens(subject, context.loaded):
        lens = promoted_tokens(
            subject.dictionary, readout(context.loaded.model), None, N_PROMOTED, progress=report
        )
    attributed = {}
    if context.loaded is not None and context.cache is not None:
        attributed = attributions_of(subject.dictionary, subject.hook_point, context, report)
    return LatentContext(
        path=subject.path,
        pieces=context.pieces,
        neighbours=neighbours,
        cofiring=_cofiring(subject, context, report),
        lens=lens,
        explained=read_explained(subject.explained),
        attributed=attributed,
        pictures=context.pictures,
    )


def _has_lens(subject: BrowsedDictionary, loaded: LoadedModel) -> bool:
    if record_of(loaded.model).logits is None:
        return False
    return readout(loaded.model).shape[1] == subject.dictionary.config.slices_out[-1].width


def _cofiring(
    subject: BrowsedDictionary, context: BrowseContext, report: Progress
) -> list[tuple[CofiringPairs, ...]] | None:
    """Co-firing over rows that are spread evenly over the splits that labels come from."""
    if context.cache is None:
        return None
    cache = context.cache.concatenated(
        subject.dictionary.config.hook_points_or(subject.hook_point)[0]
    )
    rows = cache.rows(("explain", "score"))
    sample = rows[:: max(1, math.ceil(len(rows) / ROWS_FOR_COFIRING))]
    codes = encode_rows(subject.dictionary, cache[subject.hook_point], sample, report)
    return cofiring(codes, N_NEIGHBOURS, progress=report)


def read_explained(explained: Path) -> dict[int, dict]:
    """What scorers and a language model said of latents, by latent; empty where none was asked.

    Scores of labels that were executed as rules come after the others, by names of their own.
    """
    by_latent: dict[int, dict] = {}
    for stem, prefix in ((STEM, ""), (RULES, "rule: ")):
        for record in _records(explained / f"{stem}.jsonl"):
            nothing = {"explanation": None, "scores": [], "controls": {}}
            entry = by_latent.setdefault(record["latent"], nothing)
            entry["explanation"] = entry["explanation"] or (not prefix and record["explanation"])
            entry["scores"] += _named(record["scores"], prefix)
            for control, scores in record["controls"].items():
                entry["controls"].setdefault(control, []).extend(_named(scores, prefix))
    return by_latent


def _records(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    lines = seals.read(file, advice=EXPLAIN_AGAIN).decode().splitlines()
    return [json.loads(line) for line in lines]


def _named(scores: list[dict], prefix: str) -> list[dict]:
    return [score | {"scorer": prefix + score["scorer"]} for score in scores]


def _histogram(records: list[LatentRecord]) -> Histogram | None:
    live = torch.tensor([r.density for r in records if r.density > 0]).log10()
    if not len(live):
        return None
    first = min(-1, math.floor(float(live.min())))
    counts = torch.histc(live, bins=4 * -first, min=first, max=0)
    edges = tuple(first + i / 4 for i in range(len(counts) + 1))
    return Histogram(edges, tuple(int(count) for count in counts.tolist()), log10=True)


def shown_pictures(context: BrowseContext, explained: list[Path]) -> Iterator[tuple[int, bytes]]:
    """Thumbnails of the pictures that examples name; none of texts."""
    if context.pictures is None:
        return
    numbers = {
        example.example
        for path in explained
        for _, examples in iter_examples(path / EXAMPLES)
        for example in examples
    }
    yield from context.pictures.jpegs(sorted(numbers))


CAUTIONS = (
    "A label says with which words of these texts a latent's firing goes together.",
    "That a latent exists does not show how the model uses it.",
    "Labels were made on one set of documents and scored on another; 0.5 is chance.",
    "A latent may stand for something that these texts do not show.",
)
CAUTIONS_OF_IMAGES = (
    "A label says in pictures of which folder, or likest to which word, a latent fires more.",
    "Folders are what people sorted pictures into; the model need not see them so.",
    "Words are as good as the towers that match them with pictures.",
    "A heat map shows on which patches a latent fires, not what in the picture makes it fire.",
    "That a latent exists does not show how the model uses it.",
    "Labels were made on one set of pictures and scored on another; 0.5 is chance.",
)


def site_of_run(run: Run, report: Progress) -> Site:
    """Everything that came of a run, baselines in its table."""
    measured = read_json(run.path("evaluate") / "report.json")
    steering = run.path("steer") / "steering.json"
    subjects = [
        BrowsedDictionary(
            name, one.dictionary, run.path("train") / name, run.path("explain") / name,
            one.hook_point,
        )
        for name, one in run.fitted.items()
        if not run.is_frozen(name)
    ]  # fmt: skip
    context = _context_of_run(run)
    shown = None
    if steering.is_file():
        shown = json.loads(seals.read(steering, advice="run `sae steer` again"))["shown"]
    return Site(
        title=run.config.title,
        subtitle="Dictionaries of one stream: measured on held-out data, labelled without an LLM.",
        facts=(
            ("model", run.config.cache.model.path.rpartition("/")[2]),
            ("hook point", run.hook_point),
            ("pictures" if run.of_images else "texts", ", ".join(run.cache.examples.source_names)),
            ("rows trained on", f"{len(run.cache.rows(('explain', 'score'))):,}"),
            ("rows held out", f"{len(run.cache.rows(('hold',))):,}"),
            ("seed", str(run.config.train.seed)),
        ),
        results=result_table(run, measured, with_labels=True),
        curves=_curves(run),
        dictionaries=tuple(dictionary_of(subject, context, report) for subject in subjects),
        steering=(SteeringExample(**shown),) if shown else (),
        comparisons=comparisons_of(subjects, report),
        cautions=CAUTIONS_OF_IMAGES if run.of_images else CAUTIONS,
        pictures=shown_pictures(context, [subject.explained for subject in subjects]),
    )


def _context_of_run(run: Run) -> BrowseContext:
    if run.of_images:
        return BrowseContext(run.cache, None, None, Thumbnails(run.cache))
    return BrowseContext(run.cache, run.loaded, run.pieces)


def _curves(run: Run) -> tuple[Curve, ...]:
    curves = read_curves(run.path("train"))
    return tuple(
        Curve(
            name=name,
            steps=tuple(int(n) for n in curves[name]["rows"]),
            values={metric.upper(): curves[name][metric] for metric in ("fvu", "l0")},
        )
        for name in run.dictionaries
        if name in curves
    )


def site_of_dictionary(
    path: str | Path,
    cache_path: str | Path | None,
    report: Progress,
    *,
    force: bool = False,
    read_out: ReadOutName = "linear",
) -> Site:
    """A dictionary that `sae explain` labelled; with its cache, also what needs texts and model.

    Raises:
        ValueError: If it has no labels, or the cache is not one of its model and hook points.
    """
    loaded = pretrained.load_with_source(path)
    home = results_of(path, loaded.source)
    explained = home / "explain"
    if not (explained / SUMMARY).is_file():
        raise MonosemaError(
            f"{path} must hold explain/{SUMMARY} to be browsed, got none; run "
            f"`sae explain {path} --cache CACHE` first"
        )
    dictionary, differs = loaded.dictionary, ()
    points = (*loaded.origin.inputs, *dictionary.config.hook_points)
    context, hook = BrowseContext(None, None, None), next(iter(points), "")
    if cache_path is not None:
        cache = activations_cache.open(cache_path)
        one = fitted(path, cache, force=force, read_out=read_out)
        dictionary, hook, differs = one.dictionary, one.hook_point, one.differs
        context = _context_of(cache, report)
    else:
        dictionary = dictionary.reading(read_out)
    name = Path(path).name
    subject = BrowsedDictionary(name, dictionary, home, explained, hook)
    model = dictionary.provenance.get("model", "")
    if isinstance(model, dict):
        model = model.get("path", model.get("model_sha256", ""))
    facts = [
        ("model", str(model)),
        ("dictionary", str(path)),
        ("hook point", hook),
        ("read-out", "refined" if dictionary.read_by == "refined" else ""),
        ("forced", "; ".join(differs)),
    ]
    return Site(
        title=name,
        subtitle="A dictionary, labelled without an LLM.",
        facts=tuple(fact for fact in facts if fact[1]),
        dictionaries=(dictionary_of(subject, context, report),),
        cautions=CAUTIONS_OF_IMAGES if context.pictures else CAUTIONS,
        pictures=shown_pictures(context, [explained]),
    )


def _context_of(cache: ActivationCache, report: Progress) -> BrowseContext:
    if holds_images(cache):
        return BrowseContext(cache, None, None, Thumbnails(cache))
    loaded = load_model(model_of(cache), progress=report)
    return BrowseContext(cache, loaded, pieces_of(loaded))


def browse(
    path: str | Path,
    *,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    force: bool = False,
    read_out: ReadOutName = "linear",
    progress: Progress = silent,
) -> Path:
    """Write the feature browser of a run, or of a dictionary with its labels.

    Args:
        path: A run's directory or its YAML file, or a dictionary that was explained.
        out: Folder to write; `browse` in the run or the dictionary when absent.
        cache: Of a dictionary: the cache it was explained on.
        force: Take a cache of another model or place too; the page names what differs.
        read_out: How a dictionary's latents are read: "linear" or "refined".
        progress: Called in every stage.

    Returns:
        The first page.

    Raises:
        ConfigError: If the path is neither.
    """
    config = browsed_config(path)
    folder = browser_folder(path, config, out)
    write_browser(path, config, folder, cache, progress, force=force, read_out=read_out)
    return folder / INDEX


def browser_folder(path: str | Path, config: RunConfig | None, out: str | Path | None) -> Path:
    """Return where a browser lies: what is named, or `browse` in the run or the dictionary."""
    if out:
        return Path(out)
    return (results_of(path) if config is None else Path(config.output)) / "browse"


def write_browser(
    path: str | Path,
    config: RunConfig | None,
    folder: Path,
    cache: str | Path | None = None,
    progress: Progress = silent,
    *,
    force: bool = False,
    read_out: ReadOutName = "linear",
) -> None:
    """Write the site of a run, or of the dictionary at the path, into a folder."""
    site = (
        site_of_dictionary(path, cache, progress, force=force, read_out=read_out)
        if config is None
        else site_of_run(Run(config), progress)
    )
    write_site(site, folder, progress=progress)

"""The browser's site of a whole run, or of one dictionary and its labels."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import activations_cache
from activations_cache import ActivationCache
from activations_cache.checks import Progress
from activations_cache.models import load_model
from sae import pretrained
from sae.browser import Curve, Site, SteeringExample
from sae.cli.browse_site import comparisons_of, dictionary_of, shown_pictures
from sae.cli.browse_subject import Around, Subject
from sae.cli.caches import model_of
from sae.cli.image_runs import holds_images
from sae.cli.pictures import Pictures
from sae.cli.report import result_table
from sae.evaluate.report import read_json
from sae.explain.tables import SUMMARY
from sae.train.curves import read_curves

if TYPE_CHECKING:
    from sae.cli.chain import Run

CAUTIONS = (
    "A label says with which words of these texts a latent's firing goes together.",
    "That a latent exists does not show how the model uses it.",
    "Labels were made on one set of documents and scored on another; 0.5 is chance.",
    "A latent may stand for something that these texts do not show.",
)
CAUTIONS_OF_IMAGES = (
    "A label says in pictures of which folder a latent fires more strongly.",
    "Folders are what people sorted pictures into; the model need not see them so.",
    "A heat map shows on which patches a latent fires, not what in the picture makes it fire.",
    "That a latent exists does not show how the model uses it.",
    "Labels were made on one set of pictures and scored on another; 0.5 is chance.",
)


def site_of_run(run: "Run", report: Progress) -> Site:
    """Everything that a run found, baselines in its table."""
    measured = read_json(run.path("evaluate") / "report.json")
    steering = run.path("steer") / "steering.json"
    subjects = [
        Subject(name, dictionary, run.path("train") / name, run.path("explain") / name, hook)
        for name, dictionary in run.dictionaries.items()
        if not run.is_frozen(name)
        for hook in [dictionary.config.sites(run.hook_point)[0][0]]
    ]
    around = _around(run)
    shown = json.loads(steering.read_text())["shown"] if steering.is_file() else None
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
        dictionaries=tuple(dictionary_of(subject, around, report) for subject in subjects),
        steering=(SteeringExample(**shown),) if shown else (),
        comparisons=comparisons_of(subjects, report),
        cautions=CAUTIONS_OF_IMAGES if run.of_images else CAUTIONS,
        pictures=shown_pictures(around, [subject.explained for subject in subjects]),
    )


def _around(run: "Run") -> Around:
    if run.of_images:
        return Around(run.cache, None, [], Pictures(run.cache))
    return Around(run.cache, run.loaded, run.token_strings)


def _curves(run: "Run") -> tuple[Curve, ...]:
    found = read_curves(run.path("train"))
    return tuple(
        Curve(
            name=name,
            steps=tuple(int(n) for n in found[name]["rows"]),
            values={metric.upper(): found[name][metric] for metric in ("fvu", "l0")},
        )
        for name in run.dictionaries
        if name in found
    )


def site_of_dictionary(path: Path, cache_path: str | None, report: Progress) -> Site:
    """A dictionary that `sae explain` labelled; with its cache, also what needs texts and model.

    Raises:
        ValueError: If it has no labels.
    """
    explained = path / "explain"
    if not (explained / SUMMARY).is_file():
        raise ValueError(
            f"{path} must hold explain/{SUMMARY} to be browsed, got none; run "
            f"`sae explain {path} --cache CACHE` first"
        )
    provenance = path / "provenance.json"
    origin = json.loads(provenance.read_text()) if provenance.is_file() else {}
    points = origin.get("hook_points") or [origin.get("hook_point") or ""]
    around, hook = Around(None, None, []), points[0]
    if cache_path is not None:
        cache = activations_cache.open(cache_path)
        hook = hook if hook in cache.hook_points else cache.hook_points[0]
        around = _around_of(cache, report)
    subject = Subject(path.name, pretrained.load(path), path, explained, hook)
    facts = [("dictionary", str(path)), ("hook point", hook)]
    model = origin.get("model", "")
    facts.insert(0, ("model", str(model["path"] if isinstance(model, dict) else model)))
    return Site(
        title=path.name,
        subtitle="A dictionary, labelled without an LLM.",
        facts=tuple(fact for fact in facts if fact[1]),
        dictionaries=(dictionary_of(subject, around, report),),
        cautions=CAUTIONS_OF_IMAGES if around.pictures else CAUTIONS,
        pictures=shown_pictures(around, [explained]),
    )


def _around_of(cache: ActivationCache, report: Progress) -> Around:
    if holds_images(cache):
        return Around(cache, None, [], Pictures(cache))
    loaded = load_model(model_of(cache, None), progress=report)
    vocabulary = loaded.model.get_input_embeddings().weight
    ids = [[token] for token in range(len(vocabulary))]  # pyright: ignore[reportArgumentType]
    return Around(cache, loaded, loaded.tokenizer.batch_decode(ids))

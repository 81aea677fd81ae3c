"""What each step of a run does, in terms of the packages that do it."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

import activations_cache
from activations_cache import io, seals
from activations_cache.builder import rank_of_this_process
from activations_cache.checks import Progress, silent
from activations_cache.config import SPLITS
from activations_cache.manifest import MANIFEST
from activations_cache.probe import record_of
from sae import train as training  # imports Lightning when it trains
from sae.browser import write_site
from sae.evaluate.report import evaluate as measure
from sae.evaluate.report import write_json
from sae.explain.run import TWIN, Null
from sae.explain.run import explain as explain_latents
from sae.explain.tables import LATENTS, SUMMARY, LatentRecord, read_latents, read_summary
from sae.metrics import STATS, stats_file
from sae.pretrained.monosema_format import CONFIG, PROVENANCE, WEIGHTS
from sae.run.browsing import site_of_run
from sae.run.caches import as_trained, check_splits, words_of
from sae.run.context import Run, steps_to
from sae.run.explaining import explain_texts
from sae.run.images import pictures_of, with_downstream
from sae.run.studies import baselines
from sae.steer.choice import (
    Candidate,
    NothingToSteerError,
    SteerSubject,
    choose_latent,
    target_tokens,
)
from sae.train.config import DictionaryConfig
from sae.train.curves import LOGS, draw

REPORT = "report.json"
STEERING = "steering.json"
PAGE = "index.html"
MARKER = "done.json"
"""In a step's directory, and in that of each dictionary that is explained: what decided it, and its
results with sizes and checksums."""
DICTIONARY = (WEIGHTS, CONFIG, PROVENANCE)
LABEL_FILES = (".parquet", ".json", ".jsonl")

N_NEUTRAL = 2
"""Held-out contexts on which the side effect of the steering example is measured."""

N_COMMON = 300
"""So many of the most frequent tokens do not show that steering worked."""

_log = logging.getLogger(__name__)


def mark(path: Path, identity: str, files: list[Path]) -> None:
    """Say that a directory's results are whole."""
    record = {"identity": identity, "files": seals.describe_all(path, files)}
    io.write_files({path / MARKER: json.dumps(record, indent=1).encode()})


def is_marked(path: Path, identity: str) -> bool:
    """Whether a directory is marked for what decides it now, and its files are as they were."""
    try:
        record = json.loads((path / MARKER).read_bytes())
        wrong = (io.problem(path / name, entry) for name, entry in record["files"].items())
        is_same = bool(identity) and record["identity"] == identity and not any(wrong)
        return is_same and (path / seals.LIST).is_file() and not seals.is_damaged(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def cache(run: Run, report: Progress) -> None:
    """Store the hook point's rows."""
    activations_cache.build(run.config.cache, run.cache_path, progress=report)


def train(run: Run, report: Progress) -> None:
    """Train all entries of `saes:`."""
    path = run.path("train")
    try:
        training.train(run.cache, run.config.train, path, progress=report)
    finally:  # after a signal as well: by then the checkpoint is written
        if rank_of_this_process()[0] == 0:
            draw(path)


def evaluate(run: Run, report: Progress) -> None:
    """Measure all dictionaries; their firing statistics go beside them, for steering."""
    config, dictionaries = run.config.evaluate, dict(run.dictionaries)
    if run.of_images:
        untrained = baselines(dictionaries, run.cache, run.hook_point, report)
        dictionaries |= {n: d for n, d in untrained.items() if n.startswith(("PCA", "raw"))}
    model, mask_token = None, None
    if not run.of_images:
        model, mask_token = run.loaded.model, run.loaded.mask_token
    kept = as_trained(dictionaries, run.cache, run.hook_point, run.config.train.max_norm)
    evaluation = measure(
        dictionaries, kept, run.hook_point, model, config,
        mask_token=mask_token, progress=report,
    )  # fmt: skip
    for name in run.dictionaries:
        where, one = run.path("train") / name, run.dictionaries[name]
        digest = seals.sha256(where / WEIGHTS)
        stats, digest = stats_file(one.read_by, digest, one.read_out)
        evaluation.firing[name].save(where, digest, stats)
    measured = evaluation.report
    if run.of_images:
        measured = with_downstream(measured, dictionaries, run.cache, run.vision, config, report)
    write_json(measured, run.path("evaluate") / REPORT)


def explain(run: Run, report: Progress) -> dict[str, Any]:
    """Label every dictionary's latents; of a frozen baseline only the summary is kept.

    A dictionary that an earlier call of the same run has explained is left as it is, but where a
    language model is asked: its answers are kept by themselves.

    Returns:
        Summaries of the labels by a language model, by dictionary; empty where none was asked.
    """
    summaries: dict[str, Any] = {}
    words = words_of(run.cache, run.config.explain.images, report)
    frozen_first = sorted(run.fitted.items(), key=lambda item: not run.is_frozen(item[0]))
    for name, one in frozen_first:
        path, config = run.path("explain") / name, run.config.explain
        if run.of_images or run.is_frozen(name):
            config = replace(config, autointerp=None)
        if config.autointerp is None and is_marked(path, run.identity):
            continue

        def report_named(done: int, total: int, unit: str, name: str = name) -> None:
            report(done, total, f"{unit} of {name}")

        if run.of_images:
            pictures = pictures_of(run.cache, config, one.dictionary, one.hook_point, words)
            explain_latents(one.dictionary, pictures, path, progress=report_named)
            mark(path, run.identity, _labels_in(path))
            continue
        null, steps = _null_of(run, name), steps_to(report_named)
        result = explain_texts(one, run.cache, run.loaded, config, path, null=null, steps=steps)
        if config.autointerp is None:
            mark(path, run.identity, _labels_in(path))
        elif result.by_llm is not None:
            summaries[name] = result.by_llm
    return summaries


def _null_of(run: Run, name: str) -> Null:
    """What the curve of completeness stands beside: the twin whose decoder never learned."""
    if run.is_frozen(name):
        return None
    twin = twin_of(run.config.train.saes, name)
    if twin is None:
        return "random"
    summary = read_summary(run.path("explain") / twin / SUMMARY)
    return {**summary["completeness"], "weights": summary.get("weights"), "of": TWIN}


def twin_of(saes: Mapping[str, DictionaryConfig], name: str) -> str | None:
    """The entry of the same shape with a frozen random decoder, if there is one."""
    one = saes[name]
    shape = (one.d_sae, one.activation, one.inputs, one.outputs)
    twins = (
        other
        for other, entry in saes.items()
        if entry.frozen == "decoder"
        and (entry.d_sae, entry.activation, entry.inputs, entry.outputs) == shape
    )
    return next(twins, None)


def steer(run: Run, report: Progress) -> None:
    """Generate with and without one labelled latent turned up; not where nothing is continued."""
    record = record_of(run.loaded.model)
    if record.predicts_next:
        try:
            example = steering_example(run, report)
        except NothingToSteerError as error:  # an example costs no run its pages
            _log.warning("no steering example: %s", error)
            example = {"shown": None, "reason": str(error)}
    else:
        reason = f"{record.name} does not predict the next token, so no text is continued"
        _log.warning("%s", reason)
        example = {"shown": None, "reason": reason}
    seals.write(run.path("steer"), {STEERING: json.dumps(example, indent=1).encode()})


def steering_example(run: Run, progress: Progress) -> dict[str, Any]:
    """Steer the prompt by one labelled latent; plain data for the page and for `steering.json`.

    `shown` holds the fields of the page's SteeringExample; `choice` how the latent was found.
    """
    config = run.config.steer
    name = config.dictionary or _steerable(run)
    [hook_point] = run.fitted[name].inputs
    subject = SteerSubject(
        model=run.loaded.model,
        tokenizer=run.loaded.tokenizer,
        dictionary=run.dictionaries[name].at(hook_point),
        first_position=run.config.cache.skip_positions,
    )
    records = read_latents(run.path("explain") / name / LATENTS)
    common = _common_tokens(run.cache.examples.tokens)
    candidates = [_candidate(run, r, common) for r in records if r.status == "scored"]
    held_out = (run.cache.examples.split == SPLITS.index("hold")).nonzero().flatten()[:N_NEUTRAL]
    neutral = run.cache.examples.tokens[held_out]
    choice = choose_latent(subject, candidates, config, neutral=neutral, progress=progress)
    chosen = choice.chosen.candidate
    return {
        "shown": {
            "dictionary": name,
            "latent": chosen.latent,
            "label": chosen.label,
            "strength": float(config.strength),
            "prompt": config.prompt,
            "base": choice.base.text,
            "steered": choice.chosen.text,
        },
        "choice": asdict(choice),
    }


def _steerable(run: Run) -> str:
    """The first dictionary that is no baseline and gives back the one stream that it reads."""
    for name, dictionary in run.dictionaries.items():
        config = dictionary.config
        if not run.is_frozen(name) and not config.outputs and len(config.inputs) < 2:
            return name
    raise NothingToSteerError(
        "train.saes must have a dictionary that reads and predicts one hook point to steer by, "
        f"got {', '.join(run.dictionaries)}; add one, or end with `sae explain`"
    )


def _common_tokens(tokens: Int[Tensor, "example pos"]) -> frozenset[int]:
    """Return the most frequent tokens of the texts."""
    counts = tokens[tokens >= 0].bincount()
    return frozenset(counts.topk(min(N_COMMON, len(counts))).indices.tolist())


def _candidate(run: Run, record: LatentRecord, common: frozenset[int]) -> Candidate:
    assert record.auc is not None, record.latent
    words = record.words if record.kind in ("word", "token") else ()
    return Candidate(
        latent=record.latent,
        label=record.label,
        auc=record.auc,
        density=record.density,
        targets=target_tokens(run.loaded.tokenizer, [word.strip() for word in words], common),
    )


def browse(run: Run, report: Progress) -> None:
    """Write the browser's folder."""
    write_site(site_of_run(run, report), run.path("browse"), progress=report)


def cache_files(run: Run) -> list[Path]:
    """The manifest, which holds the checksums of all other files of the cache."""
    return [run.cache_path / MANIFEST]


def train_files(run: Run) -> list[Path]:
    """The dictionaries, and what the curves are drawn from."""
    path = run.path("train")
    files = [path / name / file for name in run.config.train.saes for file in DICTIONARY]
    return files + sorted((path / LOGS / "csv").glob("*/metrics.csv"))


def evaluate_files(run: Run) -> list[Path]:
    """The report, and the statistics next to the dictionaries."""
    name_of = STATS if run.config.read_out == "linear" else f"{run.config.read_out}_{STATS}"
    stats = [run.path("train") / name / name_of for name in run.config.train.saes]
    return [run.path("evaluate") / REPORT, *stats]


def explain_files(run: Run) -> list[Path]:
    """Labels, examples, scores and summaries."""
    files = []
    for name in run.config.train.saes:
        path = run.path("explain") / name
        files += [path / SUMMARY, *_labels_in(path)]
    return files


def _labels_in(path: Path) -> list[Path]:
    names = {seals.LIST, MARKER}
    return [f for f in path.glob("*") if f.suffix in LABEL_FILES and f.name not in names]


def steer_files(run: Run) -> list[Path]:
    """The example."""
    return [run.path("steer") / STEERING]


def browse_files(run: Run) -> list[Path]:
    """All pages and their data."""
    folder = run.path("browse")
    made = (path for part in ("assets", "data") for path in (folder / part).rglob("*"))
    return [folder / PAGE, *(path for path in made if path.is_file())]


def check(run: Run, done: str, last: str) -> None:
    """Refuse what a step to come would refuse, before the steps between cost any time."""
    if done != "cache" or last == "train":
        return
    images = run.config.explain.images
    splits = ("hold",) if last == "evaluate" else SPLITS
    check_splits(run.cache, splits, by_words=images.by_words)
    is_labelled = all(
        (run.path("explain") / name / SUMMARY).is_file() for name in run.config.train.saes
    )
    if last != "evaluate" and not is_labelled:
        words_of(run.cache, images, silent)  # embedded once: the step finds them again

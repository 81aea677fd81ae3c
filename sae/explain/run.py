"""Explain a dictionary: encode the cache, label every latent, score the labels, write all down."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from activations_cache.progress import Progress, silent
from sae.autoencoder import SparseAutoencoder
from sae.explain.codes import encode_rows
from sae.explain.config import ExplainConfig, Kind
from sae.explain.examples import Activity, Context, ContextFinder, Part, activity
from sae.explain.labels import Labels, fires_enough, make_labels
from sae.explain.scores import FLOOR, Mean, Scores, bootstrap_mean, derangement, score_rules
from sae.explain.tables import EXAMPLES, LATENTS, LatentRecord, write_tables
from sae.explain.words import Cache, SplitRows, TextReader


@dataclass(frozen=True)
class Summary:
    """The dictionary's labels in a few figures; nan where there is nothing to average."""

    n_latents: int
    """All latents."""
    n_scored: int
    """Live latents whose label was scored."""
    n_insufficient: int
    """Live latents that fire too seldom to be scored; counted, never dropped."""
    n_dead: int
    """Latents that never fire in the two splits."""
    auc: Mean
    """Mean AUC over the scored latents; its interval is a bootstrap over latents."""
    auc_median: float
    """Median AUC over the scored latents."""
    auc_all_live: float
    """Mean AUC over all live latents, the insufficient ones counted at the floor."""
    auc_wide: Mean
    """Mean AUC of the larger rules, which are not what the labels say."""
    control_auc: Mean
    """Mean AUC when every latent is scored with another latent's label."""
    share_above_chance: float
    """Share of the scored latents whose interval lies above the floor."""
    floor: float
    """The AUC of knowing nothing."""
    n_rows_explain: int
    """Rows from which the labels were made."""
    n_rows_score: int
    """Rows on which they were scored."""


@dataclass(frozen=True)
class Explained:
    """The labels of a dictionary and their scores."""

    labels: Labels
    """Labels of all latents."""
    names: Mapping[Kind, Sequence[str]]
    """What the labels' values are called; for `labels.text(latent, names)`."""
    status: tuple[str, ...]
    """"scored", "insufficient" or "dead" for each latent."""
    scores: Scores
    """AUC of the labels."""
    wide: Scores
    """AUC of the larger rules."""
    control: Scores
    """AUC of other latents' labels; nan everywhere if fewer than two latents were scored."""
    activity: Activity
    """How often and how strongly the latents fire."""
    summary: Summary
    """All of it in a few figures."""
    latents_path: Path | None
    """latents.parquet, if it was written."""
    examples_path: Path | None
    """examples.parquet, if it was written."""


def explain(
    dictionary: SparseAutoencoder,
    cache: Cache,
    hook_point: str,
    token_strings: Sequence[str],
    config: ExplainConfig,
    out_dir: Path | None,
    *,
    progress: Progress | None = None,
) -> Explained:
    """Label all latents from the explain split and score the labels on the score split.

    Args:
        dictionary: What is explained.
        cache: Activations and texts, split by document.
        hook_point: Which activations the dictionary reads.
        token_strings: Each token as text, with its leading space if it has one.
        config: How.
        out_dir: Where the files go; None writes none and looks for no contexts.
        progress: Called in every stage, with the stage's own total and unit.

    Raises:
        ValueError: If a split is empty, splits share an example, or activations are not finite.
    """
    report = progress or silent
    reader = TextReader(cache, token_strings)
    splits = {split: reader.read(split) for split in ("explain", "score")}
    _check_splits(splits)
    parts = [
        Part(name, encode_rows(dictionary, cache[hook_point], split.ids, report), split.text)
        for name, split in splits.items()
    ]
    explained = explain_codes(parts[0], parts[1], reader.names, config, report)
    if out_dir is None:
        return explained
    finder = ContextFinder(parts, cache.examples, token_strings, config)
    fired = [part.codes.n_fired for part in parts]
    records = (_record(explained, fired, latent) for latent in range(len(fired[0])))
    contexts = _contexts(finder, len(fired[0]), report)
    summary = {"config": dataclasses.asdict(config), **_flat(explained.summary)}
    write_tables(out_dir, records, contexts, config.top_contexts, summary)
    paths = {"latents_path": out_dir / LATENTS, "examples_path": out_dir / EXAMPLES}
    return dataclasses.replace(explained, **paths)


def _check_splits(splits: Mapping[str, SplitRows]) -> None:
    for name, split in splits.items():
        if split.text.n_rows == 0:
            raise ValueError(f"split {name!r} must have rows, got none; build a larger cache")
    shared = np.intersect1d(splits["explain"].text.example, splits["score"].text.example)
    if len(shared):
        raise ValueError(
            f"splits must not share examples, got {len(shared)} in both, the first {shared[0]}"
        )


def explain_codes(
    made_from: Part,
    scored_on: Part,
    names: Mapping[Kind, Sequence[str]],
    config: ExplainConfig,
    progress: Progress | None = None,
) -> Explained:
    """Label and score from codes alone; nothing is written.

    Args:
        made_from: The explain split; labels see nothing else.
        scored_on: The score split.
        names: What the values of each kind are called.
        config: How.
        progress: Called after each pass over the codes.
    """
    labels = make_labels(made_from.codes, made_from.text, config, progress)
    codes, text = scored_on.codes, scored_on.text
    wanted = labels.eligible & fires_enough(codes, text, config)
    generator = np.random.default_rng(config.seed)
    scored = np.flatnonzero(wanted)
    partner = np.arange(codes.d_sae)
    if len(scored) > 1:
        partner[scored] = derangement(scored, generator)
    exchanged = wanted & (partner != np.arange(codes.d_sae))
    scores = score_rules(labels.rules, labels.kinds, codes, text, wanted)
    wide = score_rules(labels.wide, labels.kinds, codes, text, wanted)
    control = score_rules(labels.rules.of(partner), labels.kinds, codes, text, exchanged)
    active = activity((made_from, scored_on), config.histogram_bins)
    live = active.n_fired > 0
    status = np.where(wanted, "scored", np.where(live, "insufficient", "dead"))
    found = (scores, wide, control)
    summary = _summary(found, wanted, live, (made_from.codes.n_rows, codes.n_rows), generator)
    paths = (None, None)
    return Explained(labels, names, tuple(status.tolist()), *found, active, summary, *paths)


def _summary(
    found: tuple[Scores, Scores, Scores],
    wanted: np.ndarray,
    live: np.ndarray,
    n_rows: tuple[int, int],
    generator: np.random.Generator,
) -> Summary:
    scores, wide, control = found
    auc = scores.auc[wanted]
    n_scored, n_live = int(wanted.sum()), int(live.sum())
    at_floor = FLOOR * (n_live - n_scored)
    return Summary(
        n_latents=len(wanted),
        n_scored=n_scored,
        n_insufficient=n_live - n_scored,
        n_dead=len(wanted) - n_live,
        auc=bootstrap_mean(auc, generator),
        auc_median=float(np.median(auc)) if n_scored else math.nan,
        auc_all_live=float(auc.sum() + at_floor) / n_live if n_live else math.nan,
        auc_wide=bootstrap_mean(wide.auc[wanted], generator),
        control_auc=bootstrap_mean(control.auc[np.isfinite(control.auc)], generator),
        share_above_chance=float((scores.low[wanted] > FLOOR).mean()) if n_scored else math.nan,
        floor=FLOOR,
        n_rows_explain=n_rows[0],
        n_rows_score=n_rows[1],
    )


def _contexts(finder: ContextFinder, d_sae: int, progress: Progress) -> Iterator[Context]:
    for latent in range(d_sae):
        yield from finder.find(latent)
        if (latent + 1) % 256 == 0 or latent + 1 == d_sae:
            progress(latent + 1, d_sae, "latents' contexts")


def _record(explained: Explained, fired: Sequence[np.ndarray], latent: int) -> LatentRecord:
    labels, active = explained.labels, explained.activity
    listed = labels.rules.value[latent] >= 0
    has_label = bool(listed.any())

    def of_words(array: np.ndarray) -> tuple:
        return tuple(array[latent][listed].tolist())

    return LatentRecord(
        latent=latent,
        status=explained.status[latent],
        label=labels.text(latent, explained.names),
        kind=labels.kinds[labels.rules.kind[latent]] if has_label else "",
        words=tuple(labels.words(latent, explained.names)),
        weights=of_words(labels.rules.weight),
        joint=of_words(labels.joint),
        information=of_words(labels.information),
        npmi=of_words(labels.npmi),
        gain=float(labels.gain[latent]) if has_label else None,
        p_value=float(labels.p_value[latent]) if has_label else None,
        auc=_known(float(explained.scores.auc[latent])),
        low=_known(float(explained.scores.low[latent])),
        high=_known(float(explained.scores.high[latent])),
        control_auc=_known(float(explained.control.auc[latent])),
        auc_wide=_known(float(explained.wide.auc[latent])),
        n_fired_explain=int(fired[0][latent]),
        n_fired_score=int(fired[1][latent]),
        density=float(active.density[latent]),
        max_activation=float(active.max_activation[latent]),
        histogram=tuple(active.histogram[latent].tolist()),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _flat(summary: Summary) -> dict[str, object]:
    """The summary as JSON takes it: means as objects, nan, which JSON does not know, as null."""
    flat: dict[str, object] = {}
    for field in dataclasses.fields(summary):
        value = getattr(summary, field.name)
        if isinstance(value, Mean):
            value = {end: _known(number) for end, number in value._asdict().items()}
        flat[field.name] = _known(value) if isinstance(value, float) else value
    return flat

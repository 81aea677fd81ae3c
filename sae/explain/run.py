"""Explain a dictionary: encode the cache, label every latent, score the labels, write all down."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from activations_cache import seals
from activations_cache.checks import MonosemaError, Progress, silent
from sae import notebook
from sae.autoencoder import SparseAutoencoder
from sae.baselines import baseline_dictionary, random_dictionary
from sae.explain.config import AtlasConfig, ExplainConfig, Kind
from sae.explain.examples import Activity, Context, ContextFinder, SplitFirings, activity
from sae.explain.firings import ActivationRows, Codes, encode_rows
from sae.explain.held_out import HeldOut, concepts_with_a_latent, held_out
from sae.explain.labels import Labels, fires_enough, make_labels
from sae.explain.logit_lens import WeightLabels, WordVectors, frequent_words, weight_labels
from sae.explain.results import Summary, SummaryInputs, flat, known_or_none, summary_of
from sae.explain.scores import Scores, derangement, score_rules
from sae.explain.tables import EXAMPLES, LATENTS, WEIGHTS, LatentRecord, as_json, write_tables
from sae.explain.text_at_rows import (
    Cache,
    SplitRows,
    TextReader,
    concept_families,
    concepts_in,
)

_SAMPLE = 32_768

RANDOM = "random directions of the same width and L0"
TWIN = "the frozen random decoder trained beside it"
OF_NULL = ("of", "f50", "low", "high", "slope", "n", "share_present", "points", "reason")
Null = Mapping[str, Any] | Literal["random"] | None
"""What stands beside the curve of completeness: that of a frozen twin, as its summary has it, one
of random directions, which is made here, or none."""


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
    held_out: HeldOut
    """What chance gives each label on the same documents, and what strong firings do."""
    control: Scores
    """AUC of other latents' labels; nan everywhere if fewer than two latents were scored."""
    activity: Activity
    """How often and how strongly the latents fire."""
    summary: Summary
    """All of it in a few figures."""
    latents_path: Path | None = None
    """latents.parquet, if it was written."""
    examples_path: Path | None = None
    """examples.parquet, if it was written."""
    baselines: Mapping[str, Summary] = field(default_factory=dict)
    """The same figures of latents that nobody trained, where files were written."""
    by_weights: dict[str, Any] | None = None
    """What the labels from weights are worth, if the config has them and files were written."""

    def _repr_html_(self) -> str:
        scored = np.flatnonzero(np.array(self.status) == "scored")
        auc = self.scores.auc[scored]
        rows = [
            (
                str(latent),
                self.labels.text(latent, self.names),
                f"{self.scores.auc[latent]:.3f}",
                f"{self.activity.density[latent]:.2%}",
                f"{self.activity.max_activation[latent]:.3g}",
            )
            for latent in scored[np.argsort(-auc, kind="stable")].tolist()
        ]
        columns = ("latent", "label", "AUC", "fires", "largest")
        note = f"{len(scored):,} of {len(self.status):,} latents fire often enough to be scored"
        return notebook.table("Labels, the best first", columns, rows, note)


def explain(  # noqa: PLR0913
    dictionary: SparseAutoencoder,
    cache: Cache,
    hook_point: str,
    token_strings: Sequence[str],
    config: ExplainConfig,
    out_dir: Path | None,
    *,
    null: Null = None,
    vectors: WordVectors | None = None,
    progress: Progress | None = None,
) -> Explained:
    """Label all latents from the explain split and score the labels on the score split.

    Args:
        dictionary: What is explained.
        cache: Activations and texts, split by document.
        hook_point: Which activations the dictionary reads.
        token_strings: `activations_cache.Pieces`, or what stands for each id everywhere.
        config: How.
        out_dir: Where the files go; None writes none and looks for no contexts.
        null: What stands beside the curve of completeness, and beside labels from weights.
        vectors: What gives words their output embeddings, for labels from weights.
        progress: Called in every stage, with the stage's own total and unit.

    Raises:
        ValueError: If a split is empty, splits share an example, or activations are not finite.
    """
    report, reader = progress or silent, TextReader(cache, token_strings)
    splits = _checked({split: reader.read(split) for split in ("explain", "score")})
    parts = _firings(dictionary, cache[hook_point], splits, report)
    explained = explain_codes(parts[0], parts[1], reader.names, config, report)
    if out_dir is None:
        return explained
    arms = _baselines(cache, hook_point, splits, explained, config, report)
    concepts = concepts_in(reader.names, concept_families())
    n_concepts = (config.atlas or AtlasConfig()).n_concepts
    has_latent = concepts_with_a_latent(concepts, parts, n_concepts, report)
    weigh = _Weights(reader.names["word"], vectors, config)
    by_weights = weigh.written(dictionary, parts, out_dir) if config.weights else {}
    if null == "random":
        untrained = _random_like(dictionary, parts[0].codes, config.seed)
        others = _firings(untrained, cache[hook_point], splits, report)
        null = {**concepts_with_a_latent(concepts, others, n_concepts, report), "of": RANDOM}
        null |= {"weights": weigh.labels(untrained, others).summary} if by_weights else {}
    if null is not None:
        has_latent["null"] = {name: null[name] for name in OF_NULL if name in null}
        by_weights |= _beside(null) if by_weights else {}
    summary = {"weights": by_weights} if by_weights else {}
    summary |= {
        **flat(explained.summary),
        "completeness": has_latent,
        "baselines": {name: flat(arm) for name, arm in arms.items()},
        "config": dataclasses.asdict(config),
    }
    finder = ContextFinder(parts, cache.examples, reader.pieces, config)
    contexts = _contexts(finder, len(explained.status), report)
    write_tables(out_dir, _records(explained, parts), contexts, config.top_contexts, summary)
    paths = {"latents_path": out_dir / LATENTS, "examples_path": out_dir / EXAMPLES}
    return dataclasses.replace(explained, baselines=arms, by_weights=by_weights or None, **paths)


@dataclass(frozen=True)
class _Weights:
    """Labels from weights, scored on the latents that labels from the corpus are scored on."""

    names: Sequence[str]
    vectors: WordVectors | None
    config: ExplainConfig

    def labels(self, dictionary: SparseAutoencoder, parts: Sequence[SplitFirings]) -> WeightLabels:
        if self.vectors is None:
            raise MonosemaError("vectors must be given for labels from weights, got None")
        wanted = np.logical_and(*(fires_enough(p.codes, p.text, self.config) for p in parts))
        words = frequent_words(parts[0], self.names, self.config.weights)
        return weight_labels(
            dictionary, self.vectors([self.names[i] for i in words]), words, parts[1], wanted,
            n=min(self.config.words_per_label, len(words)), seed=self.config.seed,
        )  # fmt: skip

    def written(
        self, dictionary: SparseAutoencoder, parts: Sequence[SplitFirings], out_dir: Path
    ) -> dict[str, Any]:
        """Write the labels of all latents, and return their summary."""
        made, latents = self.labels(dictionary, parts), []
        figures = zip(made.words.tolist(), made.pmi.tolist(), made.auc.tolist(), strict=True)
        for latent, (numbers, values, auc) in enumerate(figures):
            listed = [
                (self.names[i], pmi) for i, pmi in zip(numbers, values, strict=True) if i >= 0
            ]
            words, pmi = [word for word, _ in listed], [value for _, value in listed]
            one = {"latent": latent, "words": words, "pmi": pmi, "auc": known_or_none(auc)}
            latents.append(one)
        seals.write(out_dir, {WEIGHTS: as_json({"summary": made.summary, "latents": latents})})
        return made.summary


def _firings(
    dictionary: SparseAutoencoder,
    rows: ActivationRows,
    splits: Mapping[str, SplitRows],
    report: Progress,
) -> list[SplitFirings]:
    return [
        SplitFirings(name, encode_rows(dictionary, rows, split.ids, report), split.text)
        for name, split in splits.items()
    ]


def _random_like(like: SparseAutoencoder, codes: Codes, seed: int) -> SparseAutoencoder:
    """Random directions, as many, of which as many fire in a row."""
    generator = torch.Generator().manual_seed(seed)
    return random_dictionary(like, len(codes.row) / max(codes.n_rows, 1), generator)


def _checked(splits: Mapping[str, SplitRows]) -> Mapping[str, SplitRows]:
    for name, split in splits.items():
        if split.text.n_rows == 0:
            raise MonosemaError(f"split {name!r} must have rows, got none; build a larger cache")
    shared = np.intersect1d(splits["explain"].text.example, splits["score"].text.example)
    if len(shared):
        raise MonosemaError(
            f"splits must not share examples, got {len(shared)} in both, the first {shared[0]}"
        )
    return splits


def explain_codes(
    made_from: SplitFirings,
    scored_on: SplitFirings,
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
    unseen = held_out(labels, made_from.codes, codes, text, wanted, config, progress)
    active = activity((made_from, scored_on), config.histogram_bins)
    live = active.n_fired > 0
    status = np.where(wanted, "scored", np.where(live, "insufficient", "dead"))
    result = SummaryInputs(scores, wide, control, unseen)
    summary = summary_of(result, wanted, live, (made_from.codes.n_rows, codes.n_rows), generator)
    paths = (None, None)
    return Explained(
        labels,
        names,
        tuple(status.tolist()),
        scores,
        wide,
        unseen,
        control,
        active,
        summary,
        *paths,
    )


def _baselines(
    cache: Cache,
    hook_point: str,
    splits: Mapping[str, SplitRows],
    explained: Explained,
    config: ExplainConfig,
    report: Progress,
) -> dict[str, Summary]:
    """Random directions and raw neurons, as dense as latents spread evenly over the live ones."""
    density = np.sort(explained.activity.density[explained.activity.n_fired > 0])
    n = config.n_baseline
    if not (n and len(density)):
        return {}
    places = np.linspace(0, len(density) - 1, n).round().astype(int)
    ids = splits["explain"].ids
    rows = cache[hook_point][ids[:: max(1, len(ids) // _SAMPLE)]].cpu()
    untrained = baseline_dictionary(
        rows, n, np.clip(density[places], 1 / len(rows), 0.5).tolist(), config.seed
    )
    codes = [encode_rows(untrained, cache[hook_point], s.ids, report) for s in splits.values()]
    results = {}
    for first, name in ((0, "random directions"), (n, "raw neurons")):
        made_from, scored_on = (
            SplitFirings(split, of_split.part(first, first + n), splits[split].text)
            for split, of_split in zip(splits, codes, strict=True)
        )
        results[name] = explain_codes(made_from, scored_on, explained.names, config, report).summary
    return results


def _contexts(finder: ContextFinder, d_sae: int, progress: Progress) -> Iterator[Context]:
    for latent in range(d_sae):
        yield from finder.find(latent)
        if (latent + 1) % 256 == 0 or latent + 1 == d_sae:
            progress(latent + 1, d_sae, "latents' contexts")


def _beside(null: Mapping[str, Any]) -> dict[str, Any]:
    """What untrained weights give in the labels' place, if that was measured."""
    weights = null.get("weights")
    return {"null": {**weights, "of": null["of"]}} if weights else {}


def _records(explained: Explained, parts: Sequence[SplitFirings]) -> Iterator[LatentRecord]:
    fired = [part.codes.n_fired for part in parts]
    return (_record(explained, fired, latent) for latent in range(len(fired[0])))


def _record(explained: Explained, fired: Sequence[np.ndarray], latent: int) -> LatentRecord:
    labels, active, unseen = explained.labels, explained.activity, explained.held_out
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
        auc=known_or_none(float(explained.scores.auc[latent])),
        low=known_or_none(float(explained.scores.low[latent])),
        high=known_or_none(float(explained.scores.high[latent])),
        control_auc=known_or_none(float(explained.control.auc[latent])),
        auc_wide=known_or_none(float(explained.wide.auc[latent])),
        n_fired_explain=int(fired[0][latent]),
        n_fired_score=int(fired[1][latent]),
        density=float(active.density[latent]),
        max_activation=float(active.max_activation[latent]),
        histogram=tuple(active.histogram[latent].tolist()),
        p_held_out=known_or_none(float(unseen.p_value[latent])),
        auc_strong=known_or_none(float(unseen.auc_strong[latent])),
        p_strong=known_or_none(float(unseen.p_strong[latent])),
        curve=tuple(known_or_none(share) for share in unseen.curve[latent].tolist()),
        curve_n=tuple(unseen.curve_n[latent].tolist()),
        base=known_or_none(float(unseen.base[latent])),
    )

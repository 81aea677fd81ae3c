"""Explain a dictionary: encode the cache, label every latent, score the labels, write all down.

One pipeline for texts and images: `Units` are what labels speak of, the rows of texts or images.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch

from activations_cache.checks import MonosemaError, Progress, silent
from sae import notebook
from sae.autoencoder import SparseAutoencoder
from sae.baselines import baseline_dictionary, random_dictionary
from sae.explain.config import AtlasConfig, ExplainConfig, Kind
from sae.explain.examples import (
    Activity,
    Context,
    ContextFinder,
    SplitCodes,
    SplitFirings,
    SplitImages,
    activity,
)
from sae.explain.firings import Codes, encode_rows
from sae.explain.held_out import HeldOut, concepts_with_a_latent, held_out
from sae.explain.labels import Labels, fires_enough, make_labels
from sae.explain.logit_lens import WordVectors, labels_by_weights, write_weight_labels
from sae.explain.results import LabelFigures, Summary, SummaryInputs, summary_of
from sae.explain.scores import (
    RuleScores,
    Scores,
    exchanged_labels,
    flat,
    known_or_none,
    score_rules,
)
from sae.explain.tables import EXAMPLES, LATENTS, LatentRecord, write_tables
from sae.explain.text_at_rows import (
    Cache,
    SplitRows,
    TextReader,
    concept_families,
    concepts_in,
    sampled_rows,
)

SPLITS = ("explain", "score")
"""Labels are made from the first and scored on the second."""

RANDOM = "random directions of the same width and L0"
TWIN = "the frozen random decoder trained beside it"
OF_NULL = ("of", "f50", "low", "high", "slope", "n", "share_present", "points", "reason")
Null = Mapping[str, Any] | Literal["random"] | None
"""What stands beside the curve of completeness: that of a frozen twin, as its summary has it, one
of random directions, which is made here, or none."""


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The labels of a dictionary and their scores."""

    status: tuple[str, ...]
    """"scored", "insufficient" or "dead" for each latent; of images also "unlabelled"."""
    scores: Scores
    """AUC of the labels."""
    control: Scores
    """AUC of other latents' labels; nan everywhere if fewer than two latents were scored."""
    activity: Activity
    """How often and how strongly the latents fire."""
    summary: LabelFigures
    """All of it in a few figures."""
    baselines: Mapping[str, LabelFigures] = field(default_factory=dict)
    """The same figures of latents that nobody trained, where files were written."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What summary.json has beside the figures."""
    latents_path: Path | None = None
    """latents.parquet, if it was written."""
    examples_path: Path | None = None
    """examples.parquet, if it was written."""


P = TypeVar("P", bound=SplitCodes)
E = TypeVar("E", bound=Explained)


@dataclass(frozen=True, eq=False)
class Units(ABC, Generic[P, E]):
    """What labels speak of and how they are made; what is read of the cache is kept."""

    cache: Cache
    """Activations and where they come from, split by document or image."""
    hook_point: str
    """Which activations are explained."""
    config: ExplainConfig
    """How."""
    name: ClassVar[str]
    """What is shown of a latent."""
    n_sampled: ClassVar[int]
    """Rows from which the thresholds of untrained latents are taken, about."""

    @cached_property
    @abstractmethod
    def splits(self) -> Mapping[str, SplitRows | SplitImages]:
        """The rows of each of `SPLITS`."""

    @property
    @abstractmethod
    def n_shown(self) -> int:
        """Examples per latent, about."""

    @abstractmethod
    def firings(self, split: str, codes: Codes) -> P:
        """The codes of the rows of a split with what stands at these rows."""

    @abstractmethod
    def labelled(self, parts: Sequence[P], progress: Progress) -> E:
        """Labels from the first part, scored on the second; nothing is written."""

    @abstractmethod
    def said(self, explained: E, parts: Sequence[P], latent: int) -> dict[str, Any]:
        """The fields of a latent's record that say what its label is and rests on."""

    @abstractmethod
    def shown(self, parts: Sequence[P]) -> Callable[[int], Iterator[Context]]:
        """What gives the examples of a latent, the largest peak first."""

    def more(
        self, dictionary: SparseAutoencoder, parts: Sequence[P], out_dir: Path, progress: Progress
    ) -> dict[str, Any]:
        """What summary.json says beside the figures; further files are written too."""
        del dictionary, parts, out_dir, progress
        return {}

    def encoded(self, dictionary: SparseAutoencoder, progress: Progress) -> list[P]:
        """What a dictionary does on the two splits."""
        rows = self.cache[self.hook_point]
        return [
            self.firings(name, encode_rows(dictionary, rows, split.ids, progress))
            for name, split in self.splits.items()
        ]


def explain(
    dictionary: SparseAutoencoder,
    units: Units[P, E],
    out_dir: Path | None,
    *,
    progress: Progress | None = None,
) -> E:
    """Label all latents from the explain split and score the labels on the score split.

    Args:
        dictionary: What is explained.
        units: On what, texts or images, and how.
        out_dir: Where the files go; None writes none, looks for no examples and leaves untrained
            latents out.
        progress: Called in every stage, with the stage's own total and unit.

    Raises:
        ValueError: If a split is empty, splits share an example, activations are not finite, or
            images that are labelled by classes are of fewer than two.
    """
    report = progress or silent
    parts = units.encoded(dictionary, report)
    explained = units.labelled(parts, report)
    if out_dir is None:
        return explained
    arms = _untrained(units, explained.activity, report)
    more = {**explained.more, **units.more(dictionary, parts, out_dir, report)}
    summary = {
        **flat(explained.summary),
        **more,
        "baselines": {name: flat(arm) for name, arm in arms.items()},
        "config": dataclasses.asdict(units.config),
    }
    every = range(len(explained.status))
    records = (_record(units, explained, parts, latent) for latent in every)
    write_tables(out_dir, records, _examples(units, parts, report), units.n_shown, summary)
    paths = {"latents_path": out_dir / LATENTS, "examples_path": out_dir / EXAMPLES}
    return dataclasses.replace(explained, baselines=arms, more=more, **paths)


def _untrained(units: Units[P, E], active: Activity, progress: Progress) -> dict[str, LabelFigures]:
    """Random directions and raw neurons, as dense as latents spread evenly over the live ones."""
    density, n = np.sort(active.density[active.n_fired > 0]), units.config.n_baseline
    if not (n and len(density)):
        return {}
    places = np.linspace(0, len(density) - 1, n).round().astype(int)
    rows = sampled_rows(units.cache, units.hook_point, units.n_sampled)
    wanted = np.clip(density[places], 1 / len(rows), 0.5).tolist()
    parts = units.encoded(baseline_dictionary(rows, n, wanted, units.config.seed), progress)
    results = {}
    for first, name in ((0, "random directions"), (n, "raw neurons")):
        arm = [units.firings(part.split, part.codes.part(first, first + n)) for part in parts]
        results[name] = units.labelled(arm, progress).summary
    return results


def _examples(units: Units[P, E], parts: Sequence[P], progress: Progress) -> Iterator[Context]:
    shown, d_sae = units.shown(parts), parts[0].codes.d_sae
    for latent in range(d_sae):
        yield from shown(latent)
        if (latent + 1) % 256 == 0 or latent + 1 == d_sae:
            progress(latent + 1, d_sae, f"latents' {units.name}")


def _record(units: Units[P, E], explained: E, parts: Sequence[P], latent: int) -> LatentRecord:
    scores, active = explained.scores, explained.activity
    return LatentRecord(
        latent=latent,
        status=explained.status[latent],
        auc=known_or_none(scores.auc[latent]),
        low=known_or_none(scores.low[latent]),
        high=known_or_none(scores.high[latent]),
        control_auc=known_or_none(explained.control.auc[latent]),
        **{f"n_fired_{part.split}": int(part.codes.n_fired[latent]) for part in parts},
        density=float(active.density[latent]),
        max_activation=float(active.max_activation[latent]),
        histogram=tuple(active.histogram[latent].tolist()),
        **units.said(explained, parts, latent),
    )


@dataclass(frozen=True, kw_only=True)
class ExplainedTexts(Explained):
    """The labels of a dictionary that reads a language model."""

    labels: Labels
    """Labels of all latents."""
    names: Mapping[Kind, Sequence[str]]
    """What the labels' values are called; for `labels.text(latent, names)`."""
    wide: RuleScores
    """AUC of the larger rules."""
    held_out: HeldOut
    """What chance gives each label on the same documents, and what strong firings do."""
    summary: Summary
    baselines: Mapping[str, Summary] = field(default_factory=dict)

    @property
    def by_weights(self) -> dict[str, Any] | None:
        """What the labels from weights are worth, if the config has them and files were written."""
        return self.more.get("weights")

    def _repr_html_(self) -> str:
        scored, auc, active = np.array(self.status) == "scored", self.scores.auc, self.activity
        order = np.argsort(np.where(scored, -auc, np.inf), kind="stable")[: scored.sum()]
        rows = [
            (
                str(latent), self.labels.text(latent, self.names), f"{auc[latent]:.3f}",
                f"{active.density[latent]:.2%}", f"{active.max_activation[latent]:.3g}",
            )
            for latent in order.tolist()
        ]  # fmt: skip
        columns = ("latent", "label", "AUC", "fires", "largest")
        note = f"{len(rows):,} of {len(self.status):,} latents fire often enough to be scored"
        return notebook.table("Labels, the best first", columns, rows, note)


@dataclass(frozen=True, eq=False)
class TextUnits(Units[SplitFirings, ExplainedTexts]):
    """The rows of texts."""

    token_strings: Sequence[str]
    """`activations_cache.Pieces`, or what stands for each id everywhere."""
    null: Null = None
    """What stands beside the curve of completeness, and beside labels from weights."""
    vectors: WordVectors | None = None
    """What gives words their output embeddings, for labels from weights."""
    name = "contexts"
    n_sampled = 32_768

    @cached_property
    def reader(self) -> TextReader:
        """Reads the texts."""
        return TextReader(self.cache, self.token_strings)

    @cached_property
    def splits(self) -> Mapping[str, SplitRows]:
        """The rows of the splits and the texts at them."""
        splits = {split: self.reader.read(split) for split in SPLITS}
        for name, split in splits.items():
            if len(split.ids) == 0:
                what = f"split {name!r} must have rows, got none; build a larger cache"
                raise MonosemaError(what)
        made_from, scored_on = (splits[name].text.example for name in SPLITS)
        shared = np.intersect1d(made_from, scored_on)
        if len(shared):
            raise MonosemaError(
                f"splits must not share examples, got {len(shared)} in both, the first {shared[0]}"
            )
        return splits

    @property
    def n_shown(self) -> int:
        """Contexts with the largest peaks."""
        return self.config.top_contexts

    def firings(self, split: str, codes: Codes) -> SplitFirings:
        """The codes with the texts."""
        return SplitFirings(split, codes, self.splits[split].text)

    def labelled(self, parts: Sequence[SplitFirings], progress: Progress) -> ExplainedTexts:
        """Rules from the first part, scored on the second."""
        made_from, codes, text = parts[0].codes, parts[1].codes, parts[1].text
        labels = make_labels(made_from, parts[0].text, self.config, progress)
        wanted = labels.eligible & fires_enough(codes, text, self.config)
        generator = np.random.default_rng(self.config.seed)
        partner, exchanged = exchanged_labels(wanted, generator)
        rules, kinds = labels.rules, labels.kinds
        result = SummaryInputs(
            score_rules(rules, kinds, codes, text, wanted),
            score_rules(labels.wide, kinds, codes, text, wanted),
            score_rules(rules.of(partner), kinds, codes, text, exchanged),
            held_out(labels, made_from, codes, text, wanted, self.config, progress),
        )
        active = activity(parts, self.config.histogram_bins)
        live = active.n_fired > 0
        status = np.where(wanted, "scored", np.where(live, "insufficient", "dead"))
        return ExplainedTexts(
            **result._asdict(),
            labels=labels,
            names=self.reader.names,
            status=tuple(status.tolist()),
            activity=active,
            summary=summary_of(result, status, parts, generator),
        )

    def said(
        self, explained: ExplainedTexts, parts: Sequence[SplitFirings], latent: int
    ) -> dict[str, Any]:
        """The rule, and what it is worth on unseen texts."""
        del parts
        labels, unseen = explained.labels, explained.held_out
        listed = labels.rules.value[latent] >= 0
        has_label = bool(listed.any())
        of_words = {
            "weights": labels.rules.weight, "joint": labels.joint,
            "information": labels.information, "npmi": labels.npmi,
        }  # fmt: skip
        return {
            "label": labels.text(latent, explained.names),
            "kind": labels.kinds[labels.rules.kind[latent]] if has_label else "",
            "words": tuple(labels.words(latent, explained.names)),
            **{name: tuple(array[latent][listed].tolist()) for name, array in of_words.items()},
            "gain": float(labels.gain[latent]) if has_label else None,
            "p_value": float(labels.p_value[latent]) if has_label else None,
            "auc_wide": known_or_none(explained.wide.auc[latent]),
            "p_held_out": known_or_none(unseen.p_value[latent]),
            "auc_strong": known_or_none(unseen.auc_strong[latent]),
            "p_strong": known_or_none(unseen.p_strong[latent]),
            "curve": tuple(map(known_or_none, unseen.curve[latent].tolist())),
            "curve_n": tuple(unseen.curve_n[latent].tolist()),
            "base": known_or_none(unseen.base[latent]),
        }

    def shown(self, parts: Sequence[SplitFirings]) -> Callable[[int], Iterator[Context]]:
        """Contexts of both splits."""
        return ContextFinder(parts, self.cache.examples, self.reader.pieces, self.config).find

    def more(
        self,
        dictionary: SparseAutoencoder,
        parts: Sequence[SplitFirings],
        out_dir: Path,
        progress: Progress,
    ) -> dict[str, Any]:
        """Which concepts have a latent, and what labels from weights are worth."""
        null, names, config = self.null, self.reader.names["word"], self.config
        concepts = concepts_in(self.reader.names, concept_families())
        n_concepts = (config.atlas or AtlasConfig()).n_concepts
        completeness = partial(concepts_with_a_latent, concepts, n=n_concepts, progress=progress)
        result: dict[str, Any] = {"completeness": completeness(parts)}
        if config.weights:
            made = labels_by_weights(dictionary, parts, names, self.vectors, config)
            write_weight_labels(out_dir, made, names)
            result["weights"] = made.summary
        if null == "random":
            l0 = len(parts[0].codes.row) / max(parts[0].codes.n_rows, 1)
            generator = torch.Generator().manual_seed(config.seed)
            random = random_dictionary(dictionary, l0, generator)
            others = self.encoded(random, progress)
            null = {**completeness(others), "of": RANDOM}
            if config.weights:
                of_random = labels_by_weights(random, others, names, self.vectors, config)
                null["weights"] = of_random.summary
        if null is not None:
            result["completeness"]["null"] = {name: null[name] for name in OF_NULL if name in null}
            if config.weights and null.get("weights"):
                result["weights"] |= {"null": {**null["weights"], "of": null["of"]}}
        return result

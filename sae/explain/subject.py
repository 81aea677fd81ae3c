"""What is explained: a dictionary on a cache, its windows, and its scorers by name.

The windows are collected once for whatever needs them.

Labels without a language model are executable rules, explanation and simulator in one. Their scores
stand beside those of a language model's labels: same windows, same scorers, same controls; nothing
is asked and nothing can fail.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from activations_cache import seals
from activations_cache.checks import Progress, silent
from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.explain.assemble import Assembler
from sae.explain.collect import collect, write_windows
from sae.explain.config import Kind, RuleConfig, ScorerName, WindowConfig
from sae.explain.explainers import Explanation
from sae.explain.judges import Judge, RuleJudge, Score, Scorer
from sae.explain.labels import Labels
from sae.explain.model_scorers import (
    Ablation,
    Divergence,
    Embed,
    Embedding,
    LogLikelihood,
    NextLogProbs,
    OutputSide,
    Sensitivity,
    Surprisal,
)
from sae.explain.pipeline import LatentOutcome, shuffled_windows, too_few
from sae.explain.question_scorers import Detection, Fuzzing, Intruder, Rubric, Simulation
from sae.explain.reservoir import State
from sae.explain.results import STEM as BY_MODEL
from sae.explain.results import summarise, write_results
from sae.explain.tables import LatentRecord
from sae.explain.text_at_rows import Cache
from sae.explain.windows import LatentWindows, WordRule, shuffled

_SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (Detection(), Fuzzing(), Simulation(), Rubric(), Intruder())
}

WITH_TOOLS: tuple[ScorerName, ...] = (
    "embedding", "surprisal", "output side", "sensitivity", "ablation",
)  # fmt: skip
"""Those that need a model."""


@dataclass(frozen=True)
class Tools:
    """What a model gives to scorers."""

    embed: Embed
    """Texts to vectors."""
    log_likelihood: LogLikelihood
    """How probable a text is after a prefix."""
    next_log_probs: NextLogProbs
    """What amplifying a latent does to the next token."""
    promoted: Int[Tensor, "d_sae k"]
    """Token ids by the logit lens."""
    peaks_on: Callable[[int, Sequence[str]], list[float]]
    """A latent's largest activation on texts."""
    divergence: Divergence
    """How far other activations of a latent on a window's tokens move the model."""


def scorers_of(names: Sequence[ScorerName], tools: Tools | None = None) -> tuple[Scorer, ...]:
    """In the order of the names.

    Raises:
        ValueError: If one needs a model and there is none.
    """
    known = dict(_SCORERS)
    if tools is not None:
        more: tuple[Scorer, ...] = (
            Embedding(tools.embed),
            Surprisal(tools.log_likelihood),
            OutputSide(tools.next_log_probs, tools.promoted),
            Sensitivity(None, tools.peaks_on),
            Ablation(tools.divergence),
        )
        known |= {scorer.name: scorer for scorer in more}
    missing = [name for name in names if name not in known]
    if missing:
        raise MonosemaError(
            f"scorers must be {', '.join(known)} without a model, got {missing[0]!r}; "
            "use `sae explain`, which has one"
        )
    return tuple([known[name] for name in names])


@dataclass(frozen=True)
class Subject:
    """What is explained."""

    dictionary: SparseAutoencoder
    """The dictionary."""
    cache: Cache
    """Activations and texts, split by document."""
    hook_point: str
    """Which activations the dictionary reads."""
    token_strings: Sequence[str]
    """`activations_cache.Pieces`, or what stands for each id everywhere."""
    tools: Tools | None = None
    """What scorers need that look into the model."""
    known: dict[object, tuple[State, Assembler]] = field(default_factory=dict, repr=False)
    """What was collected, by its settings and where it was written."""

    def collected(
        self,
        config: WindowConfig,
        out_dir: Path | None = None,
        *,
        identity: dict[str, object] | None = None,
        progress: Progress | None = None,
    ) -> tuple[State, Assembler]:
        """Go over the cache once, and write the windows; an interrupted pass goes on.

        Args:
            config: What to keep.
            out_dir: Where windows.parquet and activity.parquet go; None writes nothing.
            identity: What the saved state of an interrupted pass depends on.
            progress: Called in both stages.
        """
        if (config, out_dir) in self.known:
            return self.known[config, out_dir]
        report, path = progress or silent, None
        if out_dir is not None:
            out_dir.mkdir(parents=True, exist_ok=True)
            path = out_dir / "windows.state.safetensors"
        state = collect(
            self.dictionary, self.cache, self.hook_point, config,
            state_path=path, identity=identity, progress=report,
        )  # fmt: skip
        tokens = self.cache.examples.tokens.numpy()
        assembler = Assembler(state, tokens, self.token_strings)
        if out_dir is not None and path is not None:
            write_windows(out_dir, state, assembler, report)
            seals.remove(out_dir, (path.name,))
        self.known[config, out_dir] = state, assembler
        return state, assembler


def chosen(state: State, n: int, named: Sequence[int], seed: int) -> list[int]:
    """The latents that are named, or n of the live ones by a hash.

    Raises:
        ValueError: If a named one is beyond the dictionary.
    """
    beyond = [latent for latent in named if latent >= state.d_sae]
    if beyond:
        raise MonosemaError(f"latents must be below d_sae={state.d_sae}, got {beyond[0]}")
    live = state.counts["n_fired"].nonzero()[0].tolist()
    return sorted(named) if named else sorted(shuffled(live, "latents", seed)[:n])


def rule_of(labels: Labels, latent: int, names: Mapping[Kind, Sequence[str]]) -> WordRule | None:
    """The rule of a label that text alone can be tested by: of words, of the word before, of both.

    Tokens count as the words that they spell. Labels of other kinds (supersense, source, position)
    speak of more than a window's text; they have the AUC of the corpus scores and no rule here.
    """
    kind = labels.kinds[labels.rules.kind[latent]]
    words = [word.strip().lower() for word in labels.words(latent, names)]
    if not words or kind not in ("word", "previous word", "word pair", "token"):
        return None
    weights = labels.rules.weight[latent][: len(words)].tolist()
    known = dict(zip(words, weights, strict=True))
    return WordRule(known, previous=kind == "previous word", pair=kind == "word pair")


async def score_rule(
    latent: LatentWindows, rule: WordRule, scorers: Sequence[Scorer], label: str = ""
) -> tuple[Score, ...]:
    """Score a rule by executing it, with the scorers that a language model is asked by.

    `label` is what the rule is called, for scorers that read it.
    """
    judge: Judge = RuleJudge(rule)
    return tuple([await scorer.score(latent, label, judge) for scorer in scorers])


METHOD = "corpus rule/1"
STEM = "rules"
"""Of the files: rules.jsonl, rules.parquet and rules.json."""


def score_rules_of(
    subject: Subject,
    labels: Labels,
    names: Mapping[Kind, Sequence[str]],
    config: RuleConfig,
    out_dir: Path,
    *,
    identity: dict[str, object] | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Execute the rules of some latents on their score windows, and write what came of it.

    Args:
        subject: Whose latents.
        labels: Theirs.
        names: What the labels' values are called.
        config: How many, which scorers, which windows.
        out_dir: Where the files go.
        identity: What the saved state of an interrupted pass depends on.
        progress: Called in every stage.

    Returns:
        The summary, as it is written to rules.json.
    """
    report = progress or silent
    state, assembler = subject.collected(
        config.windows, out_dir, identity=identity, progress=report
    )
    latents = chosen(state, config.n_latents, (), config.windows.seed)
    rules = {latent: rule_of(labels, latent, names) for latent in latents}
    scored = [latent for latent in latents if rules[latent] is not None]
    partner = dict(zip(scored, scored[1:] + scored[:1], strict=True))
    result, scorers = [], scorers_of(config.scorers, subject.tools)
    for done, latent in enumerate(latents, 1):
        other = rules[partner[latent]] if latent in partner else None
        text = labels.text(latent, names)
        result.append(
            _explained(
                assembler.of(latent), text, rules[latent], other, scorers, config.min_windows
            )
        )
        report(done, len(latents), "rules executed")
    summary = {**summarise(result, None), "config": asdict(config)}
    write_results(out_dir, result, summary, STEM)
    return summary


def _explained(
    windows: LatentWindows,
    text: str,
    rule: WordRule | None,
    other: WordRule | None,
    scorers: Sequence[Scorer],
    min_windows: int,
) -> LatentOutcome:
    if (outcome := too_few(windows, min_windows)) is not None:
        return outcome
    if rule is None:
        return LatentOutcome(
            windows.latent, "insufficient", "no label that a text can be tested by"
        )
    scores = asyncio.run(score_rule(windows, rule, scorers, text))
    controls = {}
    if other is not None and other != rule:
        words = ", ".join(other.weights)
        controls["another's label"] = asyncio.run(score_rule(windows, other, scorers, words))
    shuffled = asyncio.run(score_rule(shuffled_windows(windows), rule, scorers, text))
    controls["shuffled windows"] = shuffled
    label = Explanation(windows.latent, text, METHOD)
    return LatentOutcome(windows.latent, "done", "", label, scores, controls)


def by_level(
    path: Path, summary: Mapping[str, Any], latents: Sequence[LatentRecord]
) -> dict[str, Any]:
    """By fifths of the activation: how specific labels are, how sensitive latents, what judges say.

    Sensitivity: of the rows of unseen documents with one of a label's words, the share on which
    the latent reaches the fifth. The rubric is a language model's where one was asked.
    """
    curves = []
    for one in (one for one in latents if one.status == "scored" and one.base):
        explained = np.nan_to_num(np.array(one.curve, float)) * np.array(one.curve_n)
        at_least = explained[::-1].cumsum()[::-1]
        curves.append(at_least / (one.base * summary["n_rows_score"]))
    asked, executed = (_outcomes(path / f"{stem}.jsonl") for stem in (BY_MODEL, STEM))
    scores = [one["scores"] for one in asked]
    by_model = any(score["scorer"] == "rubric" for of_one in scores for score in of_one)
    graded = asked if by_model else executed
    return {
        "specificity": summary["curve"],
        "specificity_by_chance": summary["base"],
        "sensitivity": np.mean(curves, axis=0).tolist() if curves else [],
        "judge": "a language model" if by_model else "executed rules",
        "rubric": _rubric([one["scores"] for one in graded]),
        "rubric_of_another_label": _rubric([
            one["controls"].get("another's label", []) for one in graded
        ]),
        "sensitivity_by_judge": _mean_of(scores, "sensitivity"),
    }


def _outcomes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in seals.read(path).splitlines()] if path.is_file() else []


def _rubric(scores: Sequence[Sequence[dict[str, Any]]]) -> list[float | None]:
    """Mean grade, as a share of the highest, of each fifth."""
    details = [score["details"] for each in scores for score in each if score["scorer"] == "rubric"]
    grades = [[one[f"level {n}"] for one in details if f"level {n}" in one] for n in range(5)]
    return [sum(each) / len(each) / 3 if each else None for each in grades]


def _mean_of(scores: Sequence[Sequence[dict[str, Any]]], name: str) -> float | None:
    values = [s["value"] for each in scores for s in each if s["scorer"] == name]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""Labels without a language model, put before the scorers of labels by one: rules are executed.

The scores stand beside those of a language model's labels: same windows, same scorers, same
controls; nothing is asked and nothing can fail.

Labels without a language model as executable rules: explanation and simulator in one.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from activations_cache.checks import Progress, silent
from sae.explain.config import Kind, RuleConfig
from sae.explain.explainers import Explanation
from sae.explain.judges import Judge, RuleJudge, Score, Scorer, WordRule
from sae.explain.labels import Labels
from sae.explain.pipeline import LatentOutcome, shuffled_windows
from sae.explain.results import summarise, write_results
from sae.explain.subject import Subject, chosen, scorers_of
from sae.explain.windows import LatentWindows


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
    least = min(len(windows.of("explain", "active")), len(windows.of("score", "active")))
    if least < min_windows:
        reason = f"{least} active windows of {min_windows} wanted"
        return LatentOutcome(windows.latent, "insufficient", reason)
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

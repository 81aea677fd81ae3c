"""Labels without a language model as executable rules: explanation and simulator in one."""

from collections.abc import Mapping, Sequence

from sae.explain.config import Kind
from sae.explain.judges import Judge, RuleJudge, WordRule
from sae.explain.labels import Labels
from sae.explain.scorers.score import Score, Scorer
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

"""The latents of a dictionary for the browser, one after the other, from the files about it."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from sae.browser import Attribution, Example, Explanation, Latent, Score
from sae.browser.latent import Status
from sae.cli.pictures import Pictures
from sae.explain.atlas.neighbours import Nearest, Together
from sae.explain.examples import Context
from sae.explain.logit_lens import PromotedTokens
from sae.explain.tables import LatentRecord, iter_examples

STATUS: dict[str, Status] = {
    "scored": "scored", "insufficient": "insufficient", "dead": "dead", "unlabelled": "live",
}  # fmt: skip


class Known(NamedTuple):
    """What is known of all latents beside their records and examples."""

    path: Path
    """The dictionary's directory, for the steering command."""
    strings: list[str]
    """Each token id as text."""
    neighbours: Nearest | None
    together: list[tuple[Together, ...]] | None
    lens: PromotedTokens | None
    explained: Mapping[int, Mapping[str, Any]]
    """What a language model said, as in explanations.jsonl."""
    attributed: Mapping[int, tuple[Attribution, ...]]
    pictures: Pictures | None = None
    """The images, of a cache of images."""


class Latents:
    """Latents in their order; the examples are read from the disk meanwhile."""

    def __init__(self, records: list[LatentRecord], examples: Path, known: Known) -> None:
        """Take what is there."""
        self._records, self._examples, self._known = records, examples, known

    def __iter__(self) -> Iterator[Latent]:
        """One latent after the other."""
        examples = iter_examples(self._examples)
        number, contexts = next(examples, (-1, []))
        for record in self._records:
            mine: list[Context] = []
            if number == record.latent:
                mine = contexts
                number, contexts = next(examples, (-1, []))
            yield _latent(record, mine, self._known)


def _latent(record: LatentRecord, contexts: list[Context], known: Known) -> Latent:
    number, said = record.latent, known.explained.get(record.latent)
    n_fired = record.n_fired_explain + record.n_fired_score
    figures: dict[str, float | None] = {"auc": record.auc, "n_fired": float(n_fired)}
    for score in (said or {}).get("scores", ()):
        figures[f"llm:{score['scorer']}"] = score["value"]
    return Latent(
        number=number,
        status=STATUS[record.status],
        density=record.density,
        max_activation=record.max_activation,
        n_fired=n_fired,
        label=record.label,
        label_kind=record.kind,
        figures=figures,
        explanations=_explanations(said),
        scores=(*_own_scores(record), *_scores(said)),
        histogram=record.histogram,
        words=tuple(zip(record.words, record.weights, strict=True)),
        promoted=_tokens(known, number, "promoted"),
        suppressed=_tokens(known, number, "suppressed"),
        examples=tuple(_example(c, known.pictures) for c in contexts if c.tokens or known.pictures),
        nearest=_pairs(known.neighbours, number),
        cofiring=known.together[number] if known.together else (),
        attributions=known.attributed.get(number, ()),
        command="" if known.pictures else _command(known.path, number),
    )


def _example(context: Context, pictures: Pictures | None) -> Example:
    image = pictures.image(context.example) if pictures else None
    return Example(context.tokens, context.activations, context.peak, context.source, image)


def _command(path: Path, latent: int) -> str:
    return f"sae steer {shlex.quote(str(path))} --latent {latent}=5x --prompt 'I think'"


def _tokens(known: Known, latent: int, end: str) -> tuple[tuple[str, float | None], ...]:
    if known.lens is None:
        return ()
    tokens: Int[Tensor, "d_sae k"] = getattr(known.lens, end)
    logits: Float[Tensor, "d_sae k"] = getattr(known.lens, f"{end}_logits")
    pairs = zip(tokens[latent].tolist(), logits[latent].tolist(), strict=True)
    return tuple((known.strings[token], logit) for token, logit in pairs)


def _pairs(found: Nearest | None, latent: int) -> tuple[tuple[int, float], ...]:
    if found is None:
        return ()
    pairs = zip(found.latent[latent].tolist(), found.cosine[latent].tolist(), strict=True)
    return tuple(pairs)


def _own_scores(record: LatentRecord) -> Iterator[Score]:
    """Scores of the label made without a language model, with its controls."""
    if record.status != "scored":
        return
    yield Score(
        "AUC", record.auc, record.low, record.high, 0.5, note=_chance(record, record.p_held_out)
    )
    if record.control_auc is not None:
        yield Score("AUC", record.control_auc, floor=0.5, control="another latent's label")
    if record.auc_wide is not None:
        note = "of the larger rule, which is not what the label says"
        yield Score("AUC of the larger rule", record.auc_wide, floor=0.5, note=note)
    if record.auc_strong is not None:
        note = _chance(record, record.p_strong)
        yield Score("AUC, strongest tenth", record.auc_strong, floor=0.5, note=note)


def _chance(record: LatentRecord, p: float | None) -> str:
    what = "classes" if record.kind in {"class", "group"} else "texts"
    return "" if p is None else f"permuted {what} score as well in {p:.1%} of the copies"


def _explanations(said: Mapping[str, Any] | None) -> tuple[Explanation, ...]:
    found = (said or {}).get("explanation")
    if not found:
        return ()
    by = found["client"] or found["method"]
    if found.get("borrowed_from") is not None:
        by = f"{by}, borrowed from latent {found['borrowed_from']}"
    return (Explanation(found["text"], by),)


def _scores(said: Mapping[str, Any] | None) -> Iterator[Score]:
    if said is None:
        return
    for control, scores in {"": said["scores"], **said["controls"]}.items():
        for score in scores:
            ends = (score["value"], score["low"], score["high"], score["floor"], score["n"])
            yield Score(score["scorer"], *ends, control=control, note=score["reason"])

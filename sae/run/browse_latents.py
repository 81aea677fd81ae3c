"""What the browser shows of each latent: examples, scores, attribution, pictures."""

import io
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress
from activations_cache.config import SPLITS
from activations_cache.hooks import capture
from activations_cache.image_rows import CachedImages
from activations_cache.models import LoadedModel
from activations_cache.preprocessing import as_rgb
from activations_cache.probe import record_of
from activations_cache.tokens import Pieces
from sae.autoencoder import SparseAutoencoder
from sae.browser import Example, Image, Latent, ShownAttribution, ShownExplanation, ShownScore
from sae.browser.latent import Status
from sae.browser.server import TextReading
from sae.explain.examples import Context
from sae.explain.firings import CofiringPairs
from sae.explain.logit_lens import PromotedTokens
from sae.explain.tables import LatentRecord, iter_examples
from sae.neighbours import Nearest
from sae.run.context import Run
from sae.steer.attribution import Metric, ablation_effects, attribute

LONGEST = 224
"""Pixels of a thumbnail's side, at most."""
QUALITY = 80


class Thumbnails:
    """What the model saw of a cache's images: the square that its patches lie on.

    Args:
        cache: A cache of images.

    Raises:
        FileNotFoundError: If the images are not there any more.
    """

    def __init__(self, cache: ActivationCache) -> None:
        self._images = CachedImages(cache)
        self._size = min(LONGEST, self._images.preprocessing.size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self._images.grid

    def image(self, example: int) -> Image:
        """What the browser needs to know of an image."""
        name, grid = self._images.records[example].name, self._images.grid
        return Image(number=example, name=name, grid=grid, width=self._size, height=self._size)

    def jpegs(self, examples: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Numbers and JPEG bytes, one image in memory at a time."""
        made = self._images.preprocessing
        for example in examples:
            image = made.square(as_rgb(self._images.image(example), made.background))
            out = io.BytesIO()
            image.resize((self._size, self._size)).save(out, "JPEG", quality=QUALITY)
            yield example, out.getvalue()


STATUS: dict[str, Status] = {
    "scored": "scored", "insufficient": "insufficient", "dead": "dead", "unlabelled": "live",
}  # fmt: skip


class LatentContext(NamedTuple):
    """What is about of all latents beside their records and examples."""

    path: Path
    """The dictionary's directory, for the steering command."""
    pieces: Pieces | None
    """What turns tokens into text; None without a model."""
    neighbours: Nearest | None
    cofiring: list[tuple[CofiringPairs, ...]] | None
    lens: PromotedTokens | None
    explained: Mapping[int, Mapping[str, Any]]
    """What a language model said, as in explanations.jsonl."""
    attributed: Mapping[int, tuple[ShownAttribution, ...]]
    pictures: Thumbnails | None = None
    """The images, of a cache of images."""


class BrowsedLatents:
    """Latents in their order; the examples are read from the disk meanwhile."""

    def __init__(self, records: list[LatentRecord], examples: Path, about: LatentContext) -> None:
        """Take what is there."""
        self._records, self._examples, self._about = records, examples, about

    def __iter__(self) -> Iterator[Latent]:
        """One latent after the other."""
        examples = iter_examples(self._examples)
        number, contexts = next(examples, (-1, []))
        for record in self._records:
            mine: list[Context] = []
            if number == record.latent:
                mine = contexts
                number, contexts = next(examples, (-1, []))
            yield _latent(record, mine, self._about)


def _latent(record: LatentRecord, contexts: list[Context], about: LatentContext) -> Latent:
    number, said = record.latent, about.explained.get(record.latent)
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
        scores=(*_label_scores(record), *_scores(said)),
        histogram=record.histogram,
        words=tuple(zip(record.words, record.weights, strict=True)),
        promoted=_tokens(about, number, "promoted"),
        suppressed=_tokens(about, number, "suppressed"),
        examples=tuple(_example(c, about.pictures) for c in contexts if c.tokens or about.pictures),
        nearest=_pairs(about.neighbours, number),
        cofiring=about.cofiring[number] if about.cofiring else (),
        attributions=about.attributed.get(number, ()),
        command="" if about.pictures else _command(about.path, number),
    )


def _example(context: Context, pictures: Thumbnails | None) -> Example:
    image = pictures.image(context.example) if pictures else None
    return Example(context.tokens, context.activations, context.peak, context.source, image)


def _command(path: Path, latent: int) -> str:
    return f"sae steer {shlex.quote(str(path))} --latent {latent}=5x --prompt 'I think'"


def _tokens(about: LatentContext, latent: int, end: str) -> tuple[tuple[str, float | None], ...]:
    if about.lens is None or about.pieces is None:
        return ()
    tokens: Int[Tensor, "d_sae k"] = getattr(about.lens, end)
    logits: Float[Tensor, "d_sae k"] = getattr(about.lens, f"{end}_logits")
    pairs = zip(tokens[latent].tolist(), logits[latent].tolist(), strict=True)
    return tuple((about.pieces[token], logit) for token, logit in pairs)


def _pairs(neighbours: Nearest | None, latent: int) -> tuple[tuple[int, float], ...]:
    if neighbours is None:
        return ()
    pairs = zip(neighbours.latent[latent].tolist(), neighbours.cosine[latent].tolist(), strict=True)
    return tuple(pairs)


def _label_scores(record: LatentRecord) -> Iterator[ShownScore]:
    """Scores of the label made without a language model, with its controls."""
    if record.status != "scored":
        return
    yield ShownScore(
        "AUC", record.auc, record.low, record.high, 0.5, note=_chance(record, record.p_held_out)
    )
    if record.control_auc is not None:
        yield ShownScore("AUC", record.control_auc, floor=0.5, control="another latent's label")
    if record.auc_wide is not None:
        note = "of the larger rule, which is not what the label says"
        yield ShownScore("AUC of the larger rule", record.auc_wide, floor=0.5, note=note)
    if record.auc_strong is not None:
        note = _chance(record, record.p_strong)
        yield ShownScore("AUC, strongest tenth", record.auc_strong, floor=0.5, note=note)


def _chance(record: LatentRecord, p: float | None) -> str:
    kinds = {"class": "classes", "group": "classes", "image word": "images"}
    what = kinds.get(record.kind, "texts")
    return "" if p is None else f"permuted {what} score as well in {p:.1%} of the copies"


def _explanations(said: Mapping[str, Any] | None) -> tuple[ShownExplanation, ...]:
    explanation = (said or {}).get("explanation")
    if not explanation:
        return ()
    return (ShownExplanation(explanation["text"], explanation["client"] or explanation["method"]),)


def _scores(said: Mapping[str, Any] | None) -> Iterator[ShownScore]:
    if said is None:
        return
    for control, scores in {"": said["scores"], **said["controls"]}.items():
        for score in scores:
            ends = (score["value"], score["low"], score["high"], score["floor"], score["n"])
            yield ShownScore(score["scorer"], *ends, control=control, note=score["reason"])


class BrowsedDictionary(NamedTuple):
    """A dictionary to browse, and where things about it lie."""

    name: str
    dictionary: SparseAutoencoder
    path: Path
    """Its directory, as the steering command is to name it."""
    explained: Path
    """Directory that `sae explain` wrote."""
    hook_point: str


class BrowseContext(NamedTuple):
    """What the dictionaries share; a part that is not there leaves parts of the browser out."""

    cache: ActivationCache | None
    loaded: LoadedModel | None
    pieces: Pieces | None
    """What turns tokens into text; None without a model."""
    pictures: Thumbnails | None = None
    """The images of a cache of images."""


N_PROMPTS, N_TOKENS, N_LATENTS, N_SHOWN = 8, 32, 24, 2
N_ABLATED = 4
"""Of each prompt's latents so many are really turned off."""

NOTE = (
    "Gradient times activation for the log-probability of the next token. An effect is measured: "
    "what turning the latent off at its strongest position takes from it, in nats."
)


def attributions_of(
    dictionary: SparseAutoencoder, hook_point: str, context: BrowseContext, report: Progress
) -> dict[int, tuple[ShownAttribution, ...]]:
    """For the latents that matter most to some held-out predictions, the prompts and shares.

    Each prompt costs one backward pass, and one forward pass in which the first few latents are
    really turned off, each at its strongest position. A model that does not predict the next token
    has none.
    """
    hooks_read, writes = dictionary.config.hook_points_or(hook_point)
    if (
        context.cache is None
        or context.loaded is None
        or len(hooks_read) != 1
        or writes != hooks_read
    ):
        return {}
    if not record_of(context.loaded.model).predicts_next:
        return {}
    examples, placed = context.cache.examples, dictionary.at(*hooks_read)
    first_position = context.cache.manifest.plan.skip_positions
    held_out = (examples.split == SPLITS.index("hold")).nonzero().flatten()
    chosen = held_out[:: max(1, len(held_out) // N_PROMPTS)][:N_PROMPTS].tolist()
    by_latent: dict[int, list[ShownAttribution]] = {}
    for done, example in enumerate(chosen, 1):
        tokens = examples.tokens[example]
        tokens = tokens[tokens >= 0][: N_TOKENS + 1].long()
        if len(tokens) > first_position + 1:
            for latent, shown in _of_prompt(placed, context, tokens, first_position):
                by_latent.setdefault(latent, []).append(shown)
        report(done, len(chosen), "predictions attributed")
    return {
        latent: tuple(sorted(shown, key=_size, reverse=True)[:N_SHOWN])
        for latent, shown in by_latent.items()
    }


def _size(shown: ShownAttribution) -> float:
    return max(map(abs, shown.values))


def _of_prompt(
    placed: SparseAutoencoder,
    context: BrowseContext,
    tokens: Int[Tensor, " pos"],
    first_position: int,
) -> Iterator[tuple[int, ShownAttribution]]:
    """The latents on which the last token depends most, each with its score at every position."""
    assert context.loaded is not None
    assert context.pieces is not None
    model = context.loaded.model
    prompt, target = tokens[None, :-1], int(tokens[-1])
    metric = _log_probability(target)
    scored = attribute(model, placed, prompt, metric, first_position=first_position)
    strongest: dict[int, int] = {}
    for position, latent, score in scored.top(N_LATENTS):
        if score:  # what does not fire fills the places of few latents
            strongest.setdefault(latent, position)
    entries = [(position, latent) for latent, position in strongest.items()][:N_ABLATED]
    effects = ablation_effects(model, placed, prompt, metric, entries).tolist() if entries else []
    measured = {latent: effect for (_, latent), effect in zip(entries, effects, strict=True)}
    texts = context.pieces.row(tokens.tolist())
    for latent in strongest:
        values = (scored.scores * (scored.latents.indices == latent)).sum(dim=1).tolist()
        yield (
            latent,
            ShownAttribution(texts[:-1], tuple(values), texts[-1], measured.get(latent), NOTE),
        )


def _log_probability(target: int) -> Metric:
    def metric(logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, " example"]:
        return logits[:, -1].float().log_softmax(dim=1)[:, target]

    return metric


MAX_TOKENS = 512
PER_TOKEN = 16


class PromptReader:
    """Reads texts with a run's model and dictionaries, which are loaded for the first text."""

    def __init__(self, run: Run) -> None:
        """Take the run; nothing is loaded yet."""
        self._run = run

    @torch.no_grad()
    def __call__(self, name: str, text: str) -> TextReading:
        """The strongest latents of each token.

        Raises:
            ValueError: If the text has too many tokens, or none.
        """
        run, dictionary = self._run, self._run.dictionaries[name]
        text = text.encode(errors="replace").decode()  # a tokenizer takes no lone surrogate
        ids = torch.tensor([run.loaded.tokenizer(text)["input_ids"]])
        n = ids.shape[1]
        if not 0 < n <= MAX_TOKENS:
            raise MonosemaError(f"text must have 1 to {MAX_TOKENS} tokens, got {n}; shorten it")
        points, _ = dictionary.config.hook_points_or(run.hook_point)
        with capture(run.loaded.model, list(points)) as forward:
            rows = forward(ids)
        latents = dictionary.encode(torch.cat([rows[point][0].float() for point in points], dim=1))
        skipped = min(run.config.cache.skip_positions, n)
        values, order = latents.values.sort(dim=1, descending=True)
        numbers = latents.indices.gather(1, order)
        fires = [
            tuple((j, v) for j, v in zip(row, strengths, strict=True) if v > 0)[:PER_TOKEN]
            for row, strengths in zip(numbers.tolist(), values.tolist(), strict=True)
        ]
        fires[:skipped] = [()] * skipped
        return TextReading(run.pieces.row(ids[0].tolist()), tuple(fires), skipped)

"""Finding latents: by texts or pictures in which they fire and do not, and by directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.hooks import capture
from activations_cache.models import Tokenizer
from sae.autoencoder import SparseAutoencoder
from sae.neighbours import Nearest, nearest


@dataclass(frozen=True, kw_only=True)
class MatchingLatent:
    """A latent that fires in all positive texts, or pictures, and in no negative one."""

    latent: int
    """Its number."""
    score: float
    """Its weakest peak among the positive texts, over the latent's maximum where that is known."""
    weakest: float
    """The same in the dictionary's units."""
    tokens: tuple[int, ...]
    """The token, or patch, on which it fires most in each positive one, as a position."""


class Counting(NamedTuple):
    """Which tokens of a text count."""

    where: Literal["any", "last"] = "any"
    """Whether a latent may fire on any token or must on the last one."""
    first_position: int = 1
    """Positions below this one, the attention sinks, do not count."""


EVERYWHERE = Counting()

FEWEST_PAIRS = 4
"""Texts with a control of each, below which a half of them says nothing."""


def find_latents(
    model: nn.Module,
    tokenizer: Tokenizer,
    placed: SparseAutoencoder,
    positives: Sequence[str],
    negatives: Sequence[str] = (),
    counting: Counting = EVERYWHERE,
    *,
    progress: Progress | None = None,
) -> list[MatchingLatent]:
    """Latents that fire in every positive text and in no negative one, the strongest first.

    A concept of which many are sure needs few texts: what is common to all of them by chance is
    taken out by negatives that are like them in everything else.

    Args:
        model: A model in evaluation mode.
        tokenizer: The model's.
        placed: The dictionary; with statistics the score is in units of each latent's maximum.
        positives: Texts.
        negatives: Texts.
        counting: Which tokens count.
        progress: Called after each text.

    Raises:
        ValueError: If there is no positive text, or one has no token that counts.
    """
    if not positives:
        raise MonosemaError("positives must hold at least one text, got none")
    peaks = text_peaks(model, tokenizer, placed, (*positives, *negatives), counting, progress)
    return _in_all_and_none(placed, peaks[: len(positives)], peaks[len(positives) :])


@torch.no_grad()
def find_in_pictures(
    model: nn.Module,
    placed: SparseAutoencoder,
    positives: Float[Tensor, "example 3 size size"],
    negatives: Float[Tensor, "other 3 size size"],
    n_prefix: int,
    options: Mapping[str, Any] | None = None,
) -> list[MatchingLatent]:
    """Latents that fire on a patch of every positive picture and on none of a negative one.

    Args:
        model: A vision tower in evaluation mode.
        placed: The dictionary.
        positives: Pixels as the model reads them.
        negatives: The same.
        n_prefix: Positions before the first patch; `tokens` of the result count from it.
        options: Of the model's forward.

    Raises:
        ValueError: If there is no positive picture.
    """
    if not len(positives):
        raise MonosemaError("positives must hold at least one picture, got none")
    weight, peaks = next(model.parameters()), []
    for pixels in (*positives, *negatives):
        with capture(model, [placed.hook_point]) as run:
            x = run(pixels[None].to(weight), **(options or {}))[placed.hook_point][0]
        peaks.append(LatentPeaks(*placed.encode_dense(x[n_prefix:].float()).max(dim=0)))
    return _in_all_and_none(placed, peaks[: len(positives)], peaks[len(positives) :])


def _in_all_and_none(
    placed: SparseAutoencoder,
    positives: Sequence["LatentPeaks"],
    negatives: Sequence["LatentPeaks"],
) -> list[MatchingLatent]:
    """The latents with a peak in each of the first and none in the others, the strongest first."""
    weakest = torch.stack([peak.values for peak in positives]).amin(dim=0)
    if negatives:
        largest = torch.stack([peak.values for peak in negatives]).amax(dim=0)
        weakest = weakest * (largest <= 0)
    scores = weakest
    if placed.stats is not None:
        scores = weakest / placed.stats.max_activation.to(weakest).clamp_min(1e-12)
    order = scores.argsort(descending=True, stable=True)[: int((weakest > 0).sum())].tolist()
    return [
        MatchingLatent(
            latent=latent,
            score=float(scores[latent]),
            weakest=float(weakest[latent]),
            tokens=tuple(int(peak.at[latent]) for peak in positives),
        )
        for latent in order
    ]


class LatentPeaks(NamedTuple):
    """How every latent fires on one text or picture."""

    values: Float[Tensor, " d_sae"]
    """Its largest activation."""
    at: Int[Tensor, " d_sae"]
    """The position of that."""


def text_peaks(
    model: nn.Module,
    tokenizer: Tokenizer,
    placed: SparseAutoencoder,
    texts: Sequence[str],
    counting: Counting = EVERYWHERE,
    progress: Progress | None = None,
) -> list[LatentPeaks]:
    """Read texts; for each the largest activation of every latent.

    Raises:
        ValueError: If a text has no token that counts.
    """
    peaks = []
    for text in texts:
        peaks.append(_peaks(model, tokenizer, placed, text, counting))
        (progress or silent)(len(peaks), len(texts), "texts")
    return peaks


class MeanRows(NamedTuple):
    """The mean row of each text, over the positions that count."""

    stream: Float[Tensor, "example d_out"]
    latents: Float[Tensor, "example d_sae"]


@torch.no_grad()
def mean_rows(
    model: nn.Module,
    tokenizer: Tokenizer,
    placed: SparseAutoencoder,
    texts: Sequence[str],
    first_position: int = 1,
    progress: Progress | None = None,
) -> MeanRows:
    """The mean row of each text where the dictionary writes, and the mean of its latents.

    Raises:
        ValueError: If a text has no token that counts.
    """
    config, device = placed.config, next(model.parameters()).device
    points = list(dict.fromkeys((placed.hook_point, config.hook_point_out)))
    of_stream, of_latents = [], []
    for done, text in enumerate(texts, start=1):
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=device)
        if ids.shape[1] <= first_position:
            raise MonosemaError(f"texts must have more than {first_position} tokens, got {text!r}")
        with capture(model, points) as run:
            streams = run(ids)
        of_stream.append(streams[config.hook_point_out][0, first_position:].float().mean(dim=0))
        x = streams[placed.hook_point][0, first_position:].float()
        of_latents.append(placed.encode_dense(x).mean(dim=0))
        (progress or silent)(done, len(texts), "texts")
    return MeanRows(torch.stack(of_stream).cpu(), torch.stack(of_latents).cpu())


class Contrast(NamedTuple):
    """The latents that tell texts from their controls, and what chance finds."""

    latents: tuple[int, ...]
    """Those of the largest AUC over all texts, the best first."""
    auc: float
    """On pairs that did not choose the latent: mean over both halves."""
    chance: float
    """Mean of the same where texts and controls are exchanged."""
    p: float
    """Share of these, the observed one among them, that are as large."""
    n_common: int
    """Latents that fire in every text and in no control."""
    n_common_chance: float
    """The same where texts and controls are exchanged."""


def contrast(
    texts: Float[Tensor, "pair d_sae"],
    controls: Float[Tensor, "pair d_sae"],
    *,
    n_exchanges: int = 199,
    n_latents: int = 5,
    seed: int = 0,
) -> Contrast:
    """Search for a latent that tells texts from controls that are like them in everything else.

    With thousands of latents and a few texts one always does. So the latent is chosen on one half
    of the pairs and scored on the other, and the same search is made with the sides of pairs
    exchanged at random.

    Args:
        texts: Largest activation of each latent on each text.
        controls: On the control of each text.
        n_exchanges: Exchanged copies.
        n_latents: Latents that are named.
        seed: Of the exchanges.

    Raises:
        ValueError: If there are fewer than four pairs.
    """
    if len(texts) < FEWEST_PAIRS:
        raise MonosemaError(
            f"texts must be at least {FEWEST_PAIRS} with controls, got {len(texts)}"
        )
    sides = torch.stack([texts, controls])
    generator = torch.Generator().manual_seed(seed)
    flips = torch.randint(2, (n_exchanges, len(texts)), generator=generator)
    pairs = torch.arange(len(texts))
    observed, common = _unseen_auc(sides), _n_common(sides)
    null, others = [], []
    for flip in flips:
        exchanged = torch.stack([sides[flip, pairs], sides[1 - flip, pairs]])
        null.append(_unseen_auc(exchanged))
        others.append(_n_common(exchanged))
    over_all = _aucs(*sides)
    best = over_all.argsort(descending=True, stable=True)[:n_latents].tolist()
    p = (1 + sum(value >= observed for value in null)) / (n_exchanges + 1)
    chance = sum(null) / max(n_exchanges, 1)
    return Contrast(tuple(best), observed, chance, p, common, sum(others) / max(n_exchanges, 1))


def _unseen_auc(sides: Float[Tensor, "side pair d_sae"]) -> float:
    halves, values = (sides[:, ::2], sides[:, 1::2]), []
    for chosen_on, scored_on in (halves, halves[::-1]):
        latent = int(_aucs(*chosen_on).argmax())
        values.append(float(_aucs(*scored_on[:, :, latent : latent + 1])))
    return sum(values) / 2


def _n_common(sides: Float[Tensor, "side pair d_sae"]) -> int:
    return int(((sides[0] > 0).all(dim=0) & (sides[1] <= 0).all(dim=0)).sum())


def _aucs(
    positive: Float[Tensor, "pair d_sae"], negative: Float[Tensor, "pair d_sae"]
) -> Float[Tensor, " d_sae"]:
    """Of each latent: the probability that a text exceeds a control, ties half."""
    larger = positive[:, None] > negative[None]
    equal = positive[:, None] == negative[None]
    return (larger.float() + equal.float() / 2).mean(dim=(0, 1))


@torch.no_grad()
def _peaks(
    model: nn.Module, tokenizer: Tokenizer, placed: SparseAutoencoder, text: str, counting: Counting
) -> LatentPeaks:
    """The largest activation of every latent in a text, and its position."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) <= counting.first_position:
        raise MonosemaError(
            f"texts must have more than {counting.first_position} tokens, "
            f"got {text!r} with {len(ids)}"
        )
    device = next(model.parameters()).device
    with capture(model, [placed.hook_point]) as run:
        x = run(torch.tensor([ids], device=device))[placed.hook_point][0]
    start = len(ids) - 1 if counting.where == "last" else counting.first_position
    peak = placed.encode_dense(x[start:]).max(dim=0)
    return LatentPeaks(peak.values, peak.indices + start)


@torch.no_grad()
def nearest_latents(
    dictionary: SparseAutoencoder,
    latents: Int[Tensor, " row"],
    among: SparseAutoencoder | None = None,
    *,
    k: int = 10,
) -> Nearest:
    """The k latents whose decoder rows have the largest cosine with those of some latents.

    Args:
        dictionary: Whose latents are asked about.
        latents: Their numbers.
        among: The dictionary that is searched; the same one, without the latent itself, when
            absent. Both must write to the same stream.
        k: How many for each; fewer where there are not so many.

    Raises:
        ValueError: If a latent does not exist or the widths differ.
    """
    other = among or dictionary
    d_sae, width = dictionary.config.d_sae, dictionary.config.width_out
    if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < d_sae:
        raise MonosemaError(f"latents must be below d_sae={d_sae}, got {int(latents.max())}")
    if other.config.width_out != width:
        raise MonosemaError(
            f"both dictionaries must write rows of one width, got {width} and "
            f"{other.config.width_out}"
        )
    n = min(k, other.config.d_sae - (among is None))
    excluded = latents if among is None else None
    return nearest(dictionary.directions[latents], other.directions, n, excluded=excluded)

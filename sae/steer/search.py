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
    progress, peaks = progress or silent, []
    for text in (*positives, *negatives):
        peaks.append(_peaks(model, tokenizer, placed, text, counting))
        progress(len(peaks), len(positives) + len(negatives), "texts")
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
        peaks.append(_Peaks(*placed.encode_dense(x[n_prefix:].float()).max(dim=0)))
    return _in_all_and_none(placed, peaks[: len(positives)], peaks[len(positives) :])


def _in_all_and_none(
    placed: SparseAutoencoder, positives: Sequence["_Peaks"], negatives: Sequence["_Peaks"]
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


class _Peaks(NamedTuple):
    values: Float[Tensor, " d_sae"]
    at: Int[Tensor, " d_sae"]


@torch.no_grad()
def _peaks(
    model: nn.Module, tokenizer: Tokenizer, placed: SparseAutoencoder, text: str, counting: Counting
) -> _Peaks:
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
    return _Peaks(peak.values, peak.indices + start)


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

"""The refined read-out of a dictionary, set from rows, and a linear encoder that learns from it.

tau is set without any truth. The lengths p_i of latents that are in a row lie around what the
latent usually adds; those of latents that are not are what noise and overlap leave. Where the two
kinds part, the density of all lengths has a valley, and fewest errors are made by cutting in it: in
units of each latent's usual length, since latents differ in it. Where they do not part, nothing in
the rows says which latents are too many. Then tau is one length for all, and keeps the number of
latents that the dictionary fires.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import TRAINING_SPLITS
from sae import activations
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.metrics import FVU, L0
from sae.pretrained import monosema_format
from sae.pretrained.hub import directory_of
from sae.read_out import NEAR_AT_LEAST, ReadOut, ReadOutName, candidates, require_refinable
from sae.run.context import (
    CacheOrPath,
    DictionaryOrPath,
    FittedDictionary,
    Section,
    fitted,
    opened,
)

ROWS, CHUNK = 16_384, 2048
"""Rows that a read-out is set on, and rows at once."""

NEAR_THRESHOLD = 4
"""Where a threshold decides, so many times the latents that fire may fire in the second round."""

BINS, SMOOTHING, DEPTH = 200, 6, 1.5
"""Of the histogram of lengths; the bins that a bell curve spreads each over; and how many times
the valley's density the lower of its two sides must have."""

LEAST = 8
"""Lengths above the valley that a latent must have for a usual length of its own."""


class Figures(NamedTuple):
    """What one way of reading does on rows."""

    fvu: float
    l0: float


class Refined(NamedTuple):
    """A dictionary with its refined read-out."""

    dictionary: SparseAutoencoder
    """The same as before; `reading("refined")` reads by the new read-out."""
    read_out: ReadOut
    path: Path | None
    """The file; None for a dictionary that was passed as it is."""
    figures: dict[ReadOutName, Figures]
    """On rows that it was not set on: held-out ones where there are any."""

    @property
    def section(self) -> Section:
        """A row for each way of reading."""
        rows = tuple(
            (name, f"{one.fvu:.4f}", f"{one.l0:.2f}") for name, one in self.figures.items()
        )
        note = f"{self.read_out.made_from['rule']}; {self.path or 'not written'}"
        return Section("refined read-out", ResultTable(("read-out", "FVU", "L0"), rows, note))


def refine(
    dictionary: DictionaryOrPath,
    cache: CacheOrPath,
    *,
    hook_point: str | None = None,
    rows: int = ROWS,
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
) -> Refined:
    """Set the refined read-out of a dictionary on training rows, and write it beside it.

    Args:
        dictionary: The dictionary; one that is passed by its path gets a file.
        cache: What it was trained on.
        hook_point: Which stream; that of the dictionary when absent.
        rows: Training rows that are read.
        seed: Decides which.
        force: Take a cache of another model or place too.
        progress: Called after each chunk.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the dictionary does not fit the cache, or does not predict what it reads.
    """
    cache = opened(cache)
    one = fitted(dictionary, cache, hook_point, force=force)
    require_refinable(one.dictionary.config)
    x = _sample(one, cache, TRAINING_SPLITS, rows, seed)
    read_out = fit_read_out(one.dictionary, x, progress)
    made_from = {**read_out.made_from, "cache": cache.fingerprint, "seed": seed}
    read_out = ReadOut(tau=read_out.tau, margin=read_out.margin, made_from=made_from)
    one.dictionary.read_out = read_out
    path = None
    if one.path is not None and one.source is not None:
        home = directory_of(one.path, one.source)
        path = monosema_format.save_read_out(read_out, home, one.source.weights_sha256)
    held = _sample(one, cache, ("hold",), rows, seed)
    tested = held if len(held) else x
    return Refined(one.dictionary, read_out, path, figures(one.dictionary, tested))


def _sample(
    one: FittedDictionary, cache: ActivationCache, splits: tuple[str, ...], n: int, seed: int
) -> Float[Tensor, "row d_in"]:
    numbers = cache.rows(splits)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    rows = one.rows_of(cache)[one.hook_point][numbers[order[:n]].sort().values]
    return rows.float()


def _chunks(
    dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"]
) -> Iterator[Float[Tensor, "batch d_in"]]:
    for part in x.split(CHUNK):
        yield part.to(dictionary.dec_rows.device)


@torch.no_grad()
def figures(
    dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"]
) -> dict[ReadOutName, Figures]:
    """FVU and L0 of rows by each way of reading."""
    found: dict[ReadOutName, Figures] = {}
    names: tuple[ReadOutName, ...] = ("linear", "refined")
    for name in names[: 1 if dictionary.read_out is None else 2]:
        fvu, l0 = FVU(), L0()
        for part in _chunks(dictionary, x):
            latents = dictionary.encode(part, name)
            fvu.update(part, dictionary.decode(latents, part))
            l0.update(latents.values)
        found[name] = Figures(fvu.compute(), l0.mean)
    return found


@torch.no_grad()
def fit_read_out(
    dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"], progress: Progress = silent
) -> ReadOut:
    """Set the refined read-out on rows; the dictionary is not changed.

    Raises:
        ValueError: If there are no rows, or the dictionary does not reconstruct them.
    """
    require_refinable(dictionary.config)
    if len(x) < 2:
        raise MonosemaError(f"rows must be at least 2 to set a read-out, got {len(x)}")
    linear = figures(dictionary.reading("linear"), x)["linear"]
    if not linear.fvu < 1:
        raise MonosemaError(
            "the dictionary must reconstruct the rows better than their mean, with an FVU below 1, "
            f"got {linear.fvu:.3g}; pass the cache and the hook point that it was trained on"
        )
    weights, decoder = dictionary.encoder(), dictionary.decoder()
    activation, d_sae = dictionary.config.activation, dictionary.config.d_sae
    margin = _margin(dictionary, x[:CHUNK], linear.l0)
    lengths, latents = [], []
    for part in _chunks(dictionary, x):
        found = candidates(activation, dictionary.scaled(part), weights, decoder, margin)
        lengths.append(found.lengths.cpu())
        latents.append(found.latents.indices.cpu())
        progress(min(len(lengths) * CHUNK, len(x)), len(x), "rows")
    tau, rule = _tau(torch.cat(lengths), torch.cat(latents), d_sae, round(linear.l0 * len(x)))
    return ReadOut(tau=tau, margin=margin, made_from={"rows": len(x), "rule": rule})


def _margin(dictionary: SparseAutoencoder, x: Float[Tensor, "row d_in"], l0: float) -> float:
    """How far below the threshold the latents reach that may fire in the second round."""
    activation, weights = dictionary.config.activation, dictionary.encoder()
    if activation.facts.choice in ("row", "group"):
        return 0.0
    u = dictionary.scaled(x.to(weights.enc_rows.device))
    below = activations.threshold_of(activation, weights) - activations.pre_acts(u, weights)
    n = min(round(max(NEAR_THRESHOLD * l0, NEAR_AT_LEAST) * len(x)), below.numel())
    return max(0.0, float(below.flatten().kthvalue(n).values))


def _tau(
    lengths: Float[Tensor, " entry"], latents: Int[Tensor, " entry"], d_sae: int, n: int
) -> tuple[Float[Tensor, " d_sae"], str]:
    """What p_i must exceed, for each latent, and the rule that said so."""
    lengths, latents = lengths[lengths > 0], latents[lengths > 0]
    cut = valley(lengths)
    if cut is None:
        ordered = lengths.sort(descending=True).values
        tau = float(ordered[n]) if n < len(ordered) else 0.0
        return torch.full((d_sae,), tau), "as many latents as the linear read-out"
    usual = usual_lengths(lengths, latents, cut, d_sae)
    share = valley(lengths / usual[latents])
    tau = torch.full((d_sae,), cut) if share is None else usual * share
    return tau, "the valley between the lengths of latents that are there and of those that are not"


def usual_lengths(
    lengths: Float[Tensor, " entry"], latents: Int[Tensor, " entry"], cut: float, d_sae: int
) -> Float[Tensor, " d_sae"]:
    """Mean length of each latent above the cut; the mean over latents where it has too few."""
    is_above = lengths > cut
    n = torch.bincount(latents[is_above], minlength=d_sae)
    total = torch.zeros(d_sae).index_add_(0, latents[is_above], lengths[is_above].float())
    usual = total / n.clamp_min(1)
    has_own = n >= LEAST
    mean = usual[has_own].mean() if bool(has_own.any()) else lengths[is_above].mean()
    return torch.where(has_own, usual, mean)


def valley(lengths: Float[Tensor, " entry"]) -> float | None:
    """Where the density of lengths is low between two sides that are higher; None if nowhere."""
    if len(lengths) < BINS:
        return None
    most = float(lengths.sort().values[int(0.999 * (len(lengths) - 1))])
    counts = torch.histc(lengths.float(), BINS, 0, most)
    reach = 4 * SMOOTHING
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / SMOOTHING).square())
    padded = torch.nn.functional.pad(counts[None, None], (reach, reach), mode="replicate")
    density = torch.nn.functional.conv1d(padded, (bell / bell.sum())[None, None])[0, 0]
    left, right = density.cummax(0).values, density.flip(0).cummax(0).values.flip(0)
    depth = torch.minimum(left, right) / density.clamp_min(1e-9)
    place = int(depth.argmax())
    return (place + 0.5) * most / BINS if float(depth[place]) >= DEPTH else None

"""How the latents of two dictionaries correspond: stability, universality, absorption, hedging.

Stability asks whether two dictionaries have the same directions, one to one, both ways, next to
chance. Universality asks whether their latents fire together over shared rows. Absorption: a
parent's latent falls silent where a child's latent speaks for both. With the truth known (a
synthetic hierarchy) no probe has to be trained: the parent's own direction takes its place. Chanin
et al. 2024 (arXiv 2409.14507), in SAEBench's two forms. Hedging: what becomes of features in too
narrow dictionaries. Splitting is in `sae.neighbours`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.alignment import Correlations, match

MATCHED = 0.7
"""Cosine above which a latent counts as found again (Paulo and Belrose 2025, arXiv 2501.16615)."""

EXACT = 16_384
"""Above so many rows the assignment is bounded instead of solved."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike two sets of directions are."""

    mcc: float
    """Mean |cosine| over the best one-to-one assignment; a lower bound where `exact` is false."""
    mmcs_forward: float
    """Mean over the first set of the largest cosine with the second."""
    mmcs_backward: float
    """Mean over the second set of the largest cosine with the first."""
    matched: float
    """Share of the assigned pairs, of as many as the smaller set has, above MATCHED."""
    exact: bool
    """Whether the assignment is the best; else it is that of mutual nearest neighbours."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Two dictionaries of the same rows, such as two seeds, and what chance gives."""

    decoder: Likeness
    """Of the decoder's rows."""
    encoder: Likeness
    """Of the encoder's rows."""
    chance: Likeness
    """Of as many random directions of the decoder's width."""
    matched_both: float
    """Share of the decoder's pairs whose decoder and encoder cosines are both above MATCHED."""


@torch.no_grad()
def stability(a: SparseAutoencoder, b: SparseAutoencoder, generator: torch.Generator) -> Stability:
    """Compare two dictionaries of one stream.

    Args:
        a: One.
        b: The other; it may have another d_sae.
        generator: Draws the directions of the chance floor.

    Raises:
        ValueError: If they read or write rows of other widths: they are of different models.
    """
    widths = [(d.config.d_in, d.config.width_out) for d in (a, b)]
    if widths[0] != widths[1]:
        raise MonosemaError(
            f"dictionaries must be of one stream, got widths {widths[0]} and {widths[1]}; "
            "compare what they fire on (universality) instead"
        )
    decoder = cosines(a.W_dec, b.W_dec)
    encoder = cosines(a.W_enc.T, b.W_enc.T)
    pairs = _pairs(decoder.abs())
    both = torch.minimum(decoder[pairs.x, pairs.y].abs(), encoder[pairs.x, pairs.y].abs())
    return Stability(
        decoder=likeness(decoder),
        encoder=likeness(encoder),
        chance=chance((a.config.d_sae, b.config.d_sae), a.config.width_out, generator),
        matched_both=float((both > MATCHED).sum()) / min(decoder.shape),
    )


def chance(sizes: tuple[int, int], width: int, generator: torch.Generator) -> Likeness:
    """What random directions give: 0.37 for MMCS at 512 in 64 dimensions, 0.13 at 4096 in 768."""
    drawn = [torch.randn(size, width, generator=generator) for size in sizes]
    return likeness(cosines(*drawn))


def cosines(
    a: Float[Tensor, "d_sae d_in"], b: Float[Tensor, "other d_in"]
) -> Float[Tensor, "d_sae other"]:
    """Cosine of every row of one with every row of the other; 0 for a row of 0."""
    tiny = torch.finfo(a.dtype).tiny
    return torch.nn.functional.normalize(a, eps=tiny) @ torch.nn.functional.normalize(b, eps=tiny).T


def likeness(cosine: Float[Tensor, "d_sae other"]) -> Likeness:
    """The figures of a matrix of cosines."""
    pairs = _pairs(cosine.abs())
    values, smaller = cosine[pairs.x, pairs.y].abs(), min(cosine.shape)
    return Likeness(
        mcc=float(values.double().sum()) / smaller,
        mmcs_forward=float(cosine.amax(dim=1).double().mean()),
        mmcs_backward=float(cosine.amax(dim=0).double().mean()),
        matched=float((values > MATCHED).sum()) / smaller,
        exact=pairs.exact,
    )


@dataclass(frozen=True)
class _Pairs:
    x: Int64[Tensor, " pair"]
    y: Int64[Tensor, " pair"]
    exact: bool


def _pairs(values: Float[Tensor, "d_sae other"]) -> _Pairs:
    if min(values.shape) <= EXACT:
        result = match(values)
        return _Pairs(result.x, result.y, True)
    # Mutual nearest neighbours are one to one, so their sum bounds the best one from below.
    rows = torch.arange(values.shape[0])
    columns = values.argmax(dim=1)
    mutual: Bool[Tensor, " d_sae"] = values.argmax(dim=0)[columns] == rows
    return _Pairs(rows[mutual], columns[mutual], False)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Pearson correlations of activations."""

    forward: float
    """Mean over the first dictionary's latents of the largest correlation with the second's."""
    backward: float
    """The same from the second."""
    one_to_one: float
    """Mean over the best one-to-one assignment."""


@dataclass(frozen=True, kw_only=True)
class Universality:
    """How far two dictionaries' latents fire together, and what unpaired rows give."""

    n_rows: int
    """Rows that both read."""
    paired: Overlap
    """Over rows of the same examples and positions."""
    chance: Overlap
    """With the second side's rows moved on by one in each batch."""


@torch.no_grad()
def universality(
    a: SparseAutoencoder, b: SparseAutoencoder, batches: Iterable[tuple[Tensor, Tensor]]
) -> Universality:
    """Correlate the latents of dictionaries of any two streams.

    Memory is two (d_sae, d_sae) matrices of float64. Bricken et al. 2023 match so across seeds;
    silent latents count as 0.

    Args:
        a: The dictionary of the first stream.
        b: The dictionary of the second.
        batches: Pairs of rows (batch, d_in) of the same examples and positions, one per stream; in
            random order, so that neighbours are unrelated.

    Raises:
        ValueError: If a batch is not paired or there is none.
    """
    paired, moved = (Correlations(a.config.d_sae, b.config.d_sae) for _ in range(2))
    for x, y in batches:
        acts_a, acts_b = a.encode_dense(x), b.encode_dense(y)
        paired.update(acts_a, acts_b)
        moved.update(acts_a, acts_b.roll(1, dims=0))
    if paired.n_rows < 2:
        raise MonosemaError(f"batches must hold at least 2 rows, got {paired.n_rows}")
    return Universality(
        n_rows=paired.n_rows,
        paired=overlap(paired.compute()),
        chance=overlap(moved.compute()),
    )


def overlap(correlation: Float[Tensor, "d_sae other"]) -> Overlap:
    """The figures of a matrix of correlations."""
    return Overlap(
        forward=float(correlation.amax(dim=1).mean()),
        backward=float(correlation.amax(dim=0).mean()),
        one_to_one=float(match(correlation).values.mean()),
    )


SILENT = 1e-8
"""Activation below which a main latent says nothing."""

SPLIT_GAIN = 0.03
"""F1 that another main latent must add."""

FULL_COSINE, FULL_SHARE = 0.025, 0.4
"""What the absorbing latent needs: cosine with the parent, and share of the row's projection."""

FRACTION_COSINE, FRACTION_TOP = 0.1, 3
"""Cosine and number of latents that may absorb a fraction."""


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """How a dictionary represents one feature."""

    main: tuple[int, ...]
    """Latents that together tell the feature; more than one: it is split."""
    f1: float
    """Of firing of any of them."""
    full: float
    """Share of the feature's rows in which all main latents are silent and another stands in."""
    fraction: float
    """Mean over these rows of absorbed / (absorbed + main) projections on the direction."""

    @property
    def n_split(self) -> int:
        """Number of main latents."""
        return len(self.main)


@torch.no_grad()
def absorption(
    acts: Float[Tensor, "row d_sae"],
    dec_rows: Float[Tensor, "d_sae d_model"],
    direction: Float[Tensor, " d_model"],
    present: Bool[Tensor, " row"],
    size: Float[Tensor, " row"],
) -> Absorption:
    """Measure one feature whose direction and rows are known.

    Args:
        acts: Dense activations of rows.
        dec_rows: Decoder rows in the units of the rows.
        direction: The feature's unit direction.
        present: In which rows the feature is.
        size: By how much the direction is in each row (its true activation).

    Raises:
        ValueError: If the feature is in no row or in all.
    """
    n_present = int(present.sum())
    if n_present in {0, len(present)}:
        raise MonosemaError(
            f"present must be true in some rows and false in others, got {n_present} of "
            f"{len(present)}; take more rows"
        )
    main, f1 = main_latents(acts > 0, present)
    acts, size = acts[present], size[present]
    cosine = torch.nn.functional.normalize(dec_rows) @ direction
    projection = acts * (dec_rows @ direction)
    others = projection.clamp_min(0)
    others[:, list(main)] = 0
    silent = (acts[:, list(main)] < SILENT).all(dim=1)
    top = (others * (cosine >= FULL_COSINE)).amax(dim=1)
    k = min(FRACTION_TOP, others.shape[1])
    absorbed = (others * (cosine >= FRACTION_COSINE)).topk(k, dim=1).values.sum(dim=1)
    total = absorbed + projection[:, list(main)].clamp_min(0).sum(dim=1)
    return Absorption(
        main=main,
        f1=f1,
        full=float((silent & (top > 0) & (top >= FULL_SHARE * size)).double().mean()),
        fraction=float((absorbed / total.clamp_min(SILENT)).double().mean()),
    )


def main_latents(
    fires: Bool[Tensor, "row d_sae"], present: Bool[Tensor, " row"]
) -> tuple[tuple[int, ...], float]:
    """The latents whose firing, of any of them, tells the feature, and their F1.

    The best one, then the best to add as long as F1 rises by more than SPLIT_GAIN.
    """
    chosen: list[int] = []
    best, called = 0.0, torch.zeros_like(present)
    while len(chosen) < fires.shape[1]:
        any_of = fires | called[:, None]
        hits = (any_of & present[:, None]).sum(dim=0).double()
        f1 = 2 * hits / (any_of.sum(dim=0) + present.sum())
        latent = int(f1.argmax())
        if chosen and float(f1[latent]) <= best + SPLIT_GAIN:
            break
        chosen.append(latent)
        best, called = float(f1[latent]), any_of[:, latent]
    return tuple(chosen), best


def hedging(
    directions: Float[Tensor, "feature d_model"], dec_rows: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, " d_sae"]:
    """Share of each latent's squared norm along features that have no latent of their own.

    A dictionary that is too narrow mixes correlated features into the latents that it has (Chanin
    et al. 2025, arXiv 2505.11756). Each latent tracks the feature of its largest |cosine|; what is
    left is the part of it within the span of the features that no latent tracks, orthogonal to its
    own feature: sin^2 of the angle for a latent tilted towards one of them. Ours is the form for a
    known truth, not the paper's, which trains a second time.

    Args:
        directions: All true directions.
        dec_rows: The dictionary's decoder rows.
    """
    nearest_latent = cosines(dec_rows, directions).abs().argmax(dim=1)
    untracked = torch.ones(len(directions), dtype=torch.bool)
    untracked[nearest_latent] = False
    unit = torch.nn.functional.normalize(dec_rows.double())
    features = torch.nn.functional.normalize(directions.double())
    if not bool(untracked.any()):
        return torch.zeros(len(dec_rows), dtype=torch.float64)
    rest = (
        unit - (unit * features[nearest_latent]).sum(dim=1, keepdim=True) * features[nearest_latent]
    )
    basis = torch.linalg.qr(features[untracked].T).Q
    return (rest @ basis).square().sum(dim=1)

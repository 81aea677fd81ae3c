"""Absorption: a parent's latent that falls silent where a child's latent speaks for both.

With the truth known (a synthetic hierarchy) no probe has to be trained: the parent's own direction
takes its place. Chanin et al. 2024 (arXiv 2409.14507), in SAEBench's two forms.

Hedging: what becomes of features in too narrow dictionaries (splitting is in `sae.neighbours`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosema.checks import MonosemaError
from sae.evaluate.structure.stability import cosines

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
    own = cosines(dec_rows, directions).abs().argmax(dim=1)
    untracked = torch.ones(len(directions), dtype=torch.bool)
    untracked[own] = False
    unit = torch.nn.functional.normalize(dec_rows.double())
    features = torch.nn.functional.normalize(directions.double())
    if not bool(untracked.any()):
        return torch.zeros(len(dec_rows), dtype=torch.float64)
    rest = unit - (unit * features[own]).sum(dim=1, keepdim=True) * features[own]
    basis = torch.linalg.qr(features[untracked].T).Q
    return (rest @ basis).square().sum(dim=1)

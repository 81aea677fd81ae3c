"""Which concepts have a latent, as a function of how frequent they are (Templeton et al. 2024)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from scipy import special

from monosema.checks import MonosemaError

_STEPS = 60
_PRIOR = 0.01
"""A slope of 10 standard deviations is as good as a step; without a prior it is infinite."""


class CompletenessFit(NamedTuple):
    """A logistic curve over log frequency: P(present) = 1 / (1 + exp(-slope (log f - log f50)))."""

    f50: float
    """Frequency at which half of the concepts have a latent."""
    low: float
    """Lower end of its 95 % interval, by bootstrap over concepts."""
    high: float
    """Upper end."""
    slope: float
    """Steepness per nat of frequency."""
    times_alive: float
    """f50 times the number of live latents; about 1 in Scaling Monosemanticity."""
    n: int
    """Concepts."""
    share_present: float
    """Share of them that have a latent."""


def completeness(
    frequency: Float64[np.ndarray, " word"],
    present: Bool[np.ndarray, " word"],
    n_alive: int,
    *,
    seed: int = 0,
    resamples: int = 200,
) -> CompletenessFit:
    """Fit the curve by maximum likelihood with a weak prior on the slope.

    Args:
        frequency: Share of the corpus, above 0, of each concept.
        present: Whether the dictionary has a latent that singles it out.
        n_alive: Live latents.
        seed: Of the bootstrap.
        resamples: Of it.

    Raises:
        ValueError: If there are fewer than 10 concepts, or all or none of them are present: then
            the data hold no 50 % point.
    """
    if len(frequency) < 10 or not (frequency > 0).all():
        raise MonosemaError(
            f"frequency must be at least 10 numbers above 0, got {len(frequency)} of which "
            f"{int((frequency > 0).sum())} are"
        )
    if present.all() or not present.any():
        n_present = int(present.sum())
        raise MonosemaError(
            f"present must hold both for a 50 % point, got {n_present} of {len(present)}; "
            "add rarer or more frequent concepts"
        )
    x = np.log(frequency)
    middle, slope = _fit(x, present, np.ones((1, len(x))))
    made = np.random.default_rng(seed)
    weights = made.multinomial(len(x), np.full(len(x), 1 / len(x)), resamples)
    has_both = (weights[:, present].sum(1) > 0) & (weights[:, ~present].sum(1) > 0)
    points, _ = _fit(x, present, weights[has_both].astype(np.float64))
    low, high = np.quantile(points, [0.025, 0.975])
    middle, slope = float(middle[0]), float(slope[0])
    f50 = math.exp(middle)
    return CompletenessFit(
        f50, math.exp(low), math.exp(high), slope, f50 * n_alive, len(x), float(present.mean())
    )


def _fit(x: np.ndarray, present: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-way points and slopes, one for each row of weights, by Newton's method."""
    centre, spread = x.mean(), max(float(x.std()), 1e-9)
    z, y = (x - centre) / spread, present.astype(np.float64)
    a, b = np.zeros(len(weights)), np.ones(len(weights))
    for _ in range(_STEPS):
        p = special.expit(a[:, None] + b[:, None] * z)
        h = weights * p * (1 - p)
        ga = (weights * (y - p)).sum(1) - a * _PRIOR
        gb = (weights * (y - p) * z).sum(1) - b * _PRIOR
        haa, hab, hbb = h.sum(1) + _PRIOR, (h * z).sum(1), (h * z * z).sum(1) + _PRIOR
        det = haa * hbb - hab * hab
        a = a + np.clip((hbb * ga - hab * gb) / det, -2, 2)
        b = b + np.clip((haa * gb - hab * ga) / det, -2, 2)
    b = np.where(np.abs(b) > 1e-9, b, 1e-9)
    return centre - spread * a / b, b / spread


def name_frequency(texts: Sequence[str], names: Sequence[str]) -> Float64[np.ndarray, " word"]:
    """Share of words at which each " Name " begins; what has no blank on both sides is not it."""
    counts = np.array([sum(f" {text} ".count(f" {name} ") for text in texts) for name in names])
    n_words = sum(len(text.split()) for text in texts)
    return counts / max(n_words, 1)

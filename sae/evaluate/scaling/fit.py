"""`fit_laws`: the laws that finished runs allow, with intervals, and warnings where they end.

Two laws, by what the runs vary. Widths and rows (Templeton et al. 2024, in the form of Hoffmann et
al. 2022, arXiv 2203.15556): L = E + A F^-a + B S^-b over F latents and S rows. Under a compute
C = F S the least loss is at F* = (a A / (b B))^(1 / (a + b)) C^(b / (a + b)) and S* = C / F*, and
L* - E falls as C^(-a b / (a + b)). Widths and k (Gao et al. 2024, arXiv 2406.04093, 3.1):
L = exp(alpha + beta_k log k + beta_n log n + gamma log k log n) + exp(zeta + eta log k).

`draw` shows a law as one picture: losses and the law over compute, and the best width.
"""

import io as bytes_io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from activations_cache import io
from activations_cache.checks import MonosemaError, Progress, silent
from sae.evaluate.scaling.runs import FinishedRun, Fitted, RateLaw, best_rates, fitted, rate_law

HUBER = 1e-2
"""Residual of a log loss from which it counts linearly, so that one bad run does not decide."""

FEWEST_RUNS = 7
"""Both laws have five or six parameters."""


class Law(NamedTuple):
    """A law of the loss."""

    names: tuple[str, ...]
    """Of its parameters, and of what follows from them."""
    log_loss: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Of parameters and points."""
    figures: Callable[[np.ndarray], np.ndarray]
    """The figures that `names` name, of parameters."""
    starts: Callable[[float], list[np.ndarray]]
    """Where the fit begins, of the smallest log loss."""


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """A law with its figures."""

    law: Law
    """Its form."""
    figures: dict[str, Fitted]
    """By name."""
    theta: Float64[np.ndarray, " k"]
    """The parameters as `law` takes them."""
    residual: float
    """Root mean square of the residuals of log L."""
    warnings: tuple[str, ...] = ()
    """What forbids reading more into it."""

    def loss(self, first: float | int, second: float | int) -> float:
        """Expected loss of (d_sae, rows) or (d_sae, k)."""
        return float(np.exp(self.law.log_loss(self.theta, np.array([[first, second]])))[0])


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best division of a compute."""

    compute: float
    """Latents x rows."""
    d_sae: Fitted
    """F*."""
    rows: Fitted
    """S*."""
    loss: float
    """L*."""


@dataclass(frozen=True, kw_only=True)
class Laws:
    """What the runs allow."""

    compute: FittedLaw | None
    """Where widths and rows vary."""
    optimum: Optimum | None
    """By `compute`, at the median compute of the runs."""
    width: FittedLaw | None
    """Where widths and k vary, and the rows do not."""
    rate: RateLaw | None
    """Where the learning rate was varied."""
    best: tuple[FinishedRun, ...]
    """The runs that were fitted: of each size the one of the best learning rate."""


def _log_compute(theta: np.ndarray, points: np.ndarray) -> np.ndarray:
    e, log_a, a, log_b, b = theta
    f, s = np.log(points).T
    return np.logaddexp(e, np.logaddexp(log_a - a * f, log_b - b * s))


def _compute_figures(theta: np.ndarray) -> np.ndarray:
    e, log_a, a, log_b, b = theta
    exponents = (b / (a + b), a / (a + b), -a * b / (a + b))
    return np.array([np.exp(e), np.exp(log_a), a, np.exp(log_b), b, *exponents])


def _compute_starts(low: float) -> list[np.ndarray]:
    grid = product((low - 2, low - 0.1), (2.0,), (0.2, 0.6), (2.0, 6.0), (0.2, 0.6))
    return [np.array(start) for start in grid]


def _log_width(theta: np.ndarray, points: np.ndarray) -> np.ndarray:
    alpha, beta_k, beta_n, gamma, zeta, eta = theta
    n, k = np.log(points).T
    return np.logaddexp(alpha + beta_k * k + beta_n * n + gamma * k * n, zeta + eta * k)


def _width_starts(low: float) -> list[np.ndarray]:
    grid = product((0.0, 2.0), (-0.3,), (-0.1, -0.4), (0.0,), (low - 3, low - 0.5), (0.0, -0.5))
    return [np.array(start) for start in grid]


COMPUTE = Law(
    ("E", "A", "a", "B", "b", "exponent of F*", "exponent of S*", "exponent of L* - E"),
    _log_compute,
    _compute_figures,
    _compute_starts,
)
WIDTH = Law(
    ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta"),
    _log_width,
    lambda theta: theta,
    _width_starts,
)


def fit_laws(
    runs: Sequence[FinishedRun],
    *,
    n_resamples: int = 200,
    seed: int = 0,
    progress: Progress = silent,
) -> Laws:
    """Fit what the runs vary.

    Args:
        runs: Finished runs; those of one size that differ in the learning rate give `rate`, and
            the best of them goes into the other laws.
        n_resamples: Bootstrap resamples of the runs; one that repeats too few of them is drawn
            again.
        seed: Of the resamples.
        progress: Called with the unit "resamples".

    Raises:
        ValueError: If no law has enough runs.
    """
    best, rate = best_rates(runs), rate_law(runs)
    widths, rows, ks = ({getattr(r, n) for r in best} for n in ("d_sae", "rows", "k"))
    enough = len(best) >= FEWEST_RUNS and len(widths) > 2
    by_compute = enough and len(rows) > 2 and len(ks) == 1
    by_width = enough and len(rows) == 1 and len(ks) > 2 and None not in ks
    if not by_compute and not by_width and rate is None:
        raise MonosemaError(
            f"runs must be at least {FEWEST_RUNS} that vary 3 widths, and 3 numbers of rows at one "
            f"k or 3 k at one number of rows, got {len(best)} of {len(widths)} widths, {len(rows)} "
            f"numbers of rows and {len(ks)} k; `sae scaling plan` makes such a grid"
        )
    again = _Bootstrap(n_resamples, np.random.default_rng(seed), progress)
    compute = optimum = width = None
    if by_compute:
        points = np.array([(run.d_sae, run.rows) for run in best], dtype=float)
        compute, thetas = _fit(COMPUTE, points, best, again)
        optimum = _optimum(compute, thetas, float(np.median([run.compute for run in best])))
        compute = _with_warnings(compute, optimum, best)
    if by_width:
        points = np.array([(run.d_sae, run.k) for run in best], dtype=float)
        width, _ = _fit(WIDTH, points, best, again)
    return Laws(compute=compute, optimum=optimum, width=width, rate=rate, best=tuple(best))


def best_width(theta: np.ndarray, compute: float) -> float:
    """F* of the law COMPUTE for a compute in latents x rows; nan where the loss falls with one."""
    _, log_a, a, log_b, b = theta
    if not (a > 0 and b > 0):
        return float("nan")
    return float(np.exp((np.log(a / b) + log_a - log_b + b * np.log(compute)) / (a + b)))


class _Bootstrap(NamedTuple):
    n: int
    draw: np.random.Generator
    progress: Progress


def _fit(
    law: Law, points: Float64[np.ndarray, "run 2"], runs: Sequence[FinishedRun], again: _Bootstrap
) -> tuple[FittedLaw, Float64[np.ndarray, "resample k"]]:
    """The law, and its parameters on all runs and then on each resample."""
    losses = np.log([run.loss for run in runs])
    theta = min(
        (_minimum(law, start, points, losses) for start in law.starts(float(losses.min()))),
        key=lambda result: result[1],
    )[0]
    thetas = [theta]
    while len(thetas) <= again.n:
        drawn = again.draw.integers(len(runs), size=len(runs))
        if len(np.unique(drawn)) >= FEWEST_RUNS - 1:
            thetas.append(_minimum(law, theta, points[drawn], losses[drawn])[0])
            again.progress(len(thetas) - 1, again.n, "resamples")
    columns = np.array([law.figures(t) for t in thetas]).T
    error = law.log_loss(theta, points) - losses
    result = FittedLaw(
        law=law,
        figures={name: fitted(of_one) for name, of_one in zip(law.names, columns, strict=True)},
        theta=theta,
        residual=float(np.sqrt(np.mean(error**2))),
    )
    return result, np.array(thetas)


def _minimum(
    law: Law,
    start: np.ndarray,
    points: Float64[np.ndarray, "run 2"],
    losses: Float64[np.ndarray, " run"],
) -> tuple[np.ndarray, float]:
    result = least_squares(
        lambda theta: law.log_loss(theta, points) - losses,
        start,
        loss="huber",
        f_scale=HUBER,
        x_scale="jac",
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
    )
    return result.x, float(result.cost)


def _optimum(
    law: FittedLaw, thetas: Float64[np.ndarray, "resample k"], compute: float
) -> Optimum | None:
    """The best division, over the resamples that have one; None where the law has none."""
    widths = np.array([best_width(theta, compute) for theta in thetas])
    best = float(widths[0])
    if np.isnan(best):
        return None
    widths = widths[np.isfinite(widths)]
    return Optimum(
        compute=compute,
        d_sae=fitted(widths),
        rows=fitted(compute / widths),
        loss=law.loss(best, compute / best),
    )


def _with_warnings(
    law: FittedLaw, optimum: Optimum | None, runs: Sequence[FinishedRun]
) -> FittedLaw:
    """Say where the law is no more than a guess."""
    if optimum is None:
        grows = " and ".join(name for name in ("a", "b") if not law.figures[name].value > 0)
        text = f"{grows} is not above 0: the loss does not fall with it, so nothing is best"
        return FittedLaw(**{**vars(law), "warnings": (text,)})
    results = []
    for name, at, tried in (
        ("width", optimum.d_sae.value, [run.d_sae for run in runs]),
        ("rows", optimum.rows.value, [run.rows for run in runs]),
    ):
        if not min(tried) < at < max(tried):
            results.append(
                f"the best {name} at the median compute, {at:.4g}, is not inside the grid "
                f"({min(tried):.4g} to {max(tried):.4g}): the optimum is extrapolated; extend it"
            )
    results += [
        f"the interval of {name} reaches 0: the runs do not show that it matters"
        for name in ("a", "b")
        if not law.figures[name].low > 0
    ]
    return FittedLaw(**{**vars(law), "warnings": tuple(results)})


def draw(laws: Laws, path: str | Path) -> Path | None:
    """Write a PNG of the law over compute, or of the one over width and k; None without either."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if laws.compute is not None:
        _losses(left, laws, laws.compute)
        _widths(right, laws, laws.compute)
    elif laws.width is not None:
        for axes, others in ((left, "k"), (right, "d_sae")):
            _slices(axes, laws, laws.width, others)
    else:
        return None
    data = bytes_io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    io.write_files({Path(path): data.getvalue()})
    return Path(path)


def _losses(axes: Axes, laws: Laws, law: FittedLaw) -> None:
    """One curve per width; the lower edge of all of them is what compute buys."""
    for colour, width in zip(_colours(laws), sorted({run.d_sae for run in laws.best}), strict=True):
        runs = sorted((r for r in laws.best if r.d_sae == width), key=lambda r: r.rows)
        rows = np.geomspace(runs[0].rows, runs[-1].rows, 50).tolist()
        axes.plot([width * n for n in rows], [law.loss(width, n) for n in rows], color=colour, lw=1)
        points = ([r.compute for r in runs], [r.loss for r in runs])
        axes.plot(*points, "o", color=colour, ms=4, label=f"{width:,} latents")
    computes = _computes(laws) if laws.optimum is not None else []
    best = [best_width(law.theta, compute) for compute in computes]
    losses = [law.loss(f, c / f) for f, c in zip(best, computes, strict=True)]
    axes.plot(computes, losses, "k--", lw=1.5, label="best division")
    axes.set(xscale="log", yscale="log", xlabel="compute, latents x rows", ylabel="loss")
    axes.legend(fontsize=8)


def _widths(axes: Axes, laws: Laws, law: FittedLaw) -> None:
    computes = _computes(laws) if laws.optimum is not None else []
    best = [best_width(law.theta, compute) for compute in computes]
    exponent = law.figures["exponent of F*"]
    text = f"F* ~ C^{exponent.value:.3f} [{exponent.low:.3f}, {exponent.high:.3f}]"
    axes.plot(computes, best, "k--", label=text)
    points = ([run.compute for run in laws.best], [run.d_sae for run in laws.best])
    axes.plot(*points, "o", color="0.6", ms=4, label="runs")
    axes.set(xscale="log", yscale="log", xlabel="compute, latents x rows", ylabel="latents")
    axes.legend(fontsize=8)


def _slices(axes: Axes, laws: Laws, law: FittedLaw, others: str) -> None:
    """Loss over width, one curve per k, or the other way round."""
    along = "d_sae" if others == "k" else "k"
    values = sorted({getattr(run, others) for run in laws.best})
    for colour, value in zip(_shades(len(values)), values, strict=True):
        runs = sorted(
            (r for r in laws.best if getattr(r, others) == value), key=lambda r: getattr(r, along)
        )
        x = [getattr(run, along) for run in runs]
        fine = np.geomspace(x[0], x[-1], 50).tolist()
        curve = [law.loss(v, value) if along == "d_sae" else law.loss(value, v) for v in fine]
        axes.plot(fine, curve, color=colour, lw=1)
        axes.plot(x, [r.loss for r in runs], "o", color=colour, ms=4, label=f"{others} {value:,}")
    axes.set(xscale="log", yscale="log", xlabel=along, ylabel="loss")
    axes.legend(fontsize=8)


def _computes(laws: Laws) -> list[float]:
    computes = [run.compute for run in laws.best]
    return np.geomspace(min(computes), max(computes), 100).tolist()


def _colours(laws: Laws) -> list[str]:
    return _shades(len({run.d_sae for run in laws.best}))


def _shades(n: int) -> list[str]:
    """From light to dark blue."""
    steps = np.linspace(0.75, 0.15, n)
    return [f"#{int(255 * s):02x}{int(255 * (0.4 + 0.5 * s)):02x}cc" for s in steps]

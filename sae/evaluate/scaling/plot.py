"""A scaling law as one picture: losses and the law over compute, and the best width."""

import io as bytes_io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from activations_cache import io
from sae.evaluate.scaling.fit import FittedLaw, Laws, best_width


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
    computes = _computes(laws)
    best = [best_width(law.theta, compute) for compute in computes]
    losses = [law.loss(f, c / f) for f, c in zip(best, computes, strict=True)]
    axes.plot(computes, losses, "k--", lw=1.5, label="best division")
    axes.set(xscale="log", yscale="log", xlabel="compute, latents x rows", ylabel="loss")
    axes.legend(fontsize=8)


def _widths(axes: Axes, laws: Laws, law: FittedLaw) -> None:
    computes = _computes(laws)
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

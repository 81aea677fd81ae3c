"""A sweep as one picture: what is gained and what it costs, strength by strength."""

from collections.abc import Callable
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae.steer.effects import MAX_REPEATED
from sae.steer.sweep import LATENT, RANDOM, TAU, Point, Sweep

PANELS: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("gain in log p(target tokens), nats", lambda point: point.target_gain),
    ("KL on neutral text, nats per token", lambda point: point.kl_neutral),
    ("perplexity of the steered text", lambda point: point.perplexity),
    ("repeated 3-grams, share (loops)", lambda point: point.repeated),
    (f"other latents moved by > {TAU:g} max, per token", lambda point: point.n_moved),
    ("top-1 agreement on neutral text", lambda point: point.top1_agreement),
)
COLOURS = {LATENT: "#c0392b", RANDOM: "#7f8c8d"}


def plot(found: Sweep, title: str, unit: str) -> bytes:
    """Return a PNG of six panels over the strengths, with the bound and the strength that keeps it.

    Args:
        found: The sweep.
        title: Heading.
        unit: What strengths are counted in.
    """
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (name, value) in zip(axes, PANELS, strict=True):
        for arm, colour in COLOURS.items():
            points = found.of_arm(arm)
            strengths = [point.strength for point in points]
            axis.plot(strengths, [value(p) for p in points], "o-", ms=4, color=colour, label=arm)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"strength, {unit}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        if found.best is not None:
            axis.axvline(found.best.strength, color="#2980b9", lw=0.8, ls="--")
    _level(axes[1], found.max_kl, "bound")
    _level(axes[2], found.perplexity_base, "base text")
    _level(axes[3], MAX_REPEATED, "loop")
    axes[1].set_yscale("symlog", linthresh=0.1)
    axes[1].set_ylim(bottom=0)
    axes[2].set_yscale("log")
    for formatter in (axes[2].yaxis.set_major_formatter, axes[2].yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _level(axis: Axes, value: float, name: str) -> None:
    axis.axhline(value, color="black", lw=0.7, ls=":")
    axis.annotate(
        name, (1, value), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom"
    )

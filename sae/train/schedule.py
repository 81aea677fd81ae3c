"""Schedules as plain functions of the step."""

import math
import random
from typing import Literal

from sae.train.loss_config import Refine
from sae.train.optim_config import Optimizer, ScheduleFree


def ramp(step: int, total_steps: int, fraction: float) -> float:
    """Rise linearly from 1/n to 1 over the first `fraction` of the steps, n of them, then stay."""
    n = round(fraction * total_steps)
    return 1.0 if step + 1 >= n else (step + 1) / n


def warmup_decay(
    step: int,
    total_steps: int,
    warmup: float,
    decay: float,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """Rise over the first `warmup` of the steps, fall over the last `decay` of them.

    A linear fall of n steps ends with the factor 1/n: no step is wasted at zero.
    """
    n = round(decay * total_steps)
    left = total_steps - step
    fall = 1.0 if left > n else max(left, 0) / n
    if shape == "cosine" and left <= n:
        fall = (1 - math.cos(math.pi * max(left, 0) / n)) / 2
    return ramp(step, total_steps, warmup) * fall


def rate_factor(settings: Optimizer, step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by at a step."""
    if isinstance(settings, ScheduleFree):
        return ramp(step, total_steps, settings.warmup)
    at = (step, total_steps)
    return warmup_decay(*at, settings.warmup, settings.decay, settings.decay_shape)


def automatic_rate(d_sae: int, n_rows: int, d_in: int) -> float:
    """The learning rate `auto`: 0.01 min(1, sqrt(rows of a step / latents)) min(1, 10/sqrt(d_in)).

    The fall with the width is Gao et al.'s (arXiv 2406.04093, A.3), the rise with the batch that of
    Adam's noise. A step of Adam has the norm lr sqrt(d_in), a decoder row the norm 1: so wide rows
    get a lower rate, or the first steps throw latents to where no row reaches them. The factors are
    what worked on worlds with known features (d_in to 96) and two real models (docs,
    ground_truth). The scale of the input is not in it: rows reach the step in the dictionary's
    units, where their mean square norm is d_in whatever the model's is, and Adam's steps do not
    depend on the scale of the loss.

    Args:
        d_sae: Latents of the whole dictionary.
        n_rows: Rows of a step, over all processes.
        d_in: Width of the rows that are read.
    """
    return 0.01 * min(1.0, (n_rows / d_sae) ** 0.5) * min(1.0, 10 / d_in**0.5)


def is_refined(settings: Refine, step: int, total_steps: int) -> bool:
    """Whether refining is over, and the encoder learns to do without."""
    return step >= round(settings.until * total_steps)


def holds_decoder(settings: Refine, step: int, total_steps: int) -> bool:
    """Whether the decoder stands still at a step: after refining, until it learns again."""
    over = step >= round(settings.held_until * total_steps)
    return is_refined(settings, step, total_steps) and not over


def slack_now(settings: Refine | None, step: int, total_steps: int) -> float:
    """What k is multiplied by at a step."""
    if settings is None or is_refined(settings, step, total_steps):
        return 1.0
    return settings.slack if step >= round(settings.slack_from * total_steps) else 1.0


def falling_k(step: int, total_steps: int, start: int, end: int, fraction: float) -> int:
    """Go linearly from start to end over the first `fraction` of the steps, then stay."""
    n = round(fraction * total_steps)
    return end if step >= n else end + round((start - end) * (n - step) / n)


def falling_p(step: int, total_steps: int, end: float, n: int, start: float) -> float:
    """Stay at 1 for the fraction `start` of the steps, then reach end in n equal jumps."""
    first = round(start * total_steps)
    if step < first:
        return 1.0
    jumps = min(n, 1 + (step - first) * n // max(total_steps - first, 1))
    return 1 - (1 - end) * jumps / n


def random_prefixes(step: int, seed: int, n: int, d_sae: int, exponent: float) -> tuple[int, ...]:
    """Draw n sizes with the density m^-(1 + exponent) on 1..d_sae; the same for the same step.

    They rise, each stands there once, and d_sae is the last of them.
    """
    draw = random.Random(f"prefixes {seed} {step}")
    left = 1 - (d_sae + 1) ** -exponent  # the density from 1 to d_sae + 1, sizes being rounded down
    sizes = {int((1 - draw.random() * left) ** (-1 / exponent)) for _ in range(n)}
    return tuple(sorted({min(size, d_sae) for size in sizes} | {d_sae}))

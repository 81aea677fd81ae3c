"""Schedules as plain functions of the step."""


def ramp(step: int, total_steps: int, fraction: float) -> float:
    """Rise linearly from 1/n to 1 over the first `fraction` of the steps, n of them, then stay."""
    n = round(fraction * total_steps)
    return 1.0 if step + 1 >= n else (step + 1) / n


def warmup_decay(step: int, total_steps: int, warmup: float, decay: float) -> float:
    """Rise over the first `warmup` of the steps, fall linearly over the last `decay` of them.

    The last step has the factor 1/n, n the number of falling steps: none is wasted at zero.
    """
    n = round(decay * total_steps)
    left = total_steps - step
    fall = 1.0 if left > n else max(left, 0) / n
    return ramp(step, total_steps, warmup) * fall

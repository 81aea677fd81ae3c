"""Times on a CUDA device: the ceilings of this process, and calls with rotated inputs."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

GROUP = 10  # calls queued behind one wait, so that the device never waits for Python


class Quantiles(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float
    n_times: int


def quantiles(times: Sequence[float]) -> Quantiles:
    """Take the median and the 20 and 80 % points (lower neighbours) of some times."""
    ordered = sorted(times)
    median, p20, p80 = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.5, 0.2, 0.8))
    return Quantiles(median, p20, p80, len(ordered))


def _group(calls: Sequence[Callable[[], Any]], start: int, wait: bool) -> list[float]:
    """Time GROUP calls one by one, on the device's clock."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(GROUP + 1)]
    if wait:
        torch.cuda._sleep(10_000_000)  # some 5 ms, in which the calls are queued
    events[0].record()
    for i in range(GROUP):
        calls[(start + i) % len(calls)]()
        events[i + 1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def measure(calls: Sequence[Callable[[], Any]], seconds: float, wait: bool = True) -> Quantiles:
    """Time calls that do the same on different inputs, in turn, for about so many seconds.

    With `wait` the queue is filled while the device waits, so that only its own time is seen;
    without, the time includes what the device waits for Python.
    """
    for _ in range(2):
        _group(calls, 0, wait)
    times: list[float] = []
    while sum(times) < 1000 * seconds and len(times) < 1000:
        times += _group(calls, len(times), wait)
    return quantiles(times)


def once(calls: Sequence[Callable[[], Any]], seconds: float, wait: bool = True) -> Quantiles:
    """Call each once, by the host's clock: whether it works, not how fast it is."""
    del seconds, wait
    began = time.perf_counter()
    for call in calls:
        call()
    took = 1e3 * (time.perf_counter() - began) / len(calls)
    return Quantiles(took, took, took, len(calls))


class DevicePeaks(NamedTuple):
    """What the device reached here: bytes and floating point operations per second."""

    bandwidth: float
    arithmetic: float


def ceilings(seconds: float) -> DevicePeaks:
    """Measure a copy of 4 GiB (read and written) and a bfloat16 product of 8192^3.

    On a CPU, where nothing is measured, both are what no code reaches.
    """
    if not torch.cuda.is_available():
        return DevicePeaks(1e15, 1e18)
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copy = measure([partial(target.copy_, source)], seconds).median
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure([partial(torch.mm, a, b)], seconds).median
    return DevicePeaks(8 * (1 << 30) / copy * 1e3, 2 * 8192**3 / product * 1e3)


def n_sets(set_bytes: int) -> int:
    """Choose how many input sets take turns, so that the L2 cache never holds the next one."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0
    return max(2, min(8, 1 + math.ceil(2 * cache / set_bytes))) if set_bytes < 4 << 30 else 1

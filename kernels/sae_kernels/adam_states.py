"""Adam's two states in 16 or 8 bits, rounded at random so that small changes are not lost.

Rounding to the nearest would stop a mean that follows slowly: at beta2 = 0.999 the second state
changes by about a thousandth a step, and neighbours in bfloat16 differ by four.
"""

import functools
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int, Shaped, UInt8
from torch import Tensor

BLOCK = 256
"""Neighbours in a row that share a scale."""


class Packed(NamedTuple):
    """A state of some rows: numbers in bfloat16, or codes of 8 bits with a scale for each block."""

    numbers: Float[Tensor, "d_sae d_out"] | UInt8[Tensor, "d_sae d_out"]
    scales: Float[Tensor, "d_sae block"] | None

    def chunk(self, start: int, n_rows: int) -> "Packed":
        """Some rows of it, which share its memory."""
        rows = slice(start, start + n_rows)
        return Packed(self.numbers[rows], None if self.scales is None else self.scales[rows])


def n_blocks(width: int) -> int:
    """Scales of a row of so many numbers."""
    return -(-width // BLOCK)


def unpack(state: Packed, *, signed: bool) -> Float[Tensor, "d_sae d_out"]:
    """The state in float32; of the unsigned one, 8 bits hold the root."""
    if state.scales is None:
        return state.numbers.float()
    width = state.numbers.shape[1]
    scales = state.scales.repeat_interleave(BLOCK, dim=1)[:, :width]
    result = _levels(signed, state.numbers.device)[state.numbers.int()] * scales
    return result if signed else result.square()


def pack_(
    state: Packed,
    new: Float[Tensor, "d_sae d_out"],
    generator: torch.Generator,
    *,
    signed: bool,
    skip: Float[Tensor, ""] | None = None,
) -> None:
    """Write new values into a state, in place, but for a step that is skipped."""
    if state.scales is None:
        _put_(state.numbers, rounded(new, generator), skip)
        return
    values = new if signed else new.sqrt()
    d_sae, width = values.shape
    blocks = torch.nn.functional.pad(values, (0, state.scales.shape[1] * BLOCK - width))
    largest = blocks.view(d_sae, -1, BLOCK).abs().amax(dim=2)
    _put_(state.scales, largest, skip)
    unit = largest.clamp_min(torch.finfo(largest.dtype).tiny)
    parts = values / unit.repeat_interleave(BLOCK, dim=1)[:, :width]
    _put_(state.numbers, _coded(parts, generator, signed=signed), skip)


def _put_(
    old: Shaped[Tensor, "*shape"], new: Shaped[Tensor, "*shape"], skip: Float[Tensor, ""] | None
) -> None:
    old.copy_(new if skip is None else old.where(skip > 0, new.to(old.dtype)))


def rounded(
    values: Float[Tensor, "*shape"], generator: torch.Generator
) -> BFloat16[Tensor, "*shape"]:
    """Round float32 up or down to bfloat16, with the chances that keep the expectation."""
    bits = values.view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device
    )
    cut = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).bfloat16()


def _coded(
    parts: Float[Tensor, "d_sae d_out"], generator: torch.Generator, *, signed: bool
) -> Int[Tensor, "d_sae d_out"]:
    """Numbers of levels, one of the two around each value; of roots, only 0 itself becomes 0.

    A second moment of 0 beside a first one that is not would make a step without bounds.
    """
    levels = _levels(signed, parts.device)
    above = torch.bucketize(parts, levels).clamp_(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    chance = torch.rand(parts.shape, generator=generator, device=parts.device)
    code = above - (chance * (high - low) >= parts - low).int()
    return code if signed else code.maximum((parts > 0).to(code.dtype))


@functools.cache
def _levels(signed: bool, device: torch.device) -> Float[Tensor, " level"]:
    """The 256 rising levels of the dynamic tree (Dettmers et al. 2022, arXiv 2110.02861, 2.1).

    Each power of ten from 1e-6 to 1 has twice as many levels as the one below, evenly.
    """
    results = [0.0, 1.0]
    for exponent in range(7):
        n = 2**exponent if signed else 2 ** (exponent + 1)
        middles = [(0.1 + 0.9 * (i + 0.5) / n) * 10.0 ** (exponent - 6) for i in range(n)]
        results += [*middles, *(-m for m in middles)] if signed else middles
    return torch.tensor(sorted(results), device=device)

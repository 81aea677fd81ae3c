"""Exact top-k of the encoder from a cheap product, with a proof for every row.

What is selected from is `pre = float32(<x, w> + b)`, summed in float64 and rounded once. Computing
that for every latent is dear, so a cheaper product (float32, or bfloat16 where the CPU multiplies
it faster) names some candidates more than k, and only those are computed as defined. Each row is
then *certified*: everything that was left out lies, by the bound on the cheap product's error,
below the k-th value. Rows without a certificate go to the next screen and at last to `pre` of every
latent. So the answer is the same bit for bit, whatever the screen was, and however the batch was
cut.

The bound on <x, w>, with r16 the rounding to bfloat16 and measured norms of what it changed:
`|x - r16(x)| |w| + |r16(x)| |w - r16(w)|`, and for the summation of d products in float32 in any
order `2 d 2^-24 |x| |w|`. It differs for each (row, latent), so it is added inside the product, by
columns appended to x and w: the screen's entries are upper bounds themselves.
"""

import math
import time
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels.product import WORKSPACE_BYTES, Product
from sae_kernels.select import _pick, topk_select

Screen = Literal["bfloat16", "float32"]

UNIT = 2.0**-24  # half the spacing of float32 at 1
TINY = 2.0**-126  # below it, a bfloat16 product may take a number for 0
HUGE = 2.0**120  # sums below it stay finite in float32, with the bound added
EXTRA = 8  # columns that hold the bound and the bias
ALIGN = 8  # float64 numbers in 64 bytes: rows that start alike are summed alike
CHUNK_BYTES = 1 << 24  # of pre-activations in bfloat16 held at a time
LATENT_BYTES = 1 << 22  # of latents in float64 held at a time
RESCORED_ROWS = 4096  # rows of x held in float64 at a time
RESCORED_FROM = 256  # latents for each that is kept: with fewer, single dot products are dear
PAYS = 1.5  # times that bfloat16 must be faster than float32
PAYS_FROM = 512  # rows, for which the latents are rounded to bfloat16 once


class CertifiedTopK(NamedTuple):
    """The winners of each row, and how many rows the first screen left without a certificate."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]
    n_fallback: int


def rescore(product: Product, indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
    """Compute the definition, `float32(<x, w> + b)` by way of float64, for these latents alone.

    The pairs are taken in the order of their latents, some latents at a time: these stay in the
    cache, and no float64 copy of all of them is made. Every pair is one dot product of rows that
    start at a cache line, so its value does not depend on what else is asked for.
    """
    x, rows, bias = product
    batch, k = indices.shape
    values = torch.empty(batch, k)
    for start in range(0, batch, RESCORED_ROWS):
        part = slice(start, start + RESCORED_ROWS)
        flat = indices[part].flatten()
        latents, order = torch.sort(flat.int(), stable=True)
        dots = _dots(_padded(x[part]), rows, latents.long(), order // k)
        exact = torch.empty_like(dots).index_copy_(0, order, dots).add_(bias.double()[flat])
        values[part] = exact.view(-1, k)
    return values


def _dots(
    x: Float[Tensor, "batch wide"],
    rows: Float[Tensor, "d_sae d_in"],
    latents: Int[Tensor, " entry"],
    places: Int[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """Compute `<x[place], rows[latent]>` in float64; the latents ascend."""
    n_block = max(1, LATENT_BYTES // (8 * x.shape[1]))
    starts = torch.arange(0, len(rows) + n_block, n_block)
    bounds = torch.searchsorted(latents, starts).tolist()
    dots = torch.empty(len(latents), dtype=torch.float64)
    none = torch.zeros(n_block, dtype=torch.int64)
    for block, (low, high) in enumerate(pairwise(bounds)):
        part, first = latents[low:high], block * n_block
        if len(part) < n_block:  # rather each pair's row by itself
            result, bags = rows[part], torch.arange(len(part))
        else:
            result, bags = rows[first : first + n_block], part - first
        if len(part):
            dots[low:high] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                _padded(result), x, places[low:high], none, bags, 0
            )
    return dots


def _padded(matrix: Float[Tensor, "row d_in"]) -> Float[Tensor, "row wide"]:
    """Copy to float64, with zeros up to whole cache lines."""
    width = matrix.shape[1]
    wide = matrix.new_empty(len(matrix), width + -width % ALIGN, dtype=torch.float64)
    wide[:, :width] = matrix
    wide[:, width:] = 0.0
    return wide


class _Upper(NamedTuple):
    """A product whose entries, with `relative` and `slack` added, are not below `pre`."""

    x: Float[Tensor, "batch wide"]
    rows: Float[Tensor, "d_sae wide"]
    bias: Float[Tensor, " d_sae"] | None
    relative: float
    slack: Float[Tensor, " batch"]

    def into(self, rows: slice, out: Float[Tensor, "row d_sae"]) -> None:
        if self.bias is None:
            torch.mm(self.x[rows], self.rows.T, out=out)
        else:
            torch.addmm(self.bias, self.x[rows], self.rows.T, out=out)

    def limit(self, rows: slice, left_out: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Bound `pre` of everything in these rows that was screened no higher than `left_out`."""
        left_out = left_out.double()
        return left_out + left_out.abs() * self.relative + self.slack[rows]


def _norm(rows: Float[Tensor, "row d_in"]) -> Float[Tensor, " row"]:
    """Bound the norm of each row from above, also where its squares are rounded or underflow.

    What is added is more, by far, than the numbers below TINY that a product may take for 0.
    """
    width = rows.shape[1]
    norm = torch.linalg.vector_norm(rows, dim=1)
    return norm * (1 + 4 * width * UNIT) + math.sqrt(width) * 2.0**-62


def _error(width: int) -> float:
    """Bound the relative error of a sum of products in float32, in any order."""
    return 2 * (width + EXTRA) * UNIT


def _largest(product: Product) -> Float[Tensor, " batch"]:
    """Bound any sum over any part of `<x, w> + b` of each row."""
    x, rows, bias = product
    return _norm(x).double() * _norm(rows).max().double() + bias.abs().max().double()


def _slack(product: Product, relative: float) -> Float[Tensor, " batch"]:
    """Allow for numbers taken for 0, and for all that is lost where a sum can overflow."""
    largest = _largest(product)
    slack = largest * relative + 8 * (product.x.shape[1] + EXTRA) * TINY
    return slack.masked_fill(~(largest < HUGE), math.inf)


def _upper32(product: Product) -> _Upper:
    x, rows, bias = product
    return _Upper(x, rows, bias, 4 * UNIT, _slack(product, _error(x.shape[1])))


def _rounded(
    rows: Float[Tensor, "row d_in"], out: Float[Tensor, "row wide"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Write the rows as bfloat16; return the norms of what that changed and of the rows."""
    low = out[:, : rows.shape[1]]
    low.copy_(rows)
    return _norm(rows - low), _norm(rows)


def _split(bias: Float[Tensor, " d_sae"]) -> list[Float[Tensor, " d_sae"]]:
    """Write float32 as the sum of three bfloat16 (but for what is below TINY)."""
    parts = []
    for _ in range(3):
        parts.append(bias.bfloat16())
        bias = bias - parts[-1]
    return parts


def _upper16(product: Product) -> _Upper:
    """Append the error's bound and the bias to rounded operands, as products of columns."""
    x, rows, bias = product
    width, error = x.shape[1], _error(x.shape[1])
    up = 1 + 2.0**-7  # more than rounding to bfloat16 takes off
    low_x = torch.empty(len(x), width + EXTRA, dtype=torch.bfloat16)
    low_rows = torch.empty(len(rows), width + EXTRA, dtype=torch.bfloat16)
    low_x[:, width:], low_rows[:, width:] = 0.0, 0.0
    for start in range(0, len(rows), 512):  # as many as stay in the cache
        part = slice(start, start + 512)
        lost, norm = _rounded(rows[part], low_rows[part])
        low_rows[part, width], low_rows[part, width + 1] = norm * up, lost * up
    for column, part in enumerate(_split(bias), width + 2):
        low_rows[:, column] = part
    lost, norm = _rounded(x, low_x)
    low_x[:, width] = (lost + error * norm) * up
    low_x[:, width + 1] = norm * (1 + error) * up
    low_x[:, width + 2 : width + 5] = 1.0
    # The result is rounded to bfloat16, by 2^-8 at most: twice that, should it be cut off instead.
    # Of a bias up to |x| |w| half of `error` pays for the rounding; of a larger one, this does.
    return _Upper(low_x, low_rows, None, 2.0**-7, _slack(product, 0.0))


def _n_candidates(k: int, width: int, d_sae: int, screen: Screen) -> int:
    """Guess how many latents the screen's error can lift to the k-th value, on normal data.

    The pre-activations' tail falls by e within 1 / z standard deviations, and the error's bound
    is `spread` of them. A wrong guess costs time, not the result.
    """
    z = math.sqrt(2 * math.log(max(d_sae / k, 2.0)))
    spread = 0.004 * math.sqrt(width) + 0.03 if screen == "bfloat16" else 0.01
    return min(d_sae, math.ceil(k * math.exp(z * spread)) + 4)


@cache
def bf16_speedup() -> float:
    """Measure how much faster than float32 this CPU multiplies in bfloat16; once a process."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 512, dtype=dtype)
        rows = torch.ones(2048, 512, dtype=dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(x, rows.T)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def is_rescored(product: Product, k: int) -> bool:
    """Tell whether the definition above holds for this product; it depends on its form alone."""
    x = product.x
    many = len(product.rows) >= RESCORED_FROM * k
    return x.device.type == "cpu" and x.dtype == torch.float32 and many


def best_screen(product: Product, k: int) -> Screen:
    """Name the screen that is expected to be the fastest one; the result is the same."""
    (batch, width), d_sae = product.x.shape, len(product.rows)
    many = _n_candidates(k, width, d_sae, "bfloat16")
    fits = batch >= PAYS_FROM and many <= 3 * k
    return "bfloat16" if fits and bf16_speedup() >= PAYS else "float32"


class _Screened(NamedTuple):
    """Candidates of each row, and a bound on `pre` of the other latents, -inf without any."""

    candidates: Int[Tensor, "batch n"]
    limit: Float[Tensor, " batch"]


def _screen(product: Product, k: int, screen: Screen) -> _Screened:
    batch, d_sae = len(product.x), len(product.rows)
    n = _n_candidates(k, product.x.shape[1], d_sae, screen)
    if n == d_sae:
        limit = torch.full((batch,), -math.inf, dtype=torch.float64)
        return _Screened(torch.arange(d_sae).expand(batch, -1), limit)
    upper = _upper16(product) if screen == "bfloat16" else _upper32(product)
    space = CHUNK_BYTES if screen == "bfloat16" else WORKSPACE_BYTES
    n_rows = max(1, min(batch, space // (d_sae * upper.x.itemsize)))
    workspace = torch.empty(n_rows, d_sae, dtype=upper.x.dtype)
    candidates = torch.empty(batch, n, dtype=torch.int64)
    limit = torch.empty(batch, dtype=torch.float64)
    for start in range(0, batch, n_rows):
        out = workspace[: batch - start]
        rows = slice(start, start + len(out))
        upper.into(rows, out)
        pick = _pick(out, n)
        candidates[rows] = pick.indices.sort(dim=1).values
        limit[rows] = upper.limit(rows, pick.left_out)
    return _Screened(candidates, limit)


def _best(
    product: Product, candidates: Int[Tensor, "batch n"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Take the k best of each row's candidates, which ascend, by the definition."""
    best = topk_select(rescore(product, candidates), k, relu=False, backend="torch")
    return best.values, candidates.gather(1, best.indices)


def certified_topk(product: Product, k: int, screen: Screen) -> CertifiedTopK:
    """Take the k largest `pre` of each row as the module defines it, ties by index."""
    screens: list[Screen] = ["float32"] if screen == "float32" else ["bfloat16", "float32"]
    values, indices = torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    todo, n_fallback = torch.arange(len(product.x)), 0
    for step, name in enumerate(screens):
        left = product if step == 0 else product._replace(x=product.x[todo])
        screened = _screen(left, k, name)
        result = _best(left, screened.candidates, k)
        certified = result[0].amin(1) > screened.limit
        if step == 0:
            values, indices = result
        else:
            values[todo], indices[todo] = result
        todo = todo[~certified]
        n_fallback = len(todo) if step == 0 else n_fallback
        if not len(todo):
            break
    every = torch.arange(len(product.rows))
    for rows in todo.split(max(1, CHUNK_BYTES // (8 * len(every)))):
        left = product._replace(x=product.x[rows])
        values[rows], indices[rows] = _best(left, every.expand(len(rows), -1), k)
    return CertifiedTopK(values, indices, n_fallback)

"""Block sizes of the Triton kernels, as plain functions of shape and dtype, and their launch.

Nothing is tuned at run time: the same shapes give the same kernels, hence the same bits. Counts
that change from step to step (batch, k) reach the kernels as numbers and change the block sizes
only by powers of two, so that annealing k compiles a handful of kernels.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

WARP = 32
MAX_KEYS = 1 << 13  # selected by one program: 16 keys in the registers of each of 512 threads
DIRECT_KEYS = 1 << 11  # rows so short that groups would not pay
MIN_GROUP = 8
MAX_GROUP = 128
MAX_K = MAX_KEYS // MIN_GROUP  # so that the members of k groups fit one program


def next_pow2(n: int) -> int:
    """Round a positive number up to a power of two."""
    return 1 << (n - 1).bit_length()


def clamp(n: int, low: int, high: int) -> int:
    """Force a number into a range."""
    return max(low, min(n, high))


class Picker(NamedTuple):
    """How one program takes the k largest of its keys."""

    block: int
    warps: int


def picker(n_keys: int) -> Picker:
    """Hold 16 keys a thread where there are enough of them."""
    block = max(next_pow2(n_keys), 64)
    return Picker(block, clamp(block // (16 * WARP), 1, 16))


def group_size(n: int, k: int) -> int | None:
    """Choose how many neighbours share a group when k of n are selected; None for no groups.

    About `sqrt(n / k)` minimises the `n / size` maxima and the `k * size` members looked at.
    """
    if n <= DIRECT_KEYS or k > MAX_K:
        return None
    k = next_pow2(k)
    size = 1 << round(math.log2(n / k) / 2)
    size = clamp(size, MIN_GROUP, min(MAX_GROUP, MAX_KEYS // k))
    return None if n <= MAX_KEYS and 2 * k * size >= n else size


def batch_group_size(n: int, k: int) -> int:
    """Choose how many neighbours share a group when k of all n are selected; 1 for no groups.

    There are never fewer groups than are chosen, also where those at the rows' ends are short.
    """
    size = clamp(1 << round(math.log2(n / k) / 2), MIN_GROUP, MAX_GROUP)
    return 1 if 2 * k * size >= n else size


class Maxima(NamedTuple):
    """How many groups one program takes the maxima of."""

    groups: int
    warps: int


def maxima(n_groups: int, size: int) -> Maxima:
    """Let a program read 8192 values where there are as many."""
    return Maxima(min(8192 // size, next_pow2(n_groups)), 4)


class Gather(NamedTuple):
    """The tile of gathered rows that one program holds: `entries` rows, `width` columns of each."""

    entries: int
    width: int
    warps: int


def weighted_rows(width: int) -> Gather:
    """Give each warp 256 columns, eight 16-bit values a thread, and keep 8 rows in flight."""
    if width <= 256:
        return Gather(8, max(16, next_pow2(width)), 1)
    padded = {size: -(-width // size) * size for size in (1024, 512, 256)}
    size = min(padded, key=lambda size: (padded[size], -size))
    return Gather(8, size, size // 256)


def row_products(width: int, k: int) -> Gather:
    """Read 16 rows at once, in steps that leave room for the partial sums of each thread."""
    return Gather(min(16, next_pow2(k)), clamp(next_pow2(width), 16, 256), 4)


CSR_SPLITS = 4  # programs that share the entries of one row, whose number only the device knows
MAX_FUSED_K = 256


def decode_mse(width: int, k: int) -> Gather:
    """Hold a slab of all k rows, 32 values a thread, so that each is read once."""
    entries = max(next_pow2(k), 4)
    warps = 8 if entries > 64 else 4
    return Gather(
        entries, clamp(warps * 1024 // entries, 16, max(16, min(256, next_pow2(width)))), warps
    )


class SegmentTile(NamedTuple):
    """The tile of a segment product: `entries` sorted entries, `width` columns at a time."""

    entries: int
    width: int
    splits: int
    warps: int
    stages: int


def segments(n_entries: int, width: int, itemsize: int, arch: int) -> SegmentTile:
    """Fill the tensor cores' tile with entries; share a block's columns where blocks are few.

    32-bit rows are multiplied in three parts, which takes three times the registers.
    """
    columns = clamp(next_pow2(width), 16, 64 if itemsize == 2 else 32)
    n_blocks = -(-n_entries // 64)
    splits = clamp(1024 // n_blocks, 1, -(-width // columns))
    return SegmentTile(64, columns, splits, 4, 3 if arch >= 90 else 2)


FINISH_WIDTH = 1024  # columns of a latent's row that one program sums up or clears
SUM_ENTRIES = 128  # entries of a latent that one program adds up at a time


class RowTile(NamedTuple):
    """How one program holds a whole row."""

    width: int
    warps: int


MAX_ROW = 1 << 14


def whole_row(width: int) -> RowTile:
    """Hold 16 columns a thread, 32 in the widest rows."""
    padded = max(64, next_pow2(width))
    return RowTile(padded, clamp(padded // (16 * WARP), 1, 16))


class ProductTile(NamedTuple):
    """The tile of the encoder's product."""

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int


WORKSPACE_BYTES = 1 << 30  # worked on at a time on a GPU: enough rows to keep a product busy


def product(arch: int) -> ProductTile:
    """Fill the shared memory and the tensor cores of the architecture."""
    return ProductTile(128, 256, 64, 8, 3) if arch == 90 else ProductTile(128, 128, 64, 8, 3)


def rows_at_a_time(batch: int, d_sae: int) -> int:
    """Choose how many rows share the workspace: whole tiles, where it holds one."""
    n_rows = max(1, min(batch, WORKSPACE_BYTES // (4 * d_sae)))
    return n_rows if n_rows < 128 or n_rows == batch else n_rows // 128 * 128


GATED_WIDTH = 0
"""Widest rows of 16 bits whose product is the gated one; beyond, it is the library's.

By arithmetic it pays up to 1536. No GPU has run it, so none takes it before the suite proposes it.
"""


def gates(width: int, itemsize: int) -> bool:
    """Tell whether the encoder's product stores only the groups that its maxima let through."""
    return itemsize == 2 and width <= GATED_WIDTH


def first_latents(d_sae: int, size: int, k: float | int) -> int:
    """Choose how many latents are stored whole, and bound those of which k of a row are wanted.

    An eighth, which writes the least where there are 64 times k groups. 0 where it has fewer
    groups than twice k: then more than half of the others would be stored as well.
    """
    n_latents = min(d_sae // 8, MAX_KEYS * size) // MAX_GROUP * MAX_GROUP
    return n_latents if n_latents >= 2 * k * size else 0


def launch(
    kernel: Any, grid: tuple[Any, ...], like: Shaped[Tensor, "..."], *args: Any, **options: Any
) -> None:
    """Launch a Triton kernel on the GPU that `like` is on, which need not be the current one."""
    with torch.cuda.device_of(like):
        kernel[grid](*args, enable_fp_fusion=True, **options)

"""BatchTopK's selection from the rows and the latents of all processes, exactly."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations import EncoderWeights, Latents, from_csr, pad_silent, ungated
from sae.train.ranks import Ranks
from sae_kernels import Csr, encode_batch_topk

DIGIT_BITS = 16
"""The largest values are counted by so many of their bits at a time."""


class _Bound(NamedTuple):
    """What separates the values that are kept from the others."""

    key: int
    """The smallest value that is kept, as its bits."""
    n_equal: int
    """How many of those that equal it are kept."""


def batch_topk(
    u: Float[Tensor, "batch d_in"], weights: EncoderWeights, k: int, n_rows: int, ranks: Ranks
) -> Latents:
    """This process's part of the k * n_rows largest activations of all processes.

    Value descending, on equal values row and then latent ascending, as in one process. Each
    process offers its own best; where the bound lies below all of these, it may have more that
    belong to the answer, so all of them offer twice as many.
    """
    d_sae = len(weights.enc_rows)
    offered = min(2 * k, d_sae)
    while True:
        found = encode_batch_topk(
            u, weights.enc_rows, weights.b_enc, offered, b_in=weights.b_in, relu=True
        )
        keys = _keys(found.values)
        bound = _bound(keys, k * n_rows, ranks)
        least = int(keys.min()) if len(keys) else 0
        is_short = offered < d_sae and least >= bound.key > 0
        if not ranks.largest(is_short):
            kept = _above(found, keys, bound, ranks)
            return ungated(pad_silent(from_csr(kept)), weights)
        offered = min(2 * offered, d_sae)


def _keys(values: Float[Tensor, " entry"]) -> Int[Tensor, " entry"]:
    """Bits of values that are not negative; these order them, with NaN on top."""
    wide = values.dtype == torch.float64
    return values.detach().abs().view(torch.int64 if wide else torch.int32)


def _bound(keys: Int[Tensor, " entry"], n_kept: int, ranks: Ranks) -> _Bound:
    """Find the n_kept-th largest key of all processes, digit by digit from the highest."""
    found, left = 0, n_kept
    for shift in range(8 * keys.element_size() - DIGIT_BITS, -1, -DIGIT_BITS):
        digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
        counts = torch.bincount(digits, minlength=1 << DIGIT_BITS)
        ranks.world.sum_(counts)
        above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, left))
        left -= int(above[place] - counts.flip(0)[place])
        digit = (1 << DIGIT_BITS) - 1 - place
        found |= digit << shift
        keys = keys[digits == digit]
    return _Bound(found, left)


def _above(found: Csr, keys: Int[Tensor, " entry"], bound: _Bound, ranks: Ranks) -> Csr:
    """Keep what is above the bound, and of what equals it the first ones of all processes."""
    lengths = found.row_ptr.diff()
    rows = torch.arange(len(lengths), device=keys.device).repeat_interleave(lengths)
    equal = keys == bound.key
    per_row = torch.bincount(rows[equal], minlength=len(lengths))
    beside = ranks.latents.gather(per_row)  # (shards, batch)
    per_process = ranks.rows.gather(beside.sum().reshape(1))
    before = int(per_process[: ranks.rows.rank].sum())
    earlier_rows = beside.sum(dim=0).cumsum(0) - beside.sum(dim=0)
    first = before + earlier_rows + beside[: ranks.latents.rank].sum(dim=0)
    own = per_row.cumsum(0) - per_row
    place = torch.arange(int(per_row.sum()), device=keys.device) - own[rows[equal]]
    kept = keys > bound.key
    kept[equal] = first[rows[equal]] + place < bound.n_equal
    ends = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[found.row_ptr]
    return Csr(found.values[kept], found.indices[kept], ends)

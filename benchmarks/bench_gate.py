"""What the gate of the encoder's product saves, by arithmetic: a model in torch, no GPU.

    python -m benchmarks.bench_gate [--rows 128] [--record]

The product writes pre-activations in float32. The library's writes all, which the selection reads
once. The gated one writes the first latents, the groups whose maximum reaches the bound, and all
maxima; the selection reads the maxima and the members of k groups. Counted are the bytes of a row,
at the shapes of the GPU suite, for four kinds of rows:

- gaussian: x and the encoder's rows are normal.
- features: x is a sum of 2 k directions, which occur by a power law, and noise; the encoder reads
  the directions, as that of a trained dictionary does, with a bias under which most are silent.
- frequent first, frequent last: the same, with the latents in the order of how often they fire, as
  Matryoshka puts them, and in the reverse one, which is the worst for a bound from the first.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from benchmarks.gpu_suite.case import Shape
from benchmarks.rows import append, surroundings
from sae_kernels import blocks

SHAPES = (
    Shape(768, 24576, 32),
    Shape(768, 131072, 32),
    Shape(2304, 65536, 64),
    Shape(4096, 131072, 64),
)
NOISE, BIAS = 0.1, -0.2


class ReadRows(NamedTuple):
    """Some rows, and what reads them."""

    x: Tensor
    rows: Tensor
    bias: Tensor


def drawn(kind: str, s: Shape, n_rows: int) -> ReadRows:
    """Rows of a kind, and an encoder for them."""
    draw = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(s.d_sae, s.d_model, generator=draw), dim=1)
    if kind == "gaussian":
        return ReadRows(torch.randn(n_rows, s.d_model, generator=draw), rows, torch.zeros(s.d_sae))
    often = 1.0 / torch.arange(1, s.d_sae + 1)
    if kind == "features":
        often = often[torch.randperm(s.d_sae, generator=draw)]
    elif kind == "frequent last":
        often = often.flip(0)
    fires = torch.multinomial(often.expand(n_rows, -1), 2 * s.k, generator=draw)
    strength = 1 + torch.rand(n_rows, 2 * s.k, generator=draw)
    x = torch.einsum("nk,nkd->nd", strength, rows[fires])
    x += NOISE * torch.randn(x.shape, generator=draw)
    return ReadRows(x, rows, torch.full((s.d_sae,), BIAS))


def parts(encoder: ReadRows) -> Iterator[Tensor]:
    """The pre-activations, some rows at a time."""
    for x in encoder.x.split(16):
        yield torch.addmm(encoder.bias, x, encoder.rows.T)


def figures(encoder: ReadRows, k: int) -> dict[str, float]:
    """MB a row that both ways write and read, and the share of the groups that is stored."""
    d_sae = len(encoder.rows)
    size = blocks.group_size(d_sae, k)
    assert size is not None, "no groups"
    first = blocks.first_latents(d_sae, size, k) // size
    n_groups, shares = -(-d_sae // size), []
    for pre in parts(encoder):
        maxima = pad(pre, (0, -d_sae % size), value=-torch.inf).unflatten(1, (-1, size)).amax(2)
        bound = maxima[:, :first].topk(k).values[:, -1:]
        stored = maxima >= bound
        stored[:, :first] = True
        best = maxima.topk(k).values[:, -1:]
        assert bool((stored | (maxima < best)).all()), "a group of the best was not stored"
        shares.append(stored.float().mean(1))
    share = float(torch.cat(shares).mean())
    every, looked_at = 4 * d_sae, 4 * (n_groups + k * size)
    return {
        "stored": share,
        "library_written": every / 1e6,
        "library_read": (every + looked_at) / 1e6,
        "gated_written": (share * every + 4 * n_groups) / 1e6,
        "gated_read": (looked_at + 4 * first) / 1e6,
    }


def main() -> None:
    """Print a line for each shape and kind; keep them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--record", action="store_true", help="append to results/gate.jsonl")
    options = parser.parse_args()
    found = []
    for shape in SHAPES:
        for kind in ("gaussian", "features", "frequent first", "frequent last"):
            one = figures(drawn(kind, shape, options.rows), shape.k)
            moved = [one[f"{way}_written"] + one[f"{way}_read"] for way in ("library", "gated")]
            found.append({"shape": shape._asdict(), "kind": kind, "rows": options.rows, **one})
            print(
                f"{shape!s:34} {kind:15} {one['stored']:4.0%} stored, written "
                f"{one['library_written']:.3f} -> {one['gated_written']:.3f} MB a row, moved "
                f"{moved[1] / moved[0]:.0%}"
            )
    if options.record:
        print(append("gate", [surroundings() | one for one in found]))


if __name__ == "__main__":
    main()

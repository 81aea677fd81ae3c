"""Documents that share a context and shall not see each other: how a model is made to read them.

Position ids that begin anew in each document keep them apart in some models and not in others; a
row of its own for each document does in every model that leaves padding alone. Which of the two is
used is settled by a trial (`activations_cache.probe`).
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations_cache.shard import Examples

Way = Literal["positions", "rows"]
"""How documents are kept apart: by position ids, or by a row of the batch for each."""

Run = Callable[..., Mapping[str, Float[Tensor, "example pos _"]]]
"""Reads token ids and gives the streams at some hook points, as `capture` does."""


class Piece(NamedTuple):
    """One document, or a part of one, in its context."""

    example: int
    start: int
    stop: int


def pieces_of(
    tokens: Int[Tensor, "example pos"], segment: Int[Tensor, "example pos"]
) -> list[Piece]:
    """Return the pieces of some contexts, without the padding at their ends."""
    results = []
    for example, (ids, numbers) in enumerate(zip(tokens, segment, strict=True)):
        real = numbers[ids >= 0]
        bounds = [0, *(real.diff().nonzero().flatten() + 1).tolist(), len(real)]
        results += [Piece(example, *pair) for pair in pairwise(bounds)]
    return [piece for piece in results if piece.start < piece.stop]


def read_in_rows(
    run: Run,
    tokens: Int[Tensor, "example pos"],
    pieces: list[Piece],
    *,
    with_mask: bool,
) -> dict[str, Float[Tensor, "example pos _"]]:
    """Read each piece in a row of its own, and put its streams where it stands in its context.

    Args:
        run: Reads token ids.
        tokens: The contexts.
        pieces: What is read; all else in the result is 0.
        with_mask: Whether an attention mask tells the padding, which a model needs whose tokens
            see what follows them.
    """
    results: dict[str, Tensor] = {}
    for group in _groups(pieces, tokens.numel()):
        longest = max(piece.stop - piece.start for piece in group)
        # The last token once more is padding that every vocabulary has.
        at = [torch.arange(p.start, p.start + longest).clamp_max(p.stop - 1) for p in group]
        ids = torch.stack([tokens[p.example, i] for p, i in zip(group, at, strict=True)])
        lengths = torch.tensor([[piece.stop - piece.start] for piece in group])
        mask = (torch.arange(longest) < lengths).long().to(tokens.device)
        given = run(ids, attention_mask=mask) if with_mask else run(ids)
        for name, stream in given.items():
            shape = (*tokens.shape, stream.shape[-1])
            whole = results.setdefault(name, stream.new_zeros(shape))
            for row, (example, start, stop) in zip(stream, group, strict=True):
                whole[example, start:stop] = row[: stop - start]
    return results


def _groups(pieces: list[Piece], n_tokens: int) -> Iterator[list[Piece]]:
    """Pieces of about one length together, with no more tokens than the contexts have."""
    group: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.stop - p.start, p)):
        if group and (len(group) + 1) * (piece.stop - piece.start) > n_tokens:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def read_documents(
    run: Run,
    examples: Examples,
    some: slice | Int[Tensor, " some"],
    way: Way | None,
    *,
    is_causal: bool,
) -> Mapping[str, Float[Tensor, "example pos _"]]:
    """Read some examples; where they have segments, so that none of these sees another.

    Args:
        run: Reads token ids.
        examples: All examples.
        some: Which of them are read.
        way: How segments are kept apart; None where there are none.
        is_causal: Whether no token sees what follows it.
    """
    tokens = examples.tokens[some]
    if way is None or examples.segment is None:
        return run(tokens.clamp_min(0))
    if way == "positions":
        # Padding stands at the end, where nothing sees it.
        return run(tokens.clamp_min(0), position_ids=examples.positions(some))
    pieces = pieces_of(tokens, examples.segment[some])
    return read_in_rows(run, tokens, pieces, with_mask=not is_causal)

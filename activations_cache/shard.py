"""The rows of one shard while they are made: cast, checked, counted, then turned into files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.linalg import vector_norm

from activations_cache.config import SPLITS, TRAINING_SPLITS
from activations_cache.journal import HookSums
from activations_cache.layout import as_read, as_stored, compress, layout_of
from activations_cache.manifest import Plan
from activations_cache.text import NO_TOKEN, positions_in_segments


@dataclass(frozen=True)
class Examples:
    """The examples of a cache: what the model read."""

    tokens: Int[Tensor, "example pos"]
    """Token ids; -1 where an example is shorter than the context."""
    split: Int[Tensor, " example"]
    """Index into SPLITS."""
    source: Int[Tensor, " example"]
    """Index into `source_names`."""
    source_names: tuple[str, ...]
    """Names of the sources."""
    label: Int[Tensor, "example pos"] | None = None
    """Index into `label_names` for each token, -1 where it has none; None without labels."""
    label_names: tuple[str, ...] = ()
    """Names of the labels."""
    segment: Int[Tensor, "example pos"] | None = None
    """Number of the piece of text in its example; None where an example is one piece."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.tokens)

    def some(self, numbers: Int[Tensor, " some"]) -> "Examples":
        """Return some of the examples, in this order."""
        tensors = ("tokens", "split", "source", "label", "segment")
        given = {name: getattr(self, name) for name in tensors}
        return replace(self, **{n: t[numbers] for n, t in given.items() if t is not None})

    def positions(self, numbers: slice | Int[Tensor, " some"]) -> Int[Tensor, "some pos"]:
        """Return where the tokens of some examples stand, each counted within its segment."""
        if self.segment is None:
            return torch.arange(self.tokens.shape[1]).expand_as(self.tokens[numbers])
        return torch.from_numpy(positions_in_segments(self.segment[numbers].numpy()))

    def gives_row(
        self, numbers: slice, skip_positions: int, exclude_tokens: Sequence[int] = ()
    ) -> Bool[Tensor, "some pos"]:
        """Say which tokens give a row: none of padding, the first of each segment, the excluded."""
        tokens = self.tokens[numbers]
        given = (tokens != NO_TOKEN) & (self.positions(numbers) >= skip_positions)
        if exclude_tokens:
            given &= ~torch.isin(tokens, torch.tensor(exclude_tokens))
        return given


class HookPointRows(NamedTuple):
    """Rows of several hook points as they will be read from the cache, and where they come from."""

    acts: dict[str, Float[Tensor, "row _"]]
    """By hook point; on the model's device."""
    norm: dict[str, Float64[Tensor, " row"]]
    """Euclidean norm of each row, by hook point; on the model's device."""
    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    token: Int[Tensor, " row"]


class Quarantined(NamedTuple):
    """A row that was kept out of its shard."""

    example: int
    position: int
    token: int
    hook_points: tuple[str, ...]
    reason: str
    """`not finite`, or `overflow` where the model's number is finite and the cache's is not."""


def rows_of(
    plan: Plan,
    examples: Examples,
    numbers: range,
    acts: Mapping[str, Float[Tensor, "example pos _"]],
) -> tuple[HookPointRows, list[Quarantined]]:
    """Turn what a model gave for some examples into rows, and name those that must be kept out.

    Positions that the plan skips, in each segment, padding and excluded tokens give no row.

    Args:
        plan: The cache.
        examples: All its examples.
        numbers: Which of them the model read.
        acts: The model's activations for these, by hook point.

    Returns:
        The rows in order of example and position, and the rows kept out.
    """
    skip = plan.skip_positions
    some = slice(numbers.start, numbers.stop)
    token = examples.tokens[some, skip:]
    real = examples.gives_row(some, skip, plan.exclude_tokens)[:, skip:]
    position = torch.arange(skip, plan.context).expand_as(token).reshape(-1)
    example = torch.arange(numbers.start, numbers.stop)[:, None].expand_as(token).reshape(-1)
    token = token.reshape(-1)
    given = {name: acts[name][:, skip:].reshape(len(token), -1) for name in plan.hook_points}
    stored = {name: as_read(rows, plan.dtype) for name, rows in given.items()}
    # In float64 no square overflows, so a norm is finite in float32 only if every number is.
    norm = {n: vector_norm(rows, dim=1, dtype=torch.float64) for n, rows in stored.items()}
    finite = {name: values.float().isfinite().cpu() for name, values in norm.items()}
    all_finite, real = torch.stack(list(finite.values())).all(dim=0), real.reshape(-1)
    kept_out = [
        _quarantined((int(example[row]), int(position[row]), int(token[row])), row, given, finite)
        for row in (real & ~all_finite).nonzero().flatten().tolist()
    ]
    rows = HookPointRows(stored, norm, example, position, token)
    return _select(rows, real & all_finite), kept_out


@dataclass
class ShardBuffer:
    """One shard in memory: room for its rows, and what the journal will say of them."""

    plan: Plan
    """The cache."""
    shard: int
    """Number of the shard."""
    examples: Examples
    """All examples of the cache."""
    n_rows: int = 0
    """Rows so far."""
    quarantined: list[Quarantined] = field(default_factory=list)
    """Rows kept out so far."""

    def __post_init__(self) -> None:
        """Make room."""
        layout = layout_of(self.plan)
        self._arrays: dict[str, np.ndarray] = {
            spec.path: np.full(spec.chunk, spec.fill, spec.numpy) for spec in layout.per_shard()
        }
        self._specs = {spec.path: spec for spec in layout.per_shard()}
        self._n_statistics = 0
        self._sum = {n: torch.zeros(d).double() for n, d in self.plan.hook_points.items()}
        self._sum_square = dict.fromkeys(self.plan.hook_points, 0.0)
        covered = self.plan.examples_of(self.shard)
        for name in layout.examples:
            values = getattr(self.examples, name)[covered.start : covered.stop].numpy()
            self._arrays[f"examples/{name}"][: len(values)] = values

    def add(self, numbers: range, acts: Mapping[str, Float[Tensor, "example pos _"]]) -> None:
        """Add what the model gave for the next examples of this shard."""
        rows, kept_out = rows_of(self.plan, self.examples, numbers, acts)
        self.quarantined += kept_out
        start, stop = self.n_rows, self.n_rows + len(rows.example)
        for name in ("example", "position", "token"):
            self._arrays[f"rows/{name}"][start:stop] = getattr(rows, name).numpy()
        for name in self.plan.hook_points:
            for array, values in as_stored(rows.acts[name].cpu(), self.plan.dtype).items():
                self._arrays[f"{name}/{array}"][start:stop] = values
            self._arrays[f"{name}/norm"][start:stop] = rows.norm[name].float().cpu().numpy()
        self.n_rows = stop
        self._count(rows)

    def sums(self) -> dict[str, HookSums]:
        """Return what the shard adds to the statistics of each hook point."""
        return {
            name: HookSums(
                n_rows=self._n_statistics,
                sum_square_norm=self._sum_square[name],
                n_nonfinite=sum(name in row.hook_points for row in self.quarantined),
            )
            for name in self.plan.hook_points
        }

    def files(self) -> dict[str, bytes | np.ndarray]:
        """Return what goes into each of the shard's files, by path relative to the cache."""
        for name, total in self._sum.items():
            self._arrays[f"{name}/shard_mean"][0] = (total / max(self._n_statistics, 1)).numpy()
        return {
            spec.file(self.shard): compress(array) if spec.is_compressed else array
            for spec, array in ((self._specs[path], a) for path, a in self._arrays.items())
        }

    def _count(self, rows: HookPointRows) -> None:
        wanted = is_in(self.examples.split[rows.example], TRAINING_SPLITS)
        self._n_statistics += int(wanted.sum())
        for name, acts in rows.acts.items():
            here = wanted.to(acts.device)
            self._sum[name] += acts[here].double().sum(dim=0).cpu()
            self._sum_square[name] += float(rows.norm[name][here].square().sum())


def is_in(split: Int[Tensor, " row"], splits: tuple[str, ...]) -> Bool[Tensor, " row"]:
    """Say which of some split numbers belong to the named splits."""
    return torch.isin(split, torch.tensor([SPLITS.index(name) for name in splits]))


def _select(rows: HookPointRows, good: Bool[Tensor, " row"]) -> HookPointRows:
    if bool(good.all()):
        return rows
    acts = {name: values[good.to(values.device)] for name, values in rows.acts.items()}
    norm = {name: values[good.to(values.device)] for name, values in rows.norm.items()}
    return HookPointRows(acts, norm, rows.example[good], rows.position[good], rows.token[good])


def _quarantined(
    where: tuple[int, int, int],
    row: int,
    given: dict[str, Float[Tensor, "row _"]],
    finite: dict[str, Bool[Tensor, " row"]],
) -> Quarantined:
    at = tuple(name for name in given if not finite[name][row])
    overflow = all(bool(given[name][row].isfinite().all()) for name in at)
    return Quarantined(*where, at, "overflow" if overflow else "not finite")

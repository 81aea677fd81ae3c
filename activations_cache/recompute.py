"""Checking a cache against its model: random rows computed again, by another way than hooks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from activations_cache.checks import MonosemaError, Progress, silent
from activations_cache.config import parse_hook_point
from activations_cache.hooks import blocks_of, capture
from activations_cache.image_rows import CachedImages
from activations_cache.isolation import read_documents
from activations_cache.models import LoadedModel
from activations_cache.probe import layout_of, record_of
from activations_cache.reader import ActivationCache
from activations_cache.trial import run_whole
from activations_cache.vision import LoadedVisionModel

N_ROWS = 64
"""Rows that are computed again."""

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}
"""Relative error of a row that rounding explains, by the coarser of the model's and the cache's
dtype; a neighbouring block differs by 0.1 and more. In 8 bits a massive dimension sets the step."""

_LONGEST = 8
"""Examples that the model reads at once."""


def recompute(
    cache: ActivationCache,
    loaded: LoadedModel | LoadedVisionModel,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Return how a cache differs from what a model gives, one line for each problem.

    The streams between blocks are compared with `output_hidden_states`, whose entries need no
    hooks, so a wrong layer or a wrong side cannot agree with itself; which entry is which differs
    between models and is looked at on this one. Places that are no entry have no such second
    source; they are captured again in a whole forward. Documents that share a context are kept
    apart in the way that is seen to do it in this model, whatever made the cache.

    Args:
        cache: A complete cache.
        loaded: The model that it should be of.
        seed: Decides which rows.
        progress: Called for every few examples.
    """
    problems = _identity_problems(cache.identity.get("model"), loaded.identity)
    rows = _sample(cache.rows(), seed)
    result = _streams(cache, loaded, rows, progress or silent)
    tolerance = _tolerance(cache.manifest.plan.dtype, loaded.identity["dtype"])
    for hook_point, stream in result.items():
        if stream.shape[-1] != cache.d_model(hook_point):
            problems.append(
                f"{hook_point} must be {cache.d_model(hook_point)} wide as in the cache, got "
                f"{stream.shape[-1]} from the model"
            )
            continue
        wanted = stream
        # A row may be near zero (an attention's output): then the median row is the measure.
        typical = cache[hook_point].statistics.norm_quantiles["0.5"]
        difference = (cache[hook_point][rows] - wanted).norm(dim=1)
        error = difference / wanted.norm(dim=1).clamp_min(typical)
        problems += _row_problem(hook_point, error, tolerance)
    return problems


def _row_problem(hook_point: str, error: Float[Tensor, " row"], tolerance: float) -> list[str]:
    wrong = int((~(error <= tolerance)).sum())
    if not wrong:
        return []
    worst = float(error.nan_to_num(torch.inf).max())
    message = (
        f"{hook_point} must hold what the model gives within a relative error of {tolerance:g}, "
        f"got {worst:.3g} and {wrong} of {len(error)} rows beyond it; "
        "the cache is of another layer, side or model: build it again"
    )
    return [message]


def _identity_problems(there: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Compare the hashes of weights, tokenizer and configuration."""
    if there is None:
        return ["the cache must be made by a model to be compared with one, got no model in it"]
    return [
        f"{key} of the model must be the cache's {there[key]}, got {now.get(key)}"
        for key in there
        if there[key] != now.get(key)
    ]


def _tolerance(stored: str, computed: str) -> float:
    return max(TOLERANCE[stored], TOLERANCE[computed])


def _sample(rows: Int[Tensor, " row"], seed: int) -> Int[Tensor, " sample"]:
    made = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=made)[:N_ROWS]].sort().values


def _streams(
    cache: ActivationCache,
    loaded: LoadedModel | LoadedVisionModel,
    rows: Int[Tensor, " row"],
    progress: Progress,
) -> dict[str, Float[Tensor, "row _"]]:
    """What the model gives at each hook point for some rows of the cache."""
    refs, parts = cache.refs(rows), {name: [] for name in cache.hook_points}
    order: list[Tensor] = []
    for chunk, given in _given(cache, loaded, refs.example, refs.position):
        for name, stream in given.items():
            parts[name].append(stream[chunk.example, chunk.position].float().cpu())
        order.append(chunk.row)
        progress(sum(map(len, order)), len(rows), "rows computed again")
    at = torch.cat(order).argsort()
    return {name: torch.cat(streams)[at] for name, streams in parts.items()}


class _ForwardRows(NamedTuple):
    """Rows that one forward gives: which they are, and where they stand in it."""

    row: Int[Tensor, " row"]
    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]


class _Reader:
    """Runs a model and returns the streams at some hook points."""

    def __init__(self, hook_points: Sequence[str], loaded: LoadedModel | LoadedVisionModel) -> None:
        model = loaded.model
        blocks, _ = blocks_of(model)
        layout = record_of(model) if isinstance(loaded, LoadedModel) else layout_of(model)
        prefix, entries = layout.reader, dict(enumerate(layout.hidden_states))
        self._entry = model.get_submodule(prefix)
        self._entry_of: dict[str, int | None] = {}
        for name in hook_points:
            number = _block_number(name, blocks)
            self._entry_of[name] = layout.first if number == 0 else entries.get((number or 0) - 1)
        wanted = [name for name, entry in self._entry_of.items() if entry is None]
        self._captured = {name: name.removeprefix(f"{prefix}." * bool(prefix)) for name in wanted}
        outside = [name for name, captured in self._captured.items() if prefix and captured == name]
        if outside:
            raise MonosemaError(
                f"{outside[0]} must lie in {prefix}, which reads the text, to be computed again"
            )

    @torch.no_grad()
    def __call__(
        self, inputs: Shaped[Tensor, "example ..."], options: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, "example pos _"]]:
        hidden, captured = (), {}
        if len(self._captured) < len(self._entry_of):
            output = run_whole(self._entry, inputs, **options, output_hidden_states=True)
            hidden = output.hidden_states
        if self._captured:
            with capture(self._entry, list(self._captured.values()), stop=False) as run:
                captured = run(inputs, **options)
        return {
            name: hidden[entry] if entry is not None else captured[self._captured[name]]
            for name, entry in self._entry_of.items()
        }


def _given(
    cache: ActivationCache,
    loaded: LoadedModel | LoadedVisionModel,
    example: Int[Tensor, " row"],
    position: Int[Tensor, " row"],
) -> Iterator[tuple[_ForwardRows, Mapping[str, Float[Tensor, "example pos _"]]]]:
    """Yield what each forward gives, and which of the rows are in it."""
    read, way, is_causal = _Reader(cache.hook_points, loaded), None, True
    if isinstance(loaded, LoadedModel) and cache.examples.segment is not None:
        record = record_of(loaded.model)
        way, is_causal = record.documents or "rows", record.is_causal

    def on_device(ids: Tensor, **options: Tensor) -> Mapping[str, Tensor]:
        to = next(loaded.model.parameters()).device
        return read(ids.to(to), {name: tensor.to(to) for name, tensor in options.items()})

    for some in example.unique().split(_LONGEST):
        row = torch.isin(example, some).nonzero().flatten()
        chunk = _ForwardRows(row, torch.searchsorted(some, example[row]), position[row])
        if isinstance(loaded, LoadedVisionModel):
            images = CachedImages(cache)
            options = loaded.reading.options(images.preprocessing.size)
            pixels = images.pixels(some).to(loaded.device, loaded.dtype)
            yield chunk, read(pixels, dict(options))
        else:
            examples = cache.examples
            yield chunk, read_documents(on_device, examples, some, way, is_causal=is_causal)


def _block_number(hook_point: str, blocks: str) -> int | None:
    """Return the index into `hidden_states` of a stream between blocks, None inside a block."""
    path, side = parse_hook_point(hook_point)
    parent, _, name = path.rpartition(".")
    return int(name) + (side == "out") if parent == blocks else None

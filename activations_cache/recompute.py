"""Checking a cache against its model: random rows computed again, by another way than hooks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from activations_cache.builder import model_inputs
from activations_cache.checks import Progress, silent
from activations_cache.config import parse_hook_point
from activations_cache.hooks import blocks_of, capture
from activations_cache.image_rows import CachedImages
from activations_cache.models import LoadedModel
from activations_cache.reader import ActivationCache
from activations_cache.reading import base_model
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

    The streams between blocks are compared with `output_hidden_states`, which needs no hooks, so a
    wrong layer or a wrong side cannot agree with itself. Places inside a block have no such second
    source; they are captured again in a whole forward.

    Args:
        cache: A complete cache.
        loaded: The model that it should be of.
        seed: Decides which rows.
        progress: Called for every few examples.
    """
    problems = _identity_problems(cache.identity.get("model"), loaded.identity)
    rows = _sample(cache.rows(), seed)
    refs = cache.refs(rows)
    needed = refs.example.unique()
    at = torch.searchsorted(needed, refs.example)
    found = _streams(cache, loaded, needed, progress or silent)
    tolerance = _tolerance(cache.manifest.plan.dtype, loaded.identity["dtype"])
    for hook_point, stream in found.items():
        if stream.shape[-1] != cache.d_model(hook_point):
            problems.append(
                f"{hook_point} must be {cache.d_model(hook_point)} wide as in the cache, got "
                f"{stream.shape[-1]} from the model"
            )
            continue
        wanted = stream[at, refs.position]
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
    needed: Int[Tensor, " example"],
    progress: Progress,
) -> dict[str, Float[Tensor, "example pos _"]]:
    hook_points, inputs = cache.hook_points, _inputs(cache, loaded)
    parts: dict[str, list[Tensor]] = {name: [] for name in hook_points}
    blocks, _ = blocks_of(loaded.model)
    base = base_model(loaded.model)  # without the head
    numbers = {name: _block_number(name, blocks) for name in hook_points}
    for chunk in needed.split(_LONGEST):
        first, rest = inputs(chunk)
        with torch.no_grad():
            hidden = base(first, **rest, output_hidden_states=True).hidden_states
        last = len(hidden) - 1
        # The last one comes after the final norm, so the last block's output is captured as well.
        wanted = [name for name in hook_points if numbers[name] in (None, last)]
        captured = {}
        if wanted:
            with capture(loaded.model, wanted, stop=False) as run:
                captured = run(first, **rest)
        for name, number in numbers.items():
            stream = captured[name] if name in captured else hidden[number or 0]
            parts[name].append(stream.float().cpu())
        done = min(len(parts[hook_points[0]]) * _LONGEST, len(needed))
        progress(done, len(needed), "examples computed again")
    return {name: torch.cat(streams) for name, streams in parts.items()}


def _inputs(
    cache: ActivationCache, loaded: LoadedModel | LoadedVisionModel
) -> Callable[[Int[Tensor, " example"]], tuple[Shaped[Tensor, "example ..."], dict[str, Any]]]:
    """Return what gives, for some examples, the first argument of a forward and the others."""
    if isinstance(loaded, LoadedVisionModel):
        images = CachedImages(cache)
        options = loaded.reading.options(images.preprocessing.size)
        return lambda some: (images.pixels(some).to(loaded.device, loaded.dtype), options)

    def read(some: Int[Tensor, " example"]) -> tuple[Int[Tensor, "example pos"], dict[str, Any]]:
        ids, positions = model_inputs(cache.examples, some)
        device, rest = loaded.model.device, dict[str, Any](use_cache=False)
        if positions is not None:
            rest["position_ids"] = positions.to(device)
        return ids.to(device), rest

    return read


def _block_number(hook_point: str, blocks: str) -> int | None:
    """Return the index into `hidden_states` of a stream between blocks, None inside a block."""
    path, side = parse_hook_point(hook_point)
    parent, _, name = path.rpartition(".")
    return int(name) + (side == "out") if parent == blocks else None

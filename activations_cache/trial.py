"""A short forward on a few tokens or one image, and what passes which module in it.

What is believed of a model is looked at here: which list of blocks its text passes, and which
parts of a block are added to the stream as they are.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.reading import (
    base_model,
    parameters_of,
    reads_tokens,
    takes_tokens,
    two_axes,
)

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError)  # fmt: skip
"""What a model raises for arguments that it does not take."""

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}
"""Relative error of a stream that rounding explains, by the model's dtype."""
COARSE = 2e-2
"""The same in 16 bits."""

N_EXAMPLES, N_TOKENS = 2, 12
T = TypeVar("T")


class Passed(NamedTuple):
    """A call of a module in a trial; what is no tensor of three axes is None."""

    first: Float[Tensor, "example pos _"] | None
    """Its first argument."""
    out: Float[Tensor, "example pos _"] | None
    """Its result, or the first entry of a result that is a tuple."""


def attempt(run: Callable[[], T]) -> T | None:
    """Return what a call gives without gradients, and None if it fails."""
    try:
        with torch.no_grad():
            return run()
    except FAILURES:
        return None


def tolerance_of(model: nn.Module) -> float:
    """The relative error that rounding explains in a model's streams."""
    return TOLERANCE.get(next(model.parameters()).dtype, COARSE)


def trial_tokens(
    model: nn.Module, n_examples: int = N_EXAMPLES, n_tokens: int = N_TOKENS
) -> Int[Tensor, "example pos"]:
    """Return token ids that stand for text: none that the configuration has a purpose for."""
    config: Any = getattr(model, "config", None)
    given = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    special = set(_special_ids(given))
    usable = torch.tensor([i for i in range(min(n_vocabulary(model), 4096)) if i not in special])
    chosen = torch.randint(
        len(usable), (n_examples, n_tokens), generator=torch.Generator().manual_seed(0)
    )
    return usable[chosen].to(next(model.parameters()).device)


def n_vocabulary(model: nn.Module) -> int:
    """Return how many tokens a model knows; 8 where nothing tells."""
    config: Any = getattr(model, "config", None)
    get_text: Any = getattr(config, "get_text_config", None)
    text = config if get_text is None else get_text()
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(None if get is None else attempt(get), "weight", None)
    return getattr(text, "vocab_size", None) or (8 if weight is None else len(weight))


def _special_ids(entries: Mapping[Any, Any]) -> Iterator[int]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if i is not None)


def trial_pixels(model: nn.Module) -> Float[Tensor, "2 channel height width"] | None:
    """Return two images of noise for a model that reads pixels and says their size."""
    config = getattr(model, "config", None)
    side = getattr(config, "image_size", None)
    if not isinstance(side, int):
        return None
    shape = (N_EXAMPLES, getattr(config, "num_channels", 3), side, side)
    parameter = next(model.parameters())
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        parameter.device, parameter.dtype
    )


def trial_inputs(model: nn.Module) -> Tensor | None:
    """Return what a model can be tried on; None if nothing is known."""
    if next(model.parameters(), None) is None:
        return None
    if takes_tokens(model) or takes_tokens(base_model(model)):
        return trial_tokens(model)
    return trial_pixels(model)


def errors(
    result: Float[Tensor, "*pos _"], expected: Float[Tensor, "*pos _"]
) -> Float[Tensor, "*pos"]:
    """The relative error of each row."""
    difference = (result.float() - expected.float()).norm(dim=-1)
    relative = difference / expected.float().norm(dim=-1).clamp_min(1e-30)
    return relative.nan_to_num(torch.inf)


def largest_error(result: Float[Tensor, "*pos _"], expected: Float[Tensor, "*pos _"]) -> float:
    """The largest relative error of a row."""
    return float(errors(result, expected).max())


def same_stream(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two streams are one, in the number format of the first."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return torch.equal(a, b.to(a.dtype))


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Passed]]]:
    """Collect the calls of modules, by name, in the order in which they are entered first."""
    calls: dict[str, list[Passed]] = {}
    firsts: dict[str, list[Tensor | None]] = {}

    def enter(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(name, [])
            first = args[0] if args else kwargs.get(next(iter(parameters_of(module)), ""))
            firsts.setdefault(name, []).append(_stream(first))

        return before

    def leave(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: tuple, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            calls[name].append(Passed(firsts[name].pop(), _stream(first)))

        return after

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            before = module.register_forward_pre_hook(enter(name), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(leave(name)).remove)
        yield calls


def _stream(value: object) -> Tensor | None:
    if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
        return value.detach().clone()
    return None


def run_whole(module: nn.Module, inputs: Tensor, **options: Any) -> Any:
    """Call a module on its first argument, without a KV cache where it knows of one."""
    if "use_cache" in parameters_of(module):
        options.setdefault("use_cache", False)
    return module(inputs, **options)


def block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the lists of modules that are not inside another list, as experts of a block are."""
    return {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module)
        and not any(part.isdigit() for part in path.split("."))
    }


def passed_lists(model: nn.Module, lists: Mapping[str, list[nn.Module]]) -> list[str]:
    """Return the lists of blocks that the tokens of a text pass, each block once, in their order.

    A decoder that reads what it has written itself is left out. A model without tokens has none.
    """
    ids = trial_inputs(model)
    if ids is None or ids.is_floating_point():
        return []
    named = {f"{path}\0{i}": b for path, blocks in lists.items() for i, b in enumerate(blocks)}
    others: set[str] = set()

    def enter(path: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = dict(zip(parameters_of(module), args, strict=False)) | kwargs
            read = two_axes(given.get("input_ids"))
            if read is not None and not torch.equal(read, ids):
                others.add(path)

        return before

    with contextlib.ExitStack() as hooks, watching(named) as calls:
        for path, module in model.named_modules():
            if path and reads_tokens(module):
                hook = module.register_forward_pre_hook(enter(path), with_kwargs=True)
                hooks.callback(hook.remove)
        attempt(lambda: run_whole(base_model(model), ids))
    entered = [name.split("\0")[0] for name in calls]
    return [
        path
        for path in dict.fromkeys(entered)
        if not any(path.startswith(f"{other}.") for other in others)
        and all(_is_block(calls.get(f"{path}\0{i}"), ids) for i in range(len(lists[path])))
    ]


def _is_block(calls: list[Passed] | None, ids: Int[Tensor, "example pos"]) -> bool:
    """Whether a module was called and had the tokens' stream as its argument and its result."""
    streams = [stream for call in calls or [] for stream in call]
    return bool(streams) and all(s is not None and s.shape[:2] == ids.shape for s in streams)


class Addition(NamedTuple):
    """What becomes of the output of a part of a block."""

    path: str
    """The module whose output is added to the stream, inside the block; empty if there is none."""
    scale: float
    """What it is multiplied by on its way; nan where nothing is known."""


def additions(
    model: nn.Module, prefix: str, blocks: list[nn.Module], parts: list[list[str]]
) -> list[dict[str, Addition]]:
    """Say for the parts of each block what of them is added to the stream, from one forward.

    A part that the model cannot be tried on is taken to be added as it is.

    Args:
        model: The model.
        prefix: Module path of the list of blocks, with a dot behind it unless it is empty.
        blocks: The blocks.
        parts: Module paths inside each block.
    """
    plain = [{path: Addition(path, 1.0) for path in of_block} for of_block in parts]
    inputs = trial_inputs(model)
    if inputs is None:
        return plain
    named = {
        f"{prefix}{i}{'.' if path else ''}{path}": module
        for i, block in enumerate(blocks)
        for path, module in block.named_modules()
        if parts[i] and not any(part.isdigit() for part in path.split("."))
    }
    with watching(named) as calls:
        attempt(lambda: run_whole(base_model(model), inputs))
    results = []
    for i, of_block in enumerate(parts):
        root = f"{prefix}{i}"
        caches = {
            name.removeprefix(root).removeprefix("."): once[0]
            for name, once in calls.items()
            if (name == root or name.startswith(f"{root}.")) and len(once) == 1
        }
        known = "" in caches and all(path in caches for path in of_block)
        results.append({p: _addition(p, caches) for p in of_block} if known else plain[i])
    return results


def _addition(part: str, calls: Mapping[str, Passed]) -> Addition:
    """Follow a part's output to the place where it is added to the stream."""
    block, path, factor = calls[""], part, float("nan")
    streams = [stream for call in calls.values() for stream in call if stream is not None]
    streams = [stream for stream in streams if _same_shape(stream, block.out)]
    while path:
        added = calls[path].out
        scale = float("nan") if added is None else _scale(added, block, streams)
        if abs(scale - 1) < 0.02:
            return Addition(path, 1.0)
        factor = scale if factor != factor else factor
        path = next((p for p, c in calls.items() if p != path and _follows(added, c)), "")
    return Addition("", factor)


def _follows(tensor: Tensor | None, call: Passed) -> bool:
    """Whether a call read exactly this tensor, and gave another of its shape."""
    first, out = call.first, call.out
    if (
        tensor is None
        or first is None
        or out is None
        or not tensor.shape == first.shape == out.shape
    ):
        return False
    return torch.equal(tensor, first) and not torch.equal(tensor, out)


def _scale(part: Tensor, block: Passed, streams: list[Tensor]) -> float:
    """The factor c of `later = earlier + c part`, or of `out = in + other + c part`; nan if none.

    The first position is left out: an attention sink there may drown the part in rounding.
    """
    if not _same_shape(part, block.out) or not _same_shape(part, block.first):
        return float("nan")
    rows = torch.stack([block.first, block.out, *streams])[:, :, 1:].flatten(1).double()  # pyright: ignore[reportArgumentType, reportCallIssue]
    p = part[:, 1:].flatten().double()
    size, best = float(p.norm()), (float("nan"), torch.inf)
    noise = 4 * torch.finfo(part.dtype).eps * rows.norm(dim=1)
    changes = [(rows[None] - rows[:, None], noise[None]), (rows[1] - rows[0] - rows, noise[1])]
    for change, rounding in changes if size else ():
        c = change @ p / size**2
        error = (change - c[..., None] * p).norm(dim=-1)
        whole = c.clamp_min(0) * size
        allowed = torch.maximum(1e-3 * whole, rounding).minimum(0.3 * whole)
        relative = torch.where(error < allowed, error / whole, torch.inf).flatten()
        at = int(relative.argmin())
        if float(relative[at]) < best[1]:
            best = float(c.flatten()[at]), float(relative[at])
    return best[0]


def _same_shape(tensor: Tensor | None, other: Tensor | None) -> bool:
    return tensor is not None and other is not None and tensor.shape == other.shape

"""Reading and changing what flows through a model, by hook points `<module path>:(in|out)`.

`in` is the first argument of the module, `out` its result, or the first entry of a result that is
a tuple. This is the only place where models are operated on.

The hook points that a model offers: the stream in and out of each block, attention, MLP.

Names of modules differ between families and between versions of transformers, so they are found in
the model at hand and not spelled from its configuration.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activations_cache.config import parse_hook_point
from activations_cache.reading import CallFollower, around, base_model, modules_of, parameters_of
from activations_cache.trial import (
    Addition,
    additions,
    block_lists,
    passed_lists,
)
from monosema.checks import MonosemaError


@dataclass(frozen=True)
class BlockParts:
    """Where a block keeps its attention and its MLP, as module paths inside the block."""

    attention: str
    """Its output is what the attention adds to the stream, before any norm or scale after it."""
    mlp_in: str
    """The module that first reads the MLP's input."""
    mlp_out: str
    """The module whose output is the MLP's."""


FAMILIES = (
    BlockParts("attention.output.dense", "intermediate", "output.dense"),  # BERT, RoBERTa
    BlockParts("self_attn", "mlp", "mlp"),  # Llama, Mistral, Qwen, Gemma, CLIP, SigLIP
    BlockParts("attention", "mlp", "mlp"),  # GPT-NeoX, ViT, DINOv2
    BlockParts("attn", "mlp", "mlp"),  # GPT-2, timm, open_clip
)
"""Of these the first counts whose modules a block has all; one entry adds a family."""


def hook_points_of(model: nn.Module) -> list[str]:
    """Return the hook points of a model, block by block, in the order in which they are passed.

    For each block: `B:in`, attention `:out`, MLP `:in`, MLP `:out`, `B:out`. What stands for
    attention and MLP is what the block adds to the stream, looked at on this model: in OLMo 2 it
    is the norm behind each of them, in Granite no module. A block of a family that is not known
    has its `in` and `out` alone.

    Args:
        model: A transformer: a language model or a vision tower.

    Raises:
        ValueError: If the model has no list of blocks.
    """
    return [point for point, note in noted_hook_points(model) if not note]


def noted_hook_points(model: nn.Module) -> list[tuple[str, str]]:
    """Return the hook points of a model, and of those that are not added to the stream what is.

    Raises:
        ValueError: If the model has no list of blocks.
    """
    path, blocks = blocks_of(model)
    prefix = f"{path}." if path else ""
    parts = [_parts(block) for block in blocks]
    names = [[] if of is None else [of.attention, of.mlp_out] for of in parts]
    added = additions(model, prefix, blocks, names)
    return [
        (f"{prefix}{i}{f'.{inner}' if inner else ''}:{side}", note)
        for i, of_block in enumerate(parts)
        for inner, side, note in _points(of_block, added[i])
    ]


def blocks_of(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the blocks of a transformer and the module path of their list.

    Of several lists of modules they are the longest that a text passes, in a trial; of a model
    without tokens the longest of modules of one class.

    Raises:
        ValueError: If the model has no such list.
    """
    lists = block_lists(model)
    alike = [path for path, blocks in lists.items() if len({type(b) for b in blocks}) == 1]
    passed = passed_lists(model, lists) if len(lists) > 1 or not alike else []
    paths = passed or alike
    if not paths:
        raise MonosemaError(f"model must have a list of blocks, got none in {type(model).__name__}")
    path = max(paths, key=lambda name: len(lists[name]))
    return path, lists[path]


def middle_block(model: nn.Module) -> tuple[str, int]:
    """Return the hook point behind the block in the middle, and how many blocks there are.

    Raises:
        ValueError: If the model has no list of blocks.
    """
    path, blocks = blocks_of(model)
    prefix = f"{path}." if path else ""
    return f"{prefix}{len(blocks) // 2}:out", len(blocks)


def _parts(block: nn.Module) -> BlockParts | None:
    modules = dict(block.named_modules())
    fits = (p for p in FAMILIES if {p.attention, p.mlp_in, p.mlp_out} <= modules.keys())
    return next(fits, None)


def _points(
    parts: BlockParts | None, added: Mapping[str, Addition]
) -> Iterator[tuple[str, str, str]]:
    """Paths inside a block, sides, and what is to be said of them."""
    yield "", "in", ""
    if parts is not None:
        yield from _adding(parts.attention, added[parts.attention])
        yield parts.mlp_in, "in", ""
        yield from _adding(parts.mlp_out, added[parts.mlp_out])
    yield "", "out", ""


def _adding(path: str, addition: Addition) -> Iterator[tuple[str, str, str]]:
    if addition.path == path:
        yield path, "out", ""
    elif addition.path:
        yield path, "out", f"not what is added to the stream: that is {addition.path}:out"
        yield addition.path, "out", ""
    elif addition.scale == addition.scale:  # nan is not itself
        yield path, "out", f"added to the stream times {addition.scale:.3g}"
    else:
        yield path, "out", "not what is added to the stream"


Stream = Float[Tensor, "example pos d_model"]
Edit = Callable[[Stream, Int[Tensor, "example pos"]], Stream]
"""From the stream and the absolute positions to the new stream, in the same shape."""


class _Stop(Exception):
    """Everything asked for has been seen."""


class Capture:
    """Runs a model and returns what passes its hook points; made by `capture`."""

    def __init__(self, model: nn.Module, hook_points: Sequence[str], *, stop: bool):
        modules = [_module(model, hook_point) for hook_point in hook_points]
        base = base_model(model)
        # Without the head where no hook point needs it.
        self._entry = base if set(modules) <= set(base.modules()) else model
        self._hook_points = tuple(hook_points)
        self._stop = stop
        self._seen: dict[str, Stream] | None = None

    def __call__(self, input_ids: Shaped[Tensor, "..."], **kwargs: object) -> dict[str, Stream]:
        """Run the model without gradients.

        Args:
            input_ids: The model's first argument: token ids, or pixels for a vision model.
            **kwargs: Its further arguments, such as `attention_mask`.

        Returns:
            A tensor of shape (example, pos, d_model) for each hook point, in the stream's dtype.

        Raises:
            ValueError: If the forward does not pass a hook point, or passes it twice.
        """
        if "use_cache" in parameters_of(self._entry):
            kwargs.setdefault("use_cache", False)
        self._seen = {}
        try:
            with torch.no_grad(), contextlib.suppress(_Stop):
                self._entry(input_ids, **kwargs)
            missed = [name for name in self._hook_points if name not in self._seen]
            if missed:
                raise MonosemaError(f"hook points must be passed by the forward, got no {missed}")
            for name, stream in self._seen.items():
                _require_tokens(name, stream, input_ids)
            return {name: self._seen[name] for name in self._hook_points}
        finally:
            self._seen = None

    def _record(self, hook_point: str, stream: Stream) -> None:
        if self._seen is None:  # the model is called by someone else
            return
        if hook_point in self._seen:
            raise MonosemaError(f"{hook_point} must be passed once in a forward, got a second time")
        # A copy, because a later module may work in place.
        self._seen[hook_point] = stream.detach().clone()
        if self._stop and len(self._seen) == len(self._hook_points):
            raise _Stop


@contextlib.contextmanager
def capture(
    model: nn.Module, hook_points: Sequence[str], *, stop: bool = True
) -> Iterator[Capture]:
    """Give a `run(input_ids, **kwargs)` that returns the stream at each hook point.

    Args:
        model: Any module; of a transformers model only the backbone runs where that is enough.
        hook_points: Places such as `model.layers.15:out`.
        stop: Leave the forward as soon as the last hook point has been passed.

    Raises:
        ValueError: If a hook point names no module; the message has the nearest names.
    """
    run = Capture(model, hook_points, stop=stop)

    def observe(hook_point: str) -> Callable[[Stream], None]:
        return lambda stream: run._record(hook_point, stream)

    with contextlib.ExitStack() as hooks:
        for hook_point in hook_points:
            hooks.callback(_attach(model, hook_point, observe(hook_point)).remove)
        yield run


@contextlib.contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Change the stream at hook points in every forward of the model, `generate` included.

    `fn(h, positions)` gets the stream in its own dtype and must return the same shape; its result
    is cast back to the stream's dtype. A position counts from the first attended token: with a
    left-padded attention mask the padding has negative positions (0 under a static KV cache, where
    transformers shows no mask), and the tokens in a KV cache are counted.

    Args:
        model: The model.
        edits: A function for each hook point.

    Raises:
        ValueError: If a hook point names no module, a function returns another shape, or the
            positions of a stream do not follow from the model's call.
    """

    def replace(hook_point: str, fn: Edit, reading: CallFollower) -> Callable[[Stream], Stream]:
        return lambda stream: _apply(fn, stream, reading.positions(stream), hook_point)

    with contextlib.ExitStack() as hooks:
        for hook_point, fn in edits.items():
            _require_not_compiled(model, hook_point)
            reading = CallFollower(model, hook_point)
            hooks.callback(_attach(model, hook_point, replace(hook_point, fn, reading)).remove)
            hooks.enter_context(reading.attach())
        yield


def _require_not_compiled(model: nn.Module, hook_point: str) -> None:
    """Refuse a place inside of compiled code, which runs without hooks."""
    around_it, module = around(model, hook_point), _module(model, hook_point)
    called = [*around_it, module]
    of_forward = any(hasattr(m.forward, "_torchdynamo_orig_callable") for m in around_it)
    if of_forward or any(m._compiled_call_impl is not None for m in called):
        raise MonosemaError(
            f"{hook_point} must not lie in compiled code, which leaves hooks out, got a compiled "
            f"{type(model).__name__}; edit the model that is not compiled, or compile each block's "
            "forward alone (model.compile: true)"
        )


def _apply(
    fn: Edit, stream: Stream, positions: Int[Tensor, "example pos"], hook_point: str
) -> Stream:
    edited = fn(stream, positions)
    if not isinstance(edited, Tensor) or edited.shape != stream.shape:
        got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise MonosemaError(
            f"the edit of {hook_point} must return the shape {tuple(stream.shape)}, got {got}"
        )
    return edited.to(stream)


def _module(model: nn.Module, hook_point: str) -> nn.Module:
    path, _ = parse_hook_point(hook_point)
    modules = modules_of(model)
    if path not in modules:
        nearest = difflib.get_close_matches(path, modules, n=3, cutoff=0.0)
        raise MonosemaError(
            f"hook points must name a module of {type(model).__name__}, got {hook_point!r}; "
            f"{_middle(model)}the nearest are {', '.join(nearest)}"
        )
    return modules[path]


def _middle(model: nn.Module) -> str:
    """Say where the middle of a model is, which is where most dictionaries are trained."""
    try:
        point, n_blocks = middle_block(model)
    except ValueError:  # a module without blocks
        return ""
    return f"the middle of its {n_blocks} blocks is {point}; "


def _attach(
    model: nn.Module, hook_point: str, touch: Callable[[Stream], Stream | None]
) -> RemovableHandle:
    """Call `touch` with the stream at a hook point, and put what it returns in its place."""
    module, (_, side) = _module(model, hook_point), parse_hook_point(hook_point)

    def after(_module: nn.Module, _args: tuple, output: object) -> object:
        first, *rest = output if isinstance(output, tuple) else (output,)
        new = touch(_stream(first, hook_point))
        return new if new is None or not isinstance(output, tuple) else (new, *rest)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        name = parameters_of(module)[0]
        new = touch(_stream(args[0] if args else kwargs.get(name), hook_point))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, name: new})

    if side == "out":
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)


def _stream(value: object, hook_point: str) -> Stream:
    if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
        return value
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    path, side = parse_hook_point(hook_point)
    parts = path.split(".")
    inside = next((i + 2 for i, part in enumerate(parts) if part.isdigit()), len(parts))
    around = ".".join(parts[: min(inside, len(parts) - 1)])
    raise MonosemaError(
        f"{hook_point} must carry a stream of shape (example, pos, d_model), got {got}; "
        f"choose another module{f', such as the one around it, {around}:{side}' * bool(around)}"
    )


def _require_tokens(hook_point: str, stream: Stream, inputs: Tensor) -> None:
    """Refuse a stream whose rows are not the tokens that were read, in their order."""
    is_ids = inputs.ndim == 2 and not inputs.is_floating_point()
    if is_ids and stream.shape[:2] != inputs.shape:
        raise MonosemaError(
            f"{hook_point} must carry a row for each of {tuple(inputs.shape)} tokens, got a stream "
            f"of {tuple(stream.shape)}; choose a hook point in the part that reads the text"
        )

"""Where the tokens of a forward stand: from what a model is called with, by what each thing is.

No argument's name is believed. A cache is an object that behaves as one, the tokens it holds are
what it says or what was counted, and all must agree with the length of the stream.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from activations_cache.config import parse_hook_point
from monosema.checks import MonosemaError

_Parameter = inspect.Parameter

STATES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Names under which models take states that are plain tensors; a cache is known without them."""


class Read(NamedTuple):
    """One call of a module that reads tokens."""

    module: nn.Module
    """The module."""
    arguments: Mapping[str, Any]
    """Its arguments by name."""
    n_new: int | None
    """Tokens that it is given; None where it reads something else."""
    n_cached: int | None
    """Tokens that stand in its cache; None where there is a cache that does not say."""
    mask: Shaped[Tensor, "example pos"] | None
    """The attention mask, if it is one over tokens."""
    position_ids: Shaped[Tensor, "example pos"] | None
    """The positions that the caller gives."""

    @property
    def n_before(self) -> int | None:
        """Tokens before the new ones, from the cache or else from the mask."""
        if self.n_cached is None and self.mask is not None and self.n_new is not None:
            return self.mask.shape[1] - self.n_new
        return self.n_cached

    def positions(self, n_examples: int, n_new: int) -> Int[Tensor, "example pos"] | None:
        """The positions of a stream of this shape; None if this call does not tell them."""
        before, given = self.n_before, self.arguments.values()
        if self.n_new not in (None, n_new):
            return None
        if self.mask is not None:
            # Only with a cache that has room for what is to come may the mask be wider.
            spare = self.mask.shape[1] - n_new - (0 if before is None else before)
            if before is None or spare < 0 or (spare and not any(map(_has_room, given))):
                return None
            first = (self.mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
            result = before + torch.arange(n_new, device=self.mask.device) - first
        elif self.position_ids is not None:
            result = self.position_ids
        elif before is not None:
            result = before + torch.arange(n_new)[None]
        else:
            return None
        fits = result.shape[1] == n_new and len(result) in (1, n_examples)
        return result.expand(n_examples, n_new) if fits else None

    def __str__(self) -> str:
        """What is known, for an error."""
        before = "a state of unknown length" if self.n_before is None else f"{self.n_before} cached"
        mask = "no mask" if self.mask is None else f"a mask of {self.mask.shape[1]}"
        return f"{type(self.module).__name__} with {self.n_new} new tokens, {before} and {mask}"


class CallFollower:
    """Follows the calls of the modules around a hook point that read tokens."""

    def __init__(
        self,
        model: nn.Module,
        hook_point: str,
        see: Callable[[Sequence[Read]], None] | None = None,
    ) -> None:
        """Find the modules.

        Args:
            model: The model.
            hook_point: A place inside it.
            see: Called as each of them begins, with the calls that run, the outermost first.
        """
        self._hook_point, self._see = hook_point, see
        self._readers = _readers(model, hook_point)
        self._running: list[Read] = []
        self._latest: list[Read] = []
        self._counted: list[tuple[object, int]] = []

    def attach(self) -> contextlib.ExitStack:
        """Begin to follow, until what is returned is closed."""
        hooks = contextlib.ExitStack()
        for module in self._readers:
            for hook in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ):
                hooks.callback(hook.remove)
        return hooks

    def positions(self, stream: Float[Tensor, "example pos d"]) -> Int[Tensor, "example pos"]:
        """Return the positions of a stream's tokens.

        Raises:
            ValueError: If no module that reads tokens runs, or none of their calls fits the stream.
        """
        # What a backward computes again belongs to the forward before it.
        again = torch._C._current_graph_task_id() != -1
        calls = self._running or (self._latest if again else [])
        cached = {call.n_cached for call in calls} - {None, 0} or {0}
        for call in calls if len(cached) == 1 else ():
            # A wrapper may keep from its caller the cache that it hands on.
            if call.n_cached is None or call.n_cached in cached:
                result = call.positions(*stream.shape[:2])
                if result is not None:
                    return result.to(stream.device)
        names = " or ".join(type(module).__name__ for module in self._readers)
        raise MonosemaError(
            f"the positions at {self._hook_point} must follow from the call of the model, got "
            f"{stream.shape[1]} tokens in {' in '.join(map(str, reversed(calls))) or 'no call'} of "
            f"{names}; give it all tokens and their mask, or no cache (use_cache=False)"
        )

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Take the arguments of a call before it runs."""
        # A call that the keyboard interrupted was never left.
        begun = [call.module for call in self._running]
        if module in begun:
            del self._running[begun.index(module) :]
        arguments = dict(zip(parameters_of(module), args, strict=False)) | kwargs
        call = Read(
            module=module,
            arguments=arguments,
            n_new=_n_new(arguments),
            n_cached=self._n_cached(arguments),
            mask=two_axes(arguments.get("attention_mask")),
            position_ids=two_axes(arguments.get("position_ids")),
        )
        self._running.append(call)
        self._latest = list(self._running)
        if self._see is not None:
            self._see(self._latest)

    def _leave(self, module: nn.Module, _args: tuple, output: object) -> None:
        """Count the tokens in the states that a call was given or gives and that do not say it."""
        if not self._running or self._running[-1].module is not module:
            return
        call = self._running.pop()
        given = output.values() if isinstance(output, Mapping) else output
        given = given if isinstance(given, Iterable) and not isinstance(given, Tensor) else ()
        states = [v for v in (*call.arguments.values(), *given) if _is_silent(v)]
        if states and call.n_new is not None and call.n_before is not None:
            self._counted = [(state, call.n_before + call.n_new) for state in states]

    def _n_cached(self, arguments: Mapping[str, Any]) -> int | None:
        lengths: set[int | None] = set()
        for name, value in arguments.items():
            counted = [n for state, n in self._counted if state is value]
            if is_cache(value):
                said = _length(value)
                lengths.add(counted[0] if said is None and counted else said)
            elif value is not None and (counted or name in STATES):
                lengths.add(counted[0] if counted else None)
        return (lengths or {0}).pop() if len(lengths) < 2 else None


def given_cache(model: nn.Module, output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument with which a model goes on from an output; none if it gives no cache.

    Raises:
        ValueError: If the model gives a cache and takes none.
    """
    results = {name: value for name, value in output.items() if is_cache(value)}
    if not results:
        return {}
    taken = parameters_of(model)
    names = [name for name in (*results, *STATES) if name in taken]
    if not names:
        raise MonosemaError(
            f"the cache of {type(model).__name__} must come back as {next(iter(results))}, got a "
            f"forward that takes {', '.join(taken)}; run it without a cache (use_cache=False)"
        )
    return {names[0]: next(iter(results.values()))}


def is_cache(value: object) -> bool:
    """Tell whether an object keeps keys and values, or states, of earlier tokens."""
    if isinstance(value, Tensor | Mapping | nn.Module):
        return False
    return hasattr(value, "get_seq_length") or (
        hasattr(value, "update") and hasattr(value, "reset")
    )


def _has_room(value: object) -> bool:
    """Whether a cache has its whole size from the start, as a static one."""
    return is_cache(value) and bool(getattr(value, "is_compileable", False))


def _length(cache: Any) -> int | None:
    """The tokens in a cache; None if it keeps states alone, which do not tell."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, NotImplementedError, ValueError):
        # Caches of transformers that hold no keys and values say so in these three ways.
        has_state = getattr(cache, "has_previous_state", True)
        return None if (has_state() if callable(has_state) else has_state) else 0


def _is_silent(value: object) -> bool:
    """Whether an object may be a state that does not tell how many tokens it has seen."""
    if is_cache(value):
        return _length(value) is None
    if isinstance(value, tuple):
        return any(isinstance(entry, tuple) for entry in value)
    return isinstance(value, list)


def _n_new(arguments: Mapping[str, Any]) -> int | None:
    """The tokens in a call: ids, or what was embedded."""
    ids, embedded = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(embedded, Tensor) and ids is None:
        return embedded.shape[1]
    read = two_axes(next(iter(arguments.values()), None) if ids is None else ids)
    return None if read is None or read.is_floating_point() else read.shape[1]


def two_axes(value: object) -> Shaped[Tensor, "example pos"] | None:
    """Return a tensor over tokens as it is, and None for a mask in another form."""
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


def parameters_of(module: nn.Module) -> list[str]:
    """Return the names of what a module's forward takes; a wrapper takes what its one part does."""
    parameters = inspect.signature(module.forward).parameters
    parts = list(module.children())
    kinds = {parameter.kind for parameter in parameters.values()}
    if len(parts) == 1 and kinds <= {_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD}:
        return parameters_of(parts[0])
    return list(parameters)


def around(model: nn.Module, hook_point: str) -> list[nn.Module]:
    """Return the modules around a hook point, the model first."""
    path, modules = parse_hook_point(hook_point)[0], modules_of(model)
    if (aside := inner_model(model)) is not None:
        module = modules.get(path)
        inner = next((name for name, m in aside.named_modules() if m is module), None)
        if inner is not None:
            return [model, *around(aside, f"{inner}:out")]
    parts = path.split(".")
    paths = [".".join(parts[:i]) for i in range(len(parts))]
    return [modules[path] for path in paths if path in modules]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by path, and those of a model that it keeps aside."""
    aside = inner_model(model)
    return {**({} if aside is None else dict(aside.named_modules())), **dict(model.named_modules())}


def inner_model(model: nn.Module) -> nn.Module | None:
    """Return the model that another runs without having it among its modules.

    TransformerLens' bridge does so: it shows the same blocks under names of its own, makes masks
    itself, and takes text as well as tokens; what is read shows in the model inside.
    """
    result = getattr(model, "original_model", None)
    is_aside = isinstance(result, nn.Module) and all(m is not result for m in model.modules())
    return result if is_aside else None


def base_model(model: nn.Module) -> nn.Module:
    """Return the backbone of a transformers model, or the module itself."""
    base = getattr(model, "base_model", model)
    # What DINOv3 calls its base reads embedded patches, and not the image.
    same = isinstance(base, nn.Module) and parameters_of(base)[:1] == parameters_of(model)[:1]
    return base if same else model


def _readers(model: nn.Module, hook_point: str) -> list[nn.Module]:
    """The modules around a hook point that read its tokens, the outermost first."""
    result = around(model, hook_point)
    models = [m for m in result if hasattr(m, "main_input_name")]
    # A tower for images reads no tokens, although the model around it does.
    if models and not reads_tokens(models[-1]):
        return [models[-1]]
    return [m for m in result if reads_tokens(m)] or [base_model(model)]


def reads_tokens(module: nn.Module) -> bool:
    """Whether a module takes the tokens of one stack: not those of encoder and decoder together."""
    return takes_tokens(module) and "decoder_input_ids" not in parameters_of(module)


def takes_tokens(module: nn.Module) -> bool:
    """Whether a module takes token ids, or what was embedded."""
    return bool({"input_ids", "inputs_embeds"} & set(parameters_of(module)))

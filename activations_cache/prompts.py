"""How much of each example is prompt, however the model is called: for edits of one part alone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations_cache.reading import CallFollower, Read, around, parameters_of, two_axes


class Prompt(NamedTuple):
    """The prompts of a batch; tokens before and after an example's own are padding."""

    n_padding: Int[Tensor, " example"]
    """Padding on the left."""
    n_tokens: Int[Tensor, " example"]
    """Tokens of the prompt itself."""
    is_whole: bool
    """Whether nothing follows the prompt but padding: a forward that belongs to no generation."""


class Prompts:
    """Knows the prompts of what the model reads at present; made by `prompts_of`."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Start before any forward of these modules, the model first."""
        both = [m for m in modules if "decoder_input_ids" in parameters_of(m)]
        encoder = getattr(both[-1], "get_encoder", lambda: None)() if both else None
        self._is_seq2seq, self._is_encoder = bool(both), encoder in modules
        self.continues = False
        """Whether what is read at present continues a cache."""
        self._prompt: Prompt | None = None
        self._earlier: Prompt | None = None
        self._generating = 0

    def of(self, n_examples: int) -> Prompt | None:
        """The prompts of the rows of a forward, each as often as `generate` has beams for it.

        It is None for a model that reads no tokens.
        """
        if self._prompt is None:
            return None
        times = n_examples // len(self._prompt.n_tokens)
        padding, tokens = (t.repeat_interleave(times) for t in self._prompt[:2])
        return Prompt(padding, tokens, self._prompt.is_whole)

    def read(self, calls: Sequence[Read]) -> None:
        """Take what the model is called with: a call with nothing cached begins a prompt."""
        if len(calls) == 1:
            self._earlier = self._prompt
        before = {call.n_before for call in calls}
        self.continues = bool(before - {0, None})
        if None in before:
            self._prompt = None
        elif before != {0}:
            self._prompt = self._earlier and self._earlier._replace(is_whole=False)
        elif self._earlier is None or not self._generating:
            is_whole = self._is_encoder or not self._generating
            self._prompt = _prompt(calls[0].arguments, is_whole=is_whole)

    def during(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Return `generate` as it is, except that it notes its prompts first."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            if not self._generating:  # and not one that calls another
                inputs = args[0] if args else kwargs.get("inputs")
                named = kwargs if inputs is None else {**kwargs, "input_ids": inputs}
                # Without a mask, transformers may infer one: then the first forward shows it. It
                # also shows the prompt of a decoder, which is not what `generate` is given.
                has_mask = two_axes(kwargs.get("attention_mask")) is not None
                is_shown = self._is_seq2seq or not has_mask
                self._prompt = None if is_shown else _prompt(named, is_whole=False)
            self._generating += 1
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating -= 1

        return noting


def _prompt(arguments: Mapping[str, Any], *, is_whole: bool) -> Prompt | None:
    mask = two_axes(arguments.get("attention_mask"))
    if mask is None:
        ids, embedded = arguments.get("input_ids"), arguments.get("inputs_embeds")
        read = embedded if ids is None else ids
        if not isinstance(read, Tensor):
            return None
        mask = torch.ones(read.shape[:2], dtype=torch.int64, device=read.device)
    n_padding = (mask.cumsum(dim=1) == 0).sum(dim=1)
    return Prompt(n_padding, (mask != 0).sum(dim=1), is_whole)


@contextlib.contextmanager
def prompts_of(model: nn.Module, hook_point: str) -> Iterator[Prompts]:
    """Follow which tokens are prompt, in forwards of a model and in its `generate`.

    In `generate` they are what it is given, or what a decoder reads first. Outside, a forward
    without a KV cache reads a prompt, and what is read on top of a cache continues it.

    Args:
        model: The model whose `generate` or forward is called inside this context.
        hook_point: The place whose tokens are meant: an encoder has others than its decoder.
    """
    modules = around(model, hook_point)
    prompts = Prompts(modules)
    with contextlib.ExitStack() as stack:
        stack.enter_context(CallFollower(model, hook_point, prompts.read).attach())
        for module in modules:
            if callable(generate := getattr(module, "generate", None)):
                stack.enter_context(_replaced(module, prompts.during(generate)))
        yield prompts


@contextlib.contextmanager
def _replaced(module: nn.Module, generate: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("generate")
    vars(module)["generate"] = generate
    try:
        yield
    finally:
        if before is not None:
            vars(module)["generate"] = before
        else:
            vars(module).pop("generate", None)

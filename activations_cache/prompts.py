"""How much of each example is prompt, however the model is called: for edits of one part alone."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from activations_cache.hooks import arguments_of, base_model, n_cached, two_axes


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

    def __init__(self) -> None:
        """Start before any forward."""
        self._prompt: Prompt | None = None
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

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Take the arguments of the backbone: a forward with nothing cached begins a prompt."""
        arguments = arguments_of(module, args, kwargs)
        if n_cached(arguments) > 0:
            if self._prompt is not None:
                self._prompt = self._prompt._replace(is_whole=False)
        elif not (self._generating and self._prompt is not None):
            self._prompt = _prompt(arguments, is_whole=not self._generating)

    def during(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Return `generate` as it is, except that it notes its prompts first."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if args else kwargs.get("inputs")
            named = kwargs if inputs is None else {**kwargs, "input_ids": inputs}
            # Without a mask, transformers may infer one: then the first forward shows it.
            has_mask = two_axes(kwargs.get("attention_mask")) is not None
            self._prompt = _prompt(named, is_whole=False) if has_mask else None
            self._generating += 1
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating -= 1

        return noting


def _prompt(arguments: dict[str, Any], *, is_whole: bool) -> Prompt | None:
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
def prompts_of(model: nn.Module) -> Iterator[Prompts]:
    """Follow which tokens are prompt, in forwards of a model and in its `generate`.

    In `generate` they are what it is given. Outside, a forward without a KV cache reads a prompt,
    and what is read on top of a cache continues it.

    Args:
        model: The model whose `generate` or forward is called inside this context.
    """
    prompts = Prompts()
    before = vars(model).get("generate")
    hook = base_model(model).register_forward_pre_hook(prompts.read, with_kwargs=True)
    try:
        if callable(generate := getattr(model, "generate", None)):
            vars(model)["generate"] = prompts.during(generate)
        yield prompts
    finally:
        hook.remove()
        if before is not None:
            vars(model)["generate"] = before
        else:
            vars(model).pop("generate", None)

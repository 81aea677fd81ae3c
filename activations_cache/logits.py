"""How the stream behind a model's last block becomes logits, found by comparing with its own.

A norm and the output embedding are the usual way; some models scale the result or cap it, and in
some it is another way altogether.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.trial import (
    attempt,
    largest_error,
    n_vocabulary,
    run_whole,
    same_stream,
    tolerance_of,
    watching,
)

Loss = Literal["next token", "masked token"]
"""Which token the logits at one place are of: that behind it, or the masked one that is there."""


class LogitsPath(NamedTuple):
    """How the stream behind the last block becomes logits: cap(scale * head(norm(stream)))."""

    norm: str
    """Module path of the norm; empty where there is none."""
    is_centred: bool
    """Whether the norm takes off the mean of each row."""
    scale: float
    """What the head's result is multiplied by."""
    cap: float | None
    """The bound of a soft cap, cap(z) = bound * tanh(z / bound)."""


def logits_of_tokens(model: nn.Module, ids: Int[Tensor, "example pos"]) -> Tensor | None:
    """Return what a model gives as logits for each token, if it does."""
    logits = getattr(attempt(lambda: run_whole(model, ids)), "logits", None)
    is_of_tokens = isinstance(logits, Tensor) and logits.shape[:-1] == ids.shape
    return logits if is_of_tokens else None


def loss_of(
    model: nn.Module, ids: Int[Tensor, "example pos"], logits: Tensor | None, *, is_causal: bool
) -> Loss | None:
    """Return what a model's logits are of; where each token sees all others its own loss tells."""
    if logits is None or logits.shape[-1] < n_vocabulary(model):
        return None  # classes of tokens have logits too
    if is_causal:
        return "next token"
    labels = torch.where(torch.arange(ids.shape[1], device=ids.device) % 3 == 1, ids, -100)
    loss = getattr(attempt(lambda: run_whole(model, ids, labels=labels)), "loss", None)
    here = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    is_here = loss is not None and abs(float(loss) / float(here) - 1) <= 10 * tolerance_of(model)
    return "masked token" if is_here else None


def find_logits_path(
    model: nn.Module, blocks: str, n_blocks: int, ids: Int[Tensor, "example pos"]
) -> tuple[LogitsPath | None, Tensor | None]:
    """Find the norm and the scale with which the model's own head gives the model's own logits.

    Returns:
        The path, None where there is none, and the model's logits of these tokens, if it has any.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else attempt(get)
    last = f"{blocks}.{n_blocks - 1}"
    outside = {name: m for name, m in model.named_modules() if not name.startswith(f"{blocks}.")}
    with watching({last: model.get_submodule(last), **outside}) as calls:
        logits = logits_of_tokens(model, ids)
    if head is None or logits is None or not calls.get(last):
        return None, logits
    stream = calls[last][-1].out
    named = [n for n, c in calls.items() if n != last and c and same_stream(c[0].first, stream)]
    for name in [*named, ""]:
        normed = calls[name][0].out if name else stream
        if normed is None or stream is None or normed.shape != stream.shape:
            continue
        given = attempt(lambda normed=normed: head(normed))
        fit = None if given is None else _fit(logits.double(), given.double(), tolerance_of(model))
        linear = _linear(model.get_submodule(name), stream) if name else False
        if fit is not None and linear is not None:
            return LogitsPath(name, linear, *fit), logits
    return None, logits


def _fit(
    logits: Float[Tensor, "*pos vocab"], given: Float[Tensor, "*pos vocab"], tolerance: float
) -> tuple[float, float | None] | None:
    """The scale, and the bound of a soft cap, with which a head's result is the model's logits."""
    if logits.shape != given.shape or not float(given.norm()):
        return None
    y, z = logits.flatten(), given.flatten()
    scale = float((y @ z) / (z @ z))
    if float((y - scale * z).norm() / y.norm()) <= 10 * tolerance:
        return (1.0 if abs(scale - 1) < 10 * tolerance else scale), None
    top = z.abs().argmax()
    low, high = float(y.abs().max()), 1e4 * float(y.abs().max())
    for _ in range(60):
        middle = (low * high) ** 0.5
        below = middle * torch.tanh(z[top].abs() / middle) < y[top].abs()
        low, high = (middle, high) if below else (low, middle)
    capped = high * torch.tanh(z / high)
    return (1.0, high) if float((y - capped).norm() / y.norm()) <= 10 * tolerance else None


def _linear(norm: nn.Module, stream: Float[Tensor, "*pos d"]) -> bool | None:
    """Whether a norm takes off each row's mean; None if it is no norm with a weight and a bias."""
    rows = stream.flatten(0, -2)
    for is_centred in (False, True):
        gain, bias = gain_of(norm, rows.shape[1], is_centred, rows)
        expected = gain * divided(rows.float(), is_centred) + bias
        if largest_error(norm(rows), expected) <= (1e-3 if rows.dtype == torch.float32 else 3e-2):
            return is_centred
    return None


def gain_of(
    norm: nn.Module, width: int, is_centred: bool, like: Tensor
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """The weight and the bias with which a norm multiplies divided rows, seen at its output."""
    made = torch.randn(64, width, generator=torch.Generator().manual_seed(0)) * 100
    rows = made.to(like.device, like.dtype)
    with torch.no_grad():
        bias = norm(torch.zeros_like(rows[:1]))[0].float()
        u, out = divided(rows.float(), is_centred), norm(rows).float() - bias
    seen = (out * u).sum(dim=0) / u.square().sum(dim=0)
    scale = getattr(norm, "weight", None)
    for exact in [] if scale is None else [scale.detach().float(), 1 + scale.detach().float()]:
        if exact.shape == seen.shape and torch.allclose(exact, seen, rtol=2e-2, atol=1e-3):
            return exact, bias  # what was seen is rounded
    return seen, bias


@torch.no_grad()
def rows_of(head: nn.Module, like: Float[Tensor, "row d"]) -> Float[Tensor, "vocab d"]:
    """What a head multiplies a row by, without its bias; float32.

    A weight is taken as it is where nothing else is done: in 8 bits it has a scale, an adapter
    adds to it.
    """
    made = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    bias = head(torch.zeros_like(like[:1])).float()
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        rows = weight.detach().float()
        exact = 1e-4 if like.dtype in {torch.float32, torch.float64} else 1e-2
        fits = rows.shape == (bias.shape[1], made.shape[1])
        if fits and largest_error(head(made).float() - bias, made.float() @ rows.T) <= exact:
            return rows
    parts = torch.eye(like.shape[1], device=like.device, dtype=like.dtype).split(512)
    return torch.cat([head(part).float() - bias for part in parts]).T


def divided(rows: Float[Tensor, "*pos d"], is_centred: bool) -> Float[Tensor, "*pos d"]:
    """Rows divided by their root mean square, without their mean first where that is taken off."""
    rows = rows - rows.mean(dim=-1, keepdim=True) if is_centred else rows
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)

"""The gradients of a step: their sums over the processes, and their norm.

A sum begins as soon as its gradient is whole, so that it travels while the backward pass goes on
(Li et al. 2020, arXiv 2006.15704). All processes begin their sums in one order, whatever order
their gradients come in. In bf16 the matrices' gradients travel in half the bytes, as those of
torch's `bf16_compress_hook`; a sum in float32 stays one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sae.train.ranks import Axis, Ranks, of_latents

FIRST = ("dec_rows", "enc_rows")
"""A backward pass has these whole before the other gradients, and in this order."""


class _Sum(NamedTuple):
    """A sum on its way."""

    grad: Tensor
    sent: Tensor
    """The gradient itself, or its copy of 16 bits."""
    work: dist.Work


class GradientSums:
    """What adds up the gradients: those of latents over the rows' processes, others over all."""

    def __init__(self, params: Mapping[str, torch.nn.Parameter], ranks: Ranks, bf16: bool) -> None:
        """Take what is learned.

        Args:
            params: By dotted name.
            ranks: The processes.
            bf16: Whether the gradients of matrices travel in bfloat16.
        """
        first = [name for name in FIRST if name in params]
        self._params = {name: params[name] for name in (*first, *params)}
        self._ranks, self._bf16, self._is_last = ranks, bf16, False
        self._whole: set[str] = set()
        self._waiting: list[str] = []
        self._sums: list[_Sum] = []
        if ranks.world.size > 1:
            for name, parameter in self._params.items():
                parameter.register_post_accumulate_grad_hook(partial(self._seen, name))

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """The backward pass after which no gradient changes: its sums may begin."""
        self._is_last = self._ranks.world.size > 1
        self._whole, self._waiting = set(), list(self._params)
        try:
            yield
        finally:
            self._is_last = False

    def whole(self, name: str) -> None:
        """The gradient of a parameter will not change any more; its sum may begin."""
        self._whole.add(name)
        while self._is_last and self._waiting and self._waiting[0] in self._whole:
            self._begin(self._waiting.pop(0))

    def _seen(self, name: str, parameter: Tensor) -> None:  # noqa: ARG002
        if self._is_last:
            self.whole(name)

    def _begin(self, name: str) -> None:
        parameter, ranks = self._params[name], self._ranks
        if parameter.grad is None and ranks.latents.size > 1:
            parameter.grad = torch.zeros_like(parameter)  # it may have one in other processes
        axis = ranks.rows if of_latents(name, parameter) else ranks.world
        grad = parameter.grad
        if grad is None or axis.size == 1:
            return
        sent = grad.bfloat16() if self._bf16 and grad.dim() > 1 else grad
        self._sums.append(_Sum(grad, sent, axis.begin_sum(sent)))

    def finish(self) -> None:
        """Begin what has not begun, and wait for all sums."""
        for name in self._waiting:
            self._begin(name)
        for one in self._sums:
            Axis.end_sum(one.work)
            if one.sent is not one.grad:
                one.grad.copy_(one.sent)
        self._waiting, self._sums = [], []


def gradient_norm(
    params: dict[str, torch.nn.Parameter],
    ranks: Ranks,
    squares: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None = None,
) -> Float[Tensor, ""]:
    """Norm of all gradients together, each latent's counted once.

    `squares` are those of one process's enc_rows and dec_rows, which are not read again then.
    """
    found = {name: p for name, p in params.items() if p.grad is not None}
    if squares is not None and ranks.alone:
        known = dict(zip(("enc_rows", "dec_rows"), squares, strict=True))
        rest = [p.grad for name, p in found.items() if name not in known and p.grad is not None]
        square = torch.nn.utils.get_total_norm(rest).square()
        return sum((known[name] for name in known if name in found), square).sqrt()
    if ranks.latents.size == 1:
        return torch.nn.utils.get_total_norm([p.grad for p in found.values() if p.grad is not None])
    own, shared = [], []
    for name, parameter in found.items():
        (own if of_latents(name, parameter) else shared).append(parameter.grad)
    square = torch.nn.utils.get_total_norm(own).square()
    ranks.latents.sum_(square)
    return (square + torch.nn.utils.get_total_norm(shared).square()).sqrt()

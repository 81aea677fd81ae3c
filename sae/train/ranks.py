"""Processes that train together: rows are split along one axis of the mesh, latents along another.

All collectives of training are here, and so is what they do to tensors with one row per latent.

A loss is a mean over rows: each process takes the mean over its own ones times its share of the
batch, and gradients are summed. A figure that enters a loss in another way than as such a mean is
first replaced by its value over all processes, with the gradient of the process's own part
(`Axis.total`, `Ranks.mean`), so that the sum is right again.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from monosema.checks import MonosemaError
from sae.architecture import KINDS, SAEConfig, with_k
from sae.autoencoder import SparseAutoencoder
from sae.losses import batch_variance

Call = TypeVar("Call", bound=Callable[..., Any])


class RankError(ConnectionError):
    """Another process of the run died, stopped, or does something else."""


def _in_one_line(collective: Call) -> Call:
    """Say in one line what torch says in many when another process does not answer."""

    @functools.wraps(collective)
    def call(*args: Any, **named: Any) -> Any:
        try:
            return collective(*args, **named)
        except RuntimeError as error:
            rank, size = dist.get_rank(), dist.get_world_size()
            reason = str(error).strip().splitlines()[0][:200]
            raise RankError(
                f"all {size} ranks must take part in every step, got no answer from another one "
                f"at rank {rank} ({reason}); start all of them again, the run goes on from its "
                "newest checkpoint"
            ) from error

    return call  # pyright: ignore[reportReturnType]


class _Whole(torch.autograd.Function):
    """The value of the whole with the gradient of a part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor) -> Tensor:  # noqa: ARG004
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class Axis(NamedTuple):
    """Processes side by side; without a group, one process that has nobody beside it."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @_in_one_line
    def reduce(self, tensors: Iterable[Tensor], op: dist.ReduceOp.RedOpType) -> None:
        """Replace tensors, of the same shape everywhere, by what `op` makes of all of them."""
        if self.size == 1:
            return
        pending = [dist.all_reduce(t, op, self.group, async_op=True) for t in tensors]
        for work in pending:
            assert work is not None
            work.wait()

    @_in_one_line
    def begin_sum(self, tensor: Tensor) -> dist.Work:
        """Begin to add up over the processes, in place; `end_sum` says when it is done."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work

    @staticmethod
    @_in_one_line
    def end_sum(work: dist.Work) -> None:
        """Wait for a sum: on a GPU its stream does, not the host."""
        work.wait()

    def sum_(self, *tensors: Tensor) -> None:
        """Add up over the processes, in place."""
        self.reduce(tensors, dist.ReduceOp.SUM)

    @_in_one_line
    def gather(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "size ..."]:
        """The tensors of all processes, in their order."""
        if self.size == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor.contiguous(), group=self.group)
        return torch.stack(found)

    def total(self, part: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over the processes, with the gradient of this one's part."""
        if self.size == 1:
            return part
        whole = part.detach().clone()
        self.sum_(whole)
        return _Whole.apply(part, whole)

    def mean(self, figure: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The mean of a figure that every process has."""
        return figure if self.size == 1 else self.total(figure.detach()) / self.size

    def share(self, n: int) -> slice:
        """Which of n things that stand in a row are this process's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


_ONE = Axis()


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train the same dictionaries."""

    rows: Axis = _ONE
    """Processes that hold the same latents and read different rows."""
    latents: Axis = _ONE
    """Processes that read the same rows and hold different latents."""
    world: Axis = _ONE
    """All of them."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.world.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world.size == 1

    def mean(self, own: Float[Tensor, ""], share: float) -> Float[Tensor, ""]:
        """The mean over all rows of a mean over `share` of them; the gradient is the own part's."""
        if self.rows.size == 1:
            return own
        return _Whole.apply(own, mean_figures(own, share, self))

    def any(self, latents: Bool[Tensor, " d_sae"]) -> Bool[Tensor, " d_sae"]:
        """Which latents any process of the axis of rows marks."""
        if self.rows.size == 1:
            return latents
        found = latents.int()
        self.rows.reduce([found], dist.ReduceOp.MAX)
        return found > 0

    def smallest(self, scores: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The smallest of all processes' scores above 0; inf without any."""
        found = scores.masked_fill(scores <= 0, torch.inf).min()
        self.world.reduce([found], dist.ReduceOp.MIN)
        return found

    def largest(self, number: int) -> int:
        """The largest of a number that every process has."""
        if self.alone:
            return int(number)
        found = torch.tensor(int(number), device=_device())
        self.world.reduce([found], dist.ReduceOp.MAX)
        return int(found)

    def holds_for_any(self, condition: Bool[Tensor, ""]) -> bool:
        """Whether it holds in any process; the host waits for it."""
        largest = condition.int()
        self.world.reduce([largest], dist.ReduceOp.MAX)
        return bool(largest)

    def require_same(self, number: int, what: str) -> None:
        """Refuse to go on when the processes do not agree on a number.

        Raises:
            RankError: If they do not.
        """
        most, least = self.largest(number), -self.largest(-number)
        if most != least:
            raise RankError(
                f"{what} must be the same for all ranks, got {least} to {most}; do all of them "
                "see the same directories?"
            )


ALONE = Ranks()


class GlobalBatch(NamedTuple):
    """A batch as all processes together see it."""

    n_rows: int
    """Its rows, on all processes."""
    share: float
    """This process's part of them."""
    variance: Float[Tensor, ""]
    """Mean over rows of ||v - mean||^2, the mean per dimension over the whole batch."""


def batch_of(v: Float[Tensor, "batch d_out"], ranks: Ranks) -> GlobalBatch:
    """Count the rows of all processes and measure their spread."""
    if ranks.rows.size == 1:
        return GlobalBatch(len(v), 1.0, batch_variance(v))
    total = torch.cat([v.sum(dim=0).double(), v.new_tensor([len(v)]).double()])
    ranks.rows.sum_(total)
    n_rows = int(total[-1])
    spread = (v - (total[:-1] / n_rows).to(v.dtype)).square().sum()
    ranks.rows.sum_(spread)
    return GlobalBatch(n_rows, len(v) / n_rows, spread / n_rows)


def mean_figures(
    figures: Float[Tensor, "*figure"], share: float, ranks: Ranks
) -> Float[Tensor, "*figure"]:
    """Means over all rows of means over each process's `share` of them."""
    whole = figures.detach() * share
    ranks.rows.sum_(whole)
    return whole


def _device() -> torch.device:
    """Where the collectives of this process take their tensors."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda" if on_gpu else "cpu")


def connect(latent_shards: int = 1, mesh: DeviceMesh | None = None) -> Ranks:
    """Lay the processes of torch's process group out as a mesh; alone if there is none.

    Neighbours in rank hold the parts of one dictionary, because they talk most.

    Args:
        latent_shards: Processes that share one dictionary.
        mesh: One that is there, of rows and latents in this order.

    Raises:
        ValueError: If their number is not a multiple of `latent_shards`, or the mesh has another.
    """
    if mesh is not None:
        shards = mesh.size(1)
        if latent_shards not in (1, shards):
            raise MonosemaError(
                f"latent_shards must be the second size of the device mesh, {shards}, got "
                f"{latent_shards}; leave it out"
            )
        latent_shards = shards
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size % latent_shards != 0:
        raise MonosemaError(
            f"latent_shards must divide the number of processes, {size}, got {latent_shards}; "
            "start as many processes as shards, or a multiple of that"
        )
    if size == 1:
        return ALONE
    shape = (size // latent_shards, latent_shards)
    names = ("rows", "latents")
    mesh = mesh or init_device_mesh(_device().type, shape, mesh_dim_names=names)
    return Ranks(
        _axis(mesh.get_group(0)) if shape[0] > 1 else _ONE,
        _axis(mesh.get_group(1)) if shape[1] > 1 else _ONE,
        Axis(None, dist.get_rank(), size),
    )


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))


PIECE_BYTES = 1 << 28
"""Tensors are gathered in pieces of at most so many bytes."""
LATENT_MAJOR = frozenset((
    *("enc_rows", "dec_rows", "silent_rows"),
    *(name for kind in KINDS.values() for name in kind.facts.parameters),
))
"""Names of what has one row per latent; what belongs to it is named `x.NAME.y`."""


def of_latents(name: str, tensor: Shaped[Tensor, "..."]) -> bool:
    """Tell whether a tensor has one row per latent, by its dotted name."""
    return tensor.dim() > 0 and not LATENT_MAJOR.isdisjoint(name.split("."))


def whole_state(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The state of the whole dictionary; only the first process gets it right.

    Where others hold parts of it, it is a copy on the CPU.
    """
    if ranks.latents.size == 1:
        return state
    here = {n: t.to("cpu", copy=True) for n, t in state.items() if not of_latents(n, t)}
    return {n: here[n] if n in here else _joined(t, ranks) for n, t in state.items()}


def own_state(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This process's part of the state of a whole dictionary."""
    axis = ranks.latents
    return {n: t[axis.share(len(t))] if of_latents(n, t) else t for n, t in state.items()}


def part_of(autoencoder: SparseAutoencoder, axis: Axis) -> SparseAutoencoder:
    """A dictionary with this process's latents; itself where they are not split."""
    if axis.size == 1:
        return autoencoder
    form = autoencoder.config
    n, activation = form.d_sae // axis.size, form.activation
    activation = with_k(activation, min(activation.per_row or 1, n))  # more cannot fire here
    part = SparseAutoencoder(replace(form, d_sae=n, activation=activation))
    state = autoencoder.state_dict()
    own = {name: t[axis.share(len(t))] if of_latents(name, t) else t for name, t in state.items()}
    part.load_state_dict(own)
    return part.to(autoencoder.enc_rows.device)


def whole_of(part: SparseAutoencoder, form: SAEConfig, ranks: Ranks) -> SparseAutoencoder:
    """The dictionary of which this is a part, on the CPU; only the first process gets it right."""
    state = whole_state(part.state_dict(), ranks)
    if not ranks.is_first:
        return part
    whole = SparseAutoencoder(form)
    whole.load_state_dict(state)
    return whole


def _joined(part: Shaped[Tensor, "row ..."], ranks: Ranks) -> Shaped[Tensor, "whole ..."]:
    """Put the parts of all latents' processes behind each other, piece by piece."""
    row_bytes = max(part[:1].numel() * part.element_size() * ranks.latents.size, 1)
    pieces = part.split(max(PIECE_BYTES // row_bytes, 1))
    gathered = (ranks.latents.gather(piece) for piece in pieces)
    if not ranks.is_first:
        for _ in gathered:  # the others take part and keep nothing
            pass
        return part
    return torch.cat([found.cpu() for found in gathered], dim=1).flatten(0, 1)

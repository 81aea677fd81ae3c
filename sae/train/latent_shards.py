"""What has one row per latent, and how it is added up, split and joined over the ranks."""

from dataclasses import replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sae.architecture import KINDS, SAEConfig, with_k
from sae.autoencoder import SparseAutoencoder
from sae.train.ranks import Axis, Ranks

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


def sum_gradients(params: dict[str, torch.nn.Parameter], ranks: Ranks) -> None:
    """Add up the gradients: those of latents over the rows' processes, the others over all."""
    own, shared = [], []
    for name, parameter in params.items():
        if parameter.grad is None and ranks.latents.size > 1:
            parameter.grad = torch.zeros_like(parameter)  # it may have one in other processes
        if parameter.grad is not None:
            (own if of_latents(name, parameter) else shared).append(parameter.grad)
    ranks.rows.sum_(*own)
    ranks.world.sum_(*shared)


def gradient_norm(params: dict[str, torch.nn.Parameter], ranks: Ranks) -> Float[Tensor, ""]:
    """Norm of all gradients together, each latent's counted once."""
    found = {name: p for name, p in params.items() if p.grad is not None}
    if ranks.latents.size == 1:
        return torch.nn.utils.get_total_norm([p.grad for p in found.values() if p.grad is not None])
    own, shared = [], []
    for name, parameter in found.items():
        (own if of_latents(name, parameter) else shared).append(parameter.grad)
    square = torch.nn.utils.get_total_norm(own).square()
    ranks.latents.sum_(square)
    return (square + torch.nn.utils.get_total_norm(shared).square()).sqrt()


def whole_state(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The state of the whole dictionary, on the CPU; only the first process gets it right."""
    if ranks.latents.size == 1:
        return state
    return {n: _joined(t, ranks) if of_latents(n, t) else t.cpu() for n, t in state.items()}


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

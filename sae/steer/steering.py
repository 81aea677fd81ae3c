"""`steering`: a context in which a model runs with some latents of a dictionary changed."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations_cache.hooks import Edit, edit
from sae.autoencoder import SparseAutoencoder
from sae.metrics import Firing
from sae.steer.config import Ablate, Add, Clamp, Operation, Scale


@contextlib.contextmanager
def steering(
    model: nn.Module,
    hook_point: str,
    dictionary: SparseAutoencoder,
    operations: Sequence[Operation],
    *,
    stats: Firing | None = None,
    first_position: int = 1,
) -> Iterator[None]:
    """Change latents in every forward of the model inside this context, `generate` included.

    At each position h' = h + sum_i (g_i(f_i) - f_i) d_i in float32, where f are the activations of
    h, d_i = `dictionary.direction(i)`, and g_i the operations; the result is cast back to the
    model's dtype. So what the dictionary does not reconstruct is kept, and where no g_i changes
    its latent the stream is kept to the bit.

    Args:
        model: The model, in evaluation mode.
        hook_point: The place whose stream the dictionary was trained on.
        dictionary: On the model's device.
        operations: At most one for each latent.
        stats: Needed for values in units of a latent's maximum; `Firing.read` reads them from the
            dictionary's directory.
        first_position: Positions below this one are left as they are. By default that is the
            first token, an attention sink; the length of a prompt steers only what follows it.

    Raises:
        ValueError: If a latent does not exist or is named twice, or a unit is not known.
    """
    fn = steered_stream(dictionary, operations, stats=stats, first_position=first_position)
    with edit(model, {hook_point: fn}):
        yield


def steered_stream(
    dictionary: SparseAutoencoder,
    operations: Sequence[Operation],
    *,
    stats: Firing | None = None,
    first_position: int = 1,
) -> Edit:
    """The function of the stream and the positions that `steering` applies; same arguments."""
    _check(dictionary, operations)
    values = [_value(operation, dictionary, stats) for operation in operations]
    numbers = [operation.latent for operation in operations]

    @torch.no_grad()
    def fn(
        stream: Float[Tensor, "example pos d_model"], positions: Int[Tensor, "example pos"]
    ) -> Float[Tensor, "example pos d_model"]:
        h = stream.flatten(0, 1).float()
        latents = torch.tensor(numbers, device=h.device)
        f = activations_of(dictionary, h, latents)
        pairs = zip(operations, values, f.unbind(dim=1), strict=True)
        g = [_operate(operation, value, own) for operation, value, own in pairs]
        change = torch.stack(g, dim=1) - f
        change *= positions.reshape(-1, 1) >= first_position
        directions = dictionary.directions[latents]
        moved = change @ directions * dictionary.token_norm(h).size
        edited = (h + moved).to(stream.dtype).view(stream.shape)
        untouched = (change == 0).all(dim=1).view(*stream.shape[:2], 1)
        return torch.where(untouched, stream, edited)

    return fn


def each(edits: Sequence[Edit]) -> Edit:
    """One function for a batch of which each example is edited by its own."""

    def fn(
        stream: Float[Tensor, "example pos d_model"], positions: Int[Tensor, "example pos"]
    ) -> Float[Tensor, "example pos d_model"]:
        pairs = zip(edits, stream.split(1), positions.split(1), strict=True)
        return torch.cat([own(one, at) for own, one, at in pairs])

    return fn


def activations_of(
    dictionary: SparseAutoencoder,
    x: Float[Tensor, "batch d_in"],
    latents: Int[Tensor, " k"],
) -> Float[Tensor, "batch k"]:
    """Activations of a few latents, 0 where one does not fire."""
    encoded = dictionary.encode(x)
    found = encoded.indices[:, :, None] == latents
    return (encoded.values[:, :, None] * found).sum(dim=1)


def _operate(
    operation: Operation, value: float, f: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    match operation:
        case Clamp():
            return torch.full_like(f, value)
        case Add():
            return f + value
        case Scale():
            return f * value
        case Ablate():
            return torch.zeros_like(f)
        case _:
            assert_never(operation)


def _value(operation: Operation, dictionary: SparseAutoencoder, stats: Firing | None) -> float:
    """The number of an operation in the dictionary's units."""
    match operation:
        case Clamp(unit="max") | Add(unit="max"):
            return operation.value * _maximum(operation.latent, dictionary, stats)
        case Clamp() | Add():
            return float(operation.value)
        case Scale():
            return float(operation.factor)
        case Ablate():
            return 0.0
        case _:
            assert_never(operation)


def _maximum(latent: int, dictionary: SparseAutoencoder, stats: Firing | None) -> float:
    if stats is None:
        raise ValueError(
            "stats must be given for a value in units of a latent's maximum, got None; "
            "run `sae evaluate`, which writes them beside the dictionary, or use unit='absolute'"
        )
    d_sae = dictionary.config.d_sae
    if len(stats.max_activation) != d_sae:
        raise ValueError(
            f"stats must be of a dictionary with d_sae={d_sae}, got {len(stats.max_activation)}"
        )
    maximum = float(stats.max_activation[latent])
    if maximum == 0:
        raise ValueError(
            f"latent {latent} must have fired for a value in units of its maximum, got a latent "
            f"that was silent in {stats.n_rows:,} rows; use unit='absolute'"
        )
    return maximum


def _check(dictionary: SparseAutoencoder, operations: Sequence[Operation]) -> None:
    if not operations:
        raise ValueError("operations must name at least one latent, got none")
    numbers = [operation.latent for operation in operations]
    if max(numbers) >= dictionary.config.d_sae:
        raise ValueError(
            f"latent must be below d_sae={dictionary.config.d_sae}, got {max(numbers)}"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"operations must name a latent once, got {sorted(numbers)}")
    if dictionary.config.d_in != dictionary.config.width_out:
        raise ValueError(
            f"d_out must be d_in={dictionary.config.d_in} to steer the stream that is read, "
            f"got {dictionary.config.width_out}"
        )

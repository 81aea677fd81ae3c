"""The choice of backend, the argument checks and the sorted entries that the ops share."""

import logging
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sae_kernels import blocks

Backend = Literal["reference", "torch", "triton"]

logger = logging.getLogger(__name__)


class KernelError(ValueError):
    """Arguments that an op cannot take."""


class WeightGrads(NamedTuple):
    """Gradients of both weight matrices and of the encoder bias, and how often each latent fired.

    The gradients are float32, or float64 for float64 input.
    """

    dec_rows: Float[Tensor, "d_sae d_out"]
    enc_rows: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    n_fired: Int[Tensor, " d_sae"]


def workspace(device: torch.device, on_cpu: int) -> int:
    """Say how many bytes are worked on at a time: what a CPU's caches like, or a GPU's many."""
    return on_cpu if device.type == "cpu" else blocks.WORKSPACE_BYTES


def on_device(
    numbers: Sequence[int] | Sequence[float], device: torch.device
) -> Shaped[Tensor, " number"]:
    """Put some numbers on a device, filled in there: a copy from the host would wait for it."""
    dtype = torch.int64 if isinstance(numbers[0], int) else torch.float64
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype)
    return torch.cat([torch.full((1,), number, dtype=dtype, device=device) for number in numbers])


class Segments(NamedTuple):
    """The entries of sparse latents in the order of their latents, and the batch row of each."""

    latents: Int[Tensor, " entry"]
    entries: Int[Tensor, " entry"]
    rows: Int[Tensor, " entry"]
    lengths: Int[Tensor, " d_sae"]
    starts: Int[Tensor, " d_sae"]


def counts(
    numbers: Int[Tensor, "..."], n: int, counted: Bool[Tensor, "..."] | None = None
) -> Int[Tensor, " n"]:
    """Count how often each number below n occurs; `torch.bincount` would wait for the device."""
    flat = numbers.flatten().long()
    ones = torch.ones_like(flat) if counted is None else counted.flatten().long()
    return flat.new_zeros(n).scatter_add_(0, flat, ones)


class Entries:
    """Which latent each entry of a batch names; they are sorted once, when first asked for.

    `indices` is (batch, k), or (entry,) with `row_ptr`, where row n has the entries
    `row_ptr[n]:row_ptr[n + 1]`.
    """

    def __init__(
        self,
        indices: Int[Tensor, "batch k"] | Int[Tensor, " entry"],
        d_sae: int,
        row_ptr: Int[Tensor, " bound"] | None = None,
    ) -> None:
        """Take the indices as they are; nothing is computed yet."""
        self.indices = indices
        self.d_sae = d_sae
        self.row_ptr = row_ptr

    @cached_property
    def segments(self) -> Segments:
        """The entries by latent; those of one latent stay in the order of the batch."""
        flat = self.indices.flatten()
        # int32 halves the passes of the radix sort
        latents, order = torch.sort(flat.int(), stable=True)
        lengths = counts(flat, self.d_sae)
        if self.row_ptr is None:
            rows = order // max(1, self.indices.shape[1])
        else:
            rows = rows_of(self.row_ptr, len(flat))[order]
        return Segments(latents, order, rows, lengths, lengths.cumsum(0) - lengths)


def rows_of(row_ptr: Int[Tensor, " bound"], n_entries: int) -> Int[Tensor, " entry"]:
    """Name the batch row of each entry."""
    batch = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    return batch.repeat_interleave(row_ptr.diff(), output_size=n_entries)


def _interprets() -> bool:
    """Tell whether Triton runs its kernels on the CPU, in its interpreter."""
    if find_spec("triton") is None:
        return False
    from sae_kernels.decode_triton import interprets

    return interprets()


@cache
def _has_kernels(device: torch.device) -> bool:
    """Tell whether a GPU runs the kernels; of one that does not it is said once."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is not None and capability >= (8, 0):
        return True
    logger.warning(
        "%s (%s, compute capability %d.%d) must be an NVIDIA GPU of 8.0 or newer for the kernels; "
        "torch's operations take their place",
        torch.cuda.get_device_name(device),
        device,
        *capability,
    )
    return False


def _check_triton(device: str, dtype: torch.dtype) -> None:
    """Refuse tensors that no Triton kernel here can take."""
    if dtype == torch.float64:
        raise KernelError(
            "backend 'triton' must get tensors of at most 32 bits, got torch.float64; "
            "use backend='torch'"
        )
    if device == "cuda" and find_spec("triton") is None:
        raise KernelError("backend 'triton' must have the package triton, which is not installed")
    if device != "cuda" and not _interprets():
        raise KernelError(
            f"backend 'triton' must get CUDA tensors, got {device}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before the first import of triton to run the kernels in its "
            "interpreter"
        )


def choose(tensor: Shaped[Tensor, "..."], backend: str | None) -> Backend:
    """Name the backend that runs an op on `tensor`; `None` asks for the fastest one there.

    That is "triton" for CUDA tensors of at most 32 bits where triton is installed and the GPU runs
    the kernels, else "torch".

    Raises:
        ValueError: if `backend` names none that exists, or one that cannot take `tensor`.
    """
    if backend is None:
        fits = tensor.is_cuda and tensor.dtype != torch.float64 and find_spec("triton") is not None
        return "triton" if fits and _has_kernels(tensor.device) else "torch"
    for name in get_args(Backend):
        if backend == name:
            if name == "triton":
                _check_triton(tensor.device.type, tensor.dtype)
            return name
    names = ", ".join(repr(name) for name in get_args(Backend))
    raise KernelError(
        f"backend must be one of {names} on {tensor.device.type}, got {backend!r}; "
        "leave it out for the fastest one"
    )


def check_k(k: int, d_sae: int) -> None:
    """Refuse a number of latents that no row of `d_sae` latents has."""
    if not 1 <= k <= d_sae:
        raise KernelError(f"k must lie between 1 and d_sae={d_sae}, got {k}")


def check_floating(**tensors: Shaped[Tensor, "..."] | None) -> None:
    """Refuse tensors that are not floating point, or that differ in dtype, device or kind."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, model = next(iter(present.items()))
    for name, tensor in present.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != model.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {model.dtype}, got {tensor.dtype}"
            )
        if tensor.device != model.device:
            raise KernelError(
                f"{name} must be on the device of {first}, {model.device}, got {tensor.device}"
            )


def check_shape(name: str, tensor: Shaped[Tensor, "..."] | None, *expected: int | None) -> None:
    """Refuse a tensor whose shape differs from `expected` (`None` stands for any length)."""
    if tensor is None:
        return
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise KernelError(f"{name} must have the shape ({wanted}), got {shape}")


def check_indices(indices: Shaped[Tensor, "..."], d_sae: int) -> None:
    """Refuse indices that are no integers or, on CPU, that name no latent.

    The range is not read on other devices, where reading it would stall the device.
    """
    if indices.dtype.is_floating_point or indices.dtype in {torch.bool, torch.complex64}:
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if indices.device.type == "cpu" and indices.numel():
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= d_sae:
            raise KernelError(
                f"indices must lie in 0..{d_sae - 1}, got values from {low} to {high}"
            )

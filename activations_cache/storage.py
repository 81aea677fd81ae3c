"""How rows are held on the disk: number formats, the 8-bit one with its scales, compression."""

import importlib
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

STORAGE: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "uint16"),  # Zarr's readers agree on no bfloat16
    "float16": (torch.float16, "float16"),
    "float32": (torch.float32, "float32"),
    "int8": (torch.float32, "int8"),  # torch holds what will be read: number times scale
}
"""For each dtype of a cache: how torch holds a row, and how the file names its numbers."""

ZSTD_LEVEL = 3
"""Higher levels save under 1 % more of bfloat16 residuals, at several times the time."""

_STEPS = 127
_SPARE_BITS = 0xFF  # of float32's mantissa: what a product with 7 bits needs to be exact


def has_scale(dtype: str) -> bool:
    """Say whether rows of a dtype are numbers times a scale of the row."""
    return dtype == "int8"


def as_read(rows: Float[Tensor, "row d_model"], dtype: str) -> Float[Tensor, "row d_model"]:
    """Round rows to what a cache of this dtype will give back.

    Returns:
        The rows in the dtype of STORAGE. Rounding a second time changes no bit.
    """
    if not has_scale(dtype):
        return rows.to(STORAGE[dtype][0])
    scale = scale_of(rows)
    return torch.round(rows.float() / scale[:, None]) * scale[:, None]


def scale_of(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
    """Return each row's scale: its largest magnitude / 127, rounded up to 16 bits of mantissa.

    With the low bits free, number times scale is exact in float32, so a row that was read and is
    stored again keeps its bits.
    """
    largest = rows.float().abs().amax(dim=1).clamp_min(_STEPS * torch.finfo(torch.float32).tiny)
    bits = (largest / _STEPS).view(torch.int32)
    return ((bits + _SPARE_BITS) & ~_SPARE_BITS).view(torch.float32)


def as_stored(rows: Float[Tensor, "row d_model"], dtype: str) -> dict[str, np.ndarray]:
    """Return the arrays `acts` and, for int8, `scale` of rows that `as_read` gave."""
    if has_scale(dtype):
        scale = scale_of(rows)
        return {
            "acts": torch.round(rows / scale[:, None]).to(torch.int8).numpy(),
            "scale": scale.numpy(),
        }
    if dtype == "bfloat16":
        return {"acts": rows.view(torch.int16).numpy().view(np.uint16)}
    return {"acts": rows.numpy()}


def read_into(
    found: Float[Tensor, "row d_model"],
    acts: Shaped[np.ndarray, "row d_model"],
    scale: Shaped[np.ndarray, " row"] | None,
    dtype: str,
) -> None:
    """Write stored rows as float32 into `found`; `as_stored` in reverse.

    With NumPy, which stays in its thread: torch's ones would get in the way of the training step.
    """
    rows = found.numpy()
    if dtype == "bfloat16":  # the upper half of a float32
        bits = rows.view(np.uint32)
        np.copyto(bits, acts)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(rows, acts)
    if scale is not None:
        np.multiply(rows, scale[:, None], out=rows)


def compress(data: np.ndarray) -> bytes:
    """Return an array's bytes as one Zstandard frame."""
    return bytes(
        _zstd().compress(np.ascontiguousarray(data).reshape(-1).view(np.uint8), ZSTD_LEVEL)
    )


def decompress(data: np.ndarray) -> bytes:
    """Return the bytes of a Zstandard frame.

    Raises:
        ValueError: If it is none.
    """
    try:
        return bytes(_zstd().decompress(data))
    except RuntimeError as error:
        raise ValueError(f"a compressed chunk must be one Zstandard frame, got {error}") from error


def _zstd() -> ModuleType:
    """Return the module that comes with zarr; it is slow to import, and rarely needed."""
    return importlib.import_module("numcodecs.zstd")

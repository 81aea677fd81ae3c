"""sae.load: find out which format a path has, and read it."""

import json
from pathlib import Path

import torch

from sae.autoencoder import SparseAutoencoder
from sae.pretrained import own


def load(
    path: str | Path,
    format: str | None = None,
    allow_pt: bool = False,
    device: str | torch.device | None = None,
    latents: slice | None = None,
) -> SparseAutoencoder:
    """Load a dictionary into the one canonical form, in fp32.

    Args:
        path: A dictionary directory.
        format: Force a format instead of recognising it; 'monosema' is the one there is so far.
        allow_pt: Would permit pickled weights; no format that needs it is read yet.
        device: Where the weights go; the CPU when absent.
        latents: Read this slice of the latents only. Under TopK its rows then compete among
            themselves alone, so use it to look at directions, not to encode.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        DictionaryFormatError: If it is not a whole dictionary of a known format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"a dictionary must be at {path}, got nothing there")
    if allow_pt:
        raise ValueError("allow_pt must be False, got True: no pickled format is read yet")
    found = format or _recognise(path)
    if found != own.FORMAT:
        raise own.DictionaryFormatError(
            f"format must be {own.FORMAT!r}, got {found!r} for {path}; other formats are not "
            "read yet"
        )
    return own.read(path, latents).to(device)


def _recognise(path: Path) -> str:
    config = path / own.CONFIG
    if not config.is_file():
        raise own.DictionaryFormatError(
            f"{path} must be a dictionary directory with {own.CONFIG}, got none"
        )
    if config.stat().st_size > own.MAX_CONFIG_BYTES:
        raise own.DictionaryFormatError(f"{config} must be at most 1 MiB, got more")
    try:
        record = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise own.DictionaryFormatError(f"{config} must be readable JSON, got: {error}") from error
    if not isinstance(record, dict) or "format" not in record:
        raise own.DictionaryFormatError(f"{config} must name its format, got no key 'format'")
    return str(record["format"])

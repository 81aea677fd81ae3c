"""sae.load: find out which format a path has, and read it.

A cross-layer transcoder on disk: a directory with one dictionary directory per source.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from activations_cache import io
from sae.autoencoder import SparseAutoencoder
from sae.cross_layer import CrossLayerTranscoder
from sae.metrics import STATS, Firing
from sae.pretrained import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_layer,
    goodfire,
    hub,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    monosema_format,
    msae,
    openai,
    overcomplete,
    qwen_scope,
    saelens,
    saev,
    sparsify,
    vit_prisma,
)
from sae.pretrained.canonical import Reading, Source, assemble
from sae.pretrained.fields import DictionaryFormatError
from sae.pretrained.files import PICKLED, Files
from sae.pretrained.monosema_format import PROVENANCE, save

FORMATS: dict[str, ModuleType] = {
    module.FORMAT: module
    for module in (
        monosema_format, saelens,
        gemma_scope, gemma_scope_layer, sparsify, dictionary_learning, openai,
        llama_scope, llama_scope_r1, llamascopium, goodfire, qwen_scope, circuit_tracer,
        vit_prisma, saev, overcomplete, msae,
    )
}  # fmt: skip
"""Name -> the module that reads it; each has `fits(files)` and `read(files)`."""


class Loaded(NamedTuple):
    """A dictionary, and where it comes from."""

    dictionary: SparseAutoencoder
    """In the one canonical form."""
    source: Source
    """Format, hashes and folds: for the provenance of whatever is made of it."""


def load(
    path: str | Path,
    format: str | None = None,
    allow_pt: bool = False,
    device: str | torch.device | None = None,
    latents: int | slice | None = None,
) -> SparseAutoencoder:
    """Load a dictionary into the one canonical form, in fp32.

    Args:
        path: A dictionary directory, one of its files, or as a text the name of a hub repository,
            `org/name[/subfolder][@revision]`.
        format: Name the format instead of recognising it; one of the keys of `FORMATS`.
        allow_pt: Permit pickled weights; they are read by a confined process.
        device: Where the weights go; the CPU when absent.
        latents: Take one latent or a slice of them; of a safetensors file only their rows are
            read. Under TopK they then compete among themselves alone, so use it to look at
            directions, not to encode.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        DictionaryFormatError: If it is not a whole dictionary of a known format, or if it can be
            read in two ways.
    """
    files, found = _found(path, format, allow_pt, latents)
    dictionary, reading = _assembled(files, found)
    _describe(dictionary, files, found, reading)
    return dictionary.to(device)


def load_with_source(
    path: str | Path,
    format: str | None = None,
    allow_pt: bool = False,
    device: str | torch.device | None = None,
    latents: int | slice | None = None,
) -> Loaded:
    """Load a dictionary as `load` does, and say what it was read from and what was folded."""
    files, found = _found(path, format, allow_pt, latents)
    dictionary, reading = _assembled(files, found)
    source = Source(
        source_format=found,
        source_path=hub.name_of(path, files.path),
        source_sha256=files.sha256,
        folds_applied=reading.folds,
        site=reading.site,
        checked_against=FORMATS[found].CHECKED_AGAINST,
    )
    _describe(dictionary, files, found, reading)
    return Loaded(dictionary.to(device), source)


IDENTITY = ("model_sha256", "config_sha256", "tokenizer_sha256", "model")
"""What must agree between the model that a dictionary was trained on and the one it is put into."""


def require_model(dictionary: SparseAutoencoder, identity: Mapping[str, str]) -> None:
    """Check that a loaded model is the one that a dictionary was trained on.

    Args:
        dictionary: As `load` gives it.
        identity: As `LoadedModel.identity` has it; only what both know is compared.

    Raises:
        ValueError: If it is another model.
    """
    known = dictionary.provenance.get("model", {})
    for key in IDENTITY:
        if key in known and key in identity and known[key] != identity[key]:
            raise ValueError(
                f"the model must be the one that the dictionary was trained on, with {key} "
                f"{known[key]}, got {identity[key]}"
            )


def _describe(dictionary: SparseAutoencoder, files: Files, found: str, reading: Reading) -> None:
    """Give a dictionary what lies beside its weights: provenance, hook point and statistics."""
    record = files.json(PROVENANCE) if files.has(PROVENANCE) else {}
    source = {"source_format": found, "source_path": str(files.path), "site": reading.site}
    dictionary.provenance = {"source": source, **record}
    point = record.get("hook_point")
    if isinstance(point, str) and not dictionary.config.inputs:
        dictionary.at(point)
    if files.latents is None and files.path.is_dir():
        dictionary.stats = partial(_stats_in, files.root)


def _stats_in(directory: Path) -> Firing | None:
    return Firing.read(directory) if (directory / STATS).is_file() else None


def _found(
    path: str | Path, format: str | None, allow_pt: bool, latents: int | slice | None
) -> tuple[Files, str]:
    where = hub.located(path, allow_pt=allow_pt)
    files = Files(where, allow_pt=allow_pt, is_named=format is not None, latents=latents)
    return files, _named(format) if format else _recognised(files)


class Readings(NamedTuple):
    """The ways in which a release may be meant."""

    dictionaries: dict[str, SparseAutoencoder]
    """Name of the reading -> the dictionary so read."""
    format: str
    """Name of the format."""
    site: dict[str, str]
    """What the files say of the model, as in Source."""


def load_readings(path: str | Path, format: str | None = None, allow_pt: bool = False) -> Readings:
    """Load every way in which a release may be meant.

    Most formats have one; `sae.pretrained.verify` tells by figures which is right.
    """
    files, found = _found(path, format, allow_pt, None)
    module = FORMATS[found]
    with _naming(files.path, found):
        several = hasattr(module, "readings")
        readings = module.readings(files) if several else {"as loaded": module.read(files)}
        dictionaries = {name: assemble(reading) for name, reading in readings.items()}
    return Readings(dictionaries, found, next(iter(readings.values())).site)


def _assembled(files: Files, found: str) -> tuple[SparseAutoencoder, Reading]:
    with _naming(files.path, found):
        reading = FORMATS[found].read(files)
        return assemble(reading, files.latents), reading


@contextmanager
def _naming(where: Path, found: str) -> Iterator[None]:
    """Name the path and the format in what a reader refuses."""
    try:
        yield
    except DictionaryFormatError as error:
        at = "" if str(where) in str(error) else f"{where}, read as {found}: "
        raise DictionaryFormatError(f"{at}{error}") from error
    except ValueError as error:
        raise DictionaryFormatError(
            f"{where} must describe a dictionary of format {found}, got: {error}"
        ) from error


def _named(format: str) -> str:
    if format not in FORMATS:
        raise DictionaryFormatError(f"format must be one of {list(FORMATS)}, got {format!r}")
    return format


def _recognised(files: Files) -> str:
    fitting = [name for name, module in FORMATS.items() if module.fits(files)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DictionaryFormatError(
            f"{files.path} must be readable in one way, got {len(fitting)}: {fitting}; name the "
            "right one by format="
        )
    if files.path.suffix in PICKLED and not files.allow_pt:
        files.pickled(files.path.name)
    names = sorted(p.name for p in files.path.iterdir())[:9] if files.path.is_dir() else "one file"
    raise DictionaryFormatError(
        f"{files.path} must be a dictionary directory with {monosema_format.CONFIG} and "
        f"{monosema_format.WEIGHTS}, or the files of one of {list(FORMATS)[1:]}, got {names}; "
        "name the format by format="
    )


LIST = "cross_layer.json"


def save_cross_layer(
    transcoder: CrossLayerTranscoder,
    path: str | Path,
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write `source-N` for each source, and last the list of them."""
    path = Path(path)
    names = [f"source-{layer:03d}" for layer in range(len(transcoder.autoencoders))]
    for name, source in zip(names, transcoder.autoencoders, strict=True):
        save(source, path / name, provenance)
    io.write_files({path / LIST: (json.dumps({"sources": names}) + "\n").encode()})
    return path


def load_cross_layer(path: str | Path) -> CrossLayerTranscoder:
    """Read what `save_cross_layer` wrote.

    Raises:
        DictionaryFormatError: If the list or a source is missing or damaged, or the sources do not
            fit each other.
    """
    path = Path(path)
    try:
        names = json.loads((path / LIST).read_text())["sources"]
        whole = [f"source-{layer:03d}" for layer in range(len(names))]
        if not names or names != whole:
            raise ValueError(f"sources must be {whole}, got {names}")
        return CrossLayerTranscoder([load(path / name) for name in names])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DictionaryFormatError(
            f"{path} must be a cross-layer transcoder, got: {error}"
        ) from error

"""sae.load: find out which format a path has, and read it.

A cross-layer transcoder on disk: a directory with one dictionary directory per source.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from activations_cache import seals
from monosema.checks import MonosemaError
from sae.autoencoder import SparseAutoencoder
from sae.cross_layer import CrossLayerTranscoder
from sae.metrics import Firing, stats_file
from sae.pretrained import (
    catalogue,
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
from sae.pretrained.canonical import Reading, Source, assemble, weights_sha256
from sae.pretrained.catalogue import Entry
from sae.pretrained.files import PICKLED, Files, Stated, parse_json
from sae.pretrained.foreign import DictionaryFormatError
from sae.pretrained.monosema_format import save
from sae.pretrained.origin import Origin, origin_of
from sae.read_out import READ_OUTS, ReadOut, ReadOutName

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
    origin: Origin
    """Where it was trained, as far as its files say."""


def load(
    path: str | Path,
    format: str | None = None,
    allow_pt: bool = False,
    device: str | torch.device | None = None,
    latents: int | slice | None = None,
    *,
    id: str | None = None,
) -> SparseAutoencoder:
    """Load a dictionary into the one canonical form, in fp32.

    Args:
        path: A dictionary directory, one of its files, or as a text the name of a hub repository,
            `org/name[/subfolder][@revision]`, or of a release that `sae releases` lists,
            `RELEASE[:ID][@revision]`. A local path of that name wins.
        format: Name the format instead of recognising it; one of the keys of `FORMATS`.
        allow_pt: Permit pickled weights; they are read by a confined process.
        device: Where the weights go; the CPU when absent.
        latents: Take one latent or a slice of them; of a safetensors file only their rows are
            read. Under TopK they then compete among themselves alone, so use it to look at
            directions, not to encode.
        id: Which dictionary of a release, or which folder of a repository.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        DictionaryFormatError: If it is not a whole dictionary of a known format, or if it can be
            read in two ways.
    """
    found = _found(path, format, allow_pt, latents, id)
    dictionary, reading = _assembled(found)
    hub.require_as_before(found.files)
    _describe(dictionary, found, reading)
    return dictionary.to(device)


def load_with_source(
    path: str | Path,
    format: str | None = None,
    allow_pt: bool = False,
    device: str | torch.device | None = None,
    latents: int | slice | None = None,
    *,
    id: str | None = None,
) -> Loaded:
    """Load a dictionary as `load` does, and say what it was read from and what was folded."""
    found = _found(path, format, allow_pt, latents, id)
    dictionary, reading = _assembled(found)
    hub.require_as_before(found.files)
    name = path if found.entry is None else f"{found.entry.name}"
    source = Source(
        source_format=found.format,
        source_path=hub.name_of(name, found.files.path),
        source_sha256=found.files.sha256,
        folds_applied=reading.folds,
        site=reading.site,
        checked_against=FORMATS[found.format].CHECKED_AGAINST,
    )
    origin = origin_of(dictionary.config, reading.provenance, reading.site)
    _describe(dictionary, found, reading)
    return Loaded(dictionary.to(device), source, origin)


MEASURED = "measured_on.json"
"""What an evaluation learned of a dictionary that is not ours, beside its statistics."""


def _describe(dictionary: SparseAutoencoder, found: "_DictionaryFiles", reading: Reading) -> None:
    """Give a dictionary provenance, hook point and statistics, from where they lie."""
    files, is_ours = found.files, found.format == hub.OURS
    site = reading.site
    source = {"source_format": found.format, "source_path": str(files.path), "site": site}
    record = reading.provenance
    if not is_ours:
        named = {"model": {"path": site["model_name"]}} if site.get("model_name") else {}
        record = named | _measured_on(files)
    dictionary.provenance = {"source": source, **record}
    point = record.get("hook_point")
    if isinstance(point, str) and not dictionary.config.inputs:
        dictionary.at(point)
    if (files.latents is None and files.path.is_dir()) or not is_ours:
        dictionary.read_out = partial(_read_out_of, files, is_ours)
        for read_by in READ_OUTS:
            stats = partial(_stats_of, files, is_ours, dictionary, read_by)
            dictionary.set_stats(stats, read_by)


def _measured_on(files: Files) -> dict[str, Any]:
    """What was learned of it before; nothing is hashed where nothing was ever measured."""
    if not hub.dictionaries().is_dir():
        return {}
    home = hub.dictionaries() / weights_sha256(files.sha256)
    file = home / MEASURED
    if not file.is_file():
        return {}
    record = parse_json(seals.read(file, advice=f"remove {home}"), str(file))
    return {key: record[key] for key in ("hook_point", "model") if record.get(key)}


def _home(files: Files, is_ours: bool) -> tuple[Path, str]:
    """Where what was learned of a dictionary lies, and the hash of its weights."""
    if is_ours:
        return files.root, seals.sha256(files.root / monosema_format.WEIGHTS)
    digest = weights_sha256(files.sha256)
    return hub.dictionaries() / digest, digest


def _read_out_of(files: Files, is_ours: bool) -> ReadOut | None:
    home, digest = _home(files, is_ours)
    return monosema_format.load_read_out(home, digest)


def _stats_of(
    files: Files, is_ours: bool, dictionary: SparseAutoencoder, read_by: ReadOutName
) -> Firing | None:
    home, digest = _home(files, is_ours)
    name, digest = stats_file(read_by, digest, dictionary.read_out)
    return Firing.read(home, digest, name) if (home / name).is_file() else None


def keep_measured(
    path: str | Path,
    source: Source,
    dictionary: SparseAutoencoder,
    firing: Firing,
    hook_point: str,
    model: Mapping[str, str],
) -> Path:
    """Keep what an evaluation learned of a dictionary, for steering and for the browser.

    Args:
        path: As for `load`.
        source: What it was read from.
        dictionary: The same, as it was read.
        firing: Its statistics.
        hook_point: Where it was measured.
        model: Path and dtype of the model that it was measured on.
    """
    home = hub.directory_of(path, source)
    if home != Path(path):
        record = {"source": source.source_path, "hook_point": hook_point, "model": dict(model)}
        seals.write(home, {MEASURED: (json.dumps(record, indent=1) + "\n").encode()})
    digest, read_out = source.weights_sha256, dictionary.read_out
    name, digest = stats_file(dictionary.read_by, digest, read_out)
    return firing.save(home, digest, name)


class _DictionaryFiles(NamedTuple):
    """The files of a dictionary, its format, and what the catalogue says of it."""

    files: Files
    format: str
    entry: Entry | None


def _found(
    path: str | Path,
    format: str | None,
    allow_pt: bool,
    latents: int | slice | None,
    id: str | None = None,
) -> _DictionaryFiles:
    entry, where = None, None
    if isinstance(path, str) and not Path(path).exists():
        name, _, revision = path.partition("@")
        entry = catalogue.named(name, id)
        if entry is not None:
            where = hub.located_entry(entry, revision or None, allow_pt=allow_pt)
    where = where or hub.located(path, allow_pt=allow_pt, id=id)
    format = format or (entry.format if entry else None)
    files = Files(where, allow_pt=allow_pt, is_named=format is not None, latents=latents)
    if entry is not None:
        files.stated = Stated(entry.input_scale, entry.normalize_activations, entry.is_centred)
    return _DictionaryFiles(files, _named(format) if format else _recognised(files), entry)


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
    files, found, entry = _found(path, format, allow_pt, None)
    module = FORMATS[found]
    with _naming(files.path, found):
        several = hasattr(module, "readings")
        raw = module.readings(files) if several else {"as loaded": module.read(files)}
        readings = {name: _placed(reading, entry) for name, reading in raw.items()}
        dictionaries = {name: assemble(reading) for name, reading in readings.items()}
    return Readings(dictionaries, found, next(iter(readings.values())).site)


def _assembled(found: _DictionaryFiles) -> tuple[SparseAutoencoder, Reading]:
    with _naming(found.files.path, found.format):
        reading = _placed(FORMATS[found.format].read(found.files), found.entry)
        return assemble(reading, found.files.latents), reading


def _placed(reading: Reading, entry: Entry | None) -> Reading:
    """Add hook points: the catalogue's, or those that the files have in TransformerLens' words.

    Those that a release names itself give way to the catalogue's, which knows the model's class.
    """
    site, config = reading.site, reading.config
    if entry is not None:
        read, predicted, site = entry.hook_point, entry.hook_point_out, site | entry.site
    elif config.inputs or site.get("hook_head_index", "None") != "None":
        return reading
    else:
        model = site.get("model_name", "")
        read, predicted = (
            catalogue.point_of(
                site.get(f"hook_point{side}")
                or site.get(f"hf_hook_name{side}")
                or site.get(f"hook_name{side}", ""),
                model,
            )
            for side in ("", "_out")
        )
    is_one = len(config.slices_in) == len(config.slices_out) == 1
    is_square = config.width_out == config.d_in and not config.outputs
    if not (read and is_one and (predicted or is_square)):
        return replace(reading, site=site)
    config = replace(config, inputs=(replace(config.slices_in[0], hook_point=read),))
    if predicted and predicted != read:
        outputs = (replace(config.slices_out[0], hook_point=predicted),)
        config = replace(config, outputs=outputs)
    return replace(reading, site=site, config=config)


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
    seals.write(path, {LIST: (json.dumps({"sources": names}) + "\n").encode()})
    return path


def load_cross_layer(path: str | Path) -> CrossLayerTranscoder:
    """Read what `save_cross_layer` wrote.

    Raises:
        DictionaryFormatError: If the list or a source is missing or damaged, or the sources do not
            fit each other.
    """
    path = Path(path)
    try:
        names = json.loads(seals.read(path / LIST))["sources"]
        whole = [f"source-{layer:03d}" for layer in range(len(names))]
        if not names or names != whole:
            raise MonosemaError(f"sources must be {whole}, got {names}")
        return CrossLayerTranscoder([load(path / name) for name in names])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DictionaryFormatError(
            f"{path} must be a cross-layer transcoder, got: {error}"
        ) from error

"""A GGUF file is turned once into a directory in transformers' format, then read from there.

Reading a GGUF takes several times as long as reading safetensors, and a model read so cannot be
saved. The directory lies in the user's cache under the hash of the GGUF:
`models/<sha256>/{config.json, model.safetensors, tokenizer.json, ..., manifest.json}`. It appears
under that name complete or not at all.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from activations_cache import io
from activations_cache.checks import Progress, silent
from activations_cache.loading import Refusing, quiet
from activations_cache.locations import require_reader

_MANIFEST = "manifest.json"
_WAIT_S = 1800.0

Save = Callable[[Path], None]
"""Writes what was read from a file into a directory."""

Read = Callable[[Path], Save]
"""Reads a file of another format."""

_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Return the user's cache: $MONOSEMA_CACHE, $XDG_CACHE_HOME/monosema, or ~/.cache/monosema."""
    if own := os.environ.get("MONOSEMA_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "monosema"


def converted(
    path: Path, sha256: str, *, read: Read | None = None, progress: Progress | None = None
) -> Path:
    """Return the directory with what a file holds: of a GGUF bfloat16 safetensors and tokenizer.

    The first call converts; a second process that asks meanwhile waits for it. An interrupted or
    damaged conversion is made again.

    Args:
        path: The file.
        sha256: Its hash, which names the directory.
        read: Reads the file; absent for a GGUF.
        progress: Called for each step of a conversion.

    Raises:
        ModelError: If the file cannot be read.
        MissingPackageError: If a package for reading it is missing.
    """
    models = cache_directory() / "models"
    target = models / sha256
    if is_complete(target):
        return target
    io.make_directory(models)
    with io.lock(models / f"{sha256}.lock", f"the conversion of {path.name}", wait_s=_WAIT_S):
        if not is_complete(target):
            _convert(path, target, read or _read_gguf, progress or silent)
    return target


def is_complete(directory: Path) -> bool:
    """Whether the directory holds every file of its manifest with the hash that stands there."""
    try:
        files = json.loads((directory / _MANIFEST).read_bytes())["files"]
        return all(_sha256(directory / name) == digest for name, digest in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


def _convert(path: Path, target: Path, read: Read, progress: Progress) -> None:
    _log.info("converting %s to %s, once", path.name, target)
    partial = target.with_name(f"{target.name}.partial")
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    progress(0, 3, "conversion steps")
    save = read(path)
    progress(1, 3, "conversion steps")
    io.make_directory(partial)
    save(partial)
    progress(2, 3, "conversion steps")
    _commit(partial, target)
    progress(3, 3, "conversion steps")


def _read_gguf(path: Path) -> Save:
    tokenizer, model = _read(path)

    def save(partial: Path) -> None:
        with quiet():
            tokenizer.save_pretrained(partial)
            model.save_pretrained(partial)

    return save


def _read(path: Path) -> tuple[Tokenizer, PreTrainedModel]:
    require_reader(path.name)
    refusing = Refusing(f"{path} must be a whole GGUF file", "fetch the file again")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise refusing.error(f"the first bytes {magic!r}")
    # Releases that can keep the weights packed must be told not to; older ones know no such thing.
    packed = getattr(transformers, "GgufConfig", None)
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    where = {"gguf_file": path.name, "local_files_only": True}
    with refusing, quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path.parent, dtype=torch.bfloat16, output_loading_info=True, **where, **options
        )
        if report["missing_keys"]:
            raise refusing.error(f"no weights for {min(report['missing_keys'])}")
        return tokenizer, _saveable(model)


def _saveable(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same weights in a model that knows nothing of quantisation."""
    config = model.config
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    return plain


def _commit(partial: Path, target: Path) -> None:
    names = sorted(entry.name for entry in partial.iterdir())
    for name in names:
        descriptor = io.open_file(partial / name, os.O_RDONLY)
        io.fsync(descriptor)
        os.close(descriptor)
    manifest = {"files": {name: _sha256(partial / name) for name in names}}
    io.write_files({partial / _MANIFEST: json.dumps(manifest, indent=1).encode()})
    io.rename(partial, target)
    io.sync_directory(target.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

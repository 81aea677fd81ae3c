"""Dictionaries on the Hugging Face hub: `org/name[/subfolder][@revision]`."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from activations_cache import seals
from activations_cache.conversion import cache_directory
from sae.pretrained.canonical import Source
from sae.pretrained.catalogue import Entry, suggestions
from sae.pretrained.files import Files, parse_json
from sae.pretrained.foreign import DictionaryFormatError, one_line

OURS = "monosema"
_NAME = re.compile(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)+(@[\w.\-/]+)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = (
    "config.json", "sae.safetensors", "provenance.json", "cfg.json", "sae_weights.safetensors",
    "activation_scaler.json", "params.npz", "params.safetensors", "hyperparams.json",
    "checkpoints/final.safetensors",
)  # fmt: skip
_WANTED_PICKLED = ("ae.pt", "weights.pt")
_SETTINGS = ("config.json", "overcomplete.json", "config.yaml", "wandb-config.yaml")
_FILE = re.compile(r"\.(npz|pt|pth|safetensors)$")
_log = logging.getLogger(__name__)


class Address(NamedTuple):
    """The parts of a hub name."""

    repo: str
    subfolder: str
    revision: str | None


def parsed(name: str) -> Address:
    """Take a hub name apart.

    Raises:
        FileNotFoundError: If it is neither a hub name nor, as the caller knows, a path.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise FileNotFoundError(
            f"a dictionary must be at {name}, got nothing there, and it has not the form "
            f"org/name[/subfolder][@revision] of the hub or RELEASE:ID{suggestions(name)}"
        )
    path, _, revision = name.partition("@")
    org, repo, *rest = path.split("/")
    return Address(f"{org}/{repo}", "/".join(rest), revision or None)


def located(path: str | Path, *, allow_pt: bool = False, id: str | None = None) -> Path:
    """Return a local path as it is; fetch a hub name's wanted files and return where they lie.

    Args:
        path: A path, or `org/name[/subfolder][@revision]`.
        allow_pt: Fetch pickled files as well.
        id: A folder inside it.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        DictionaryFormatError: If the hub does not give the files.
    """
    local = Path(path)
    if local.exists():
        inside = local / id if id else local
        if not inside.exists():
            raise FileNotFoundError(f"id must be a folder in {path}, got no {id!r} there")
        return inside
    if isinstance(path, Path):
        raise FileNotFoundError(f"a dictionary must be at {path}, got nothing there")
    address = parsed(path)
    if id:
        address = address._replace(subfolder=f"{address.subfolder}/{id}".lstrip("/"))
    names = _WANTED + (_WANTED_PICKLED if allow_pt else ())
    one = bool(_FILE.search(address.subfolder))
    return _fetched(address, _of_one_file(address.subfolder) if one else names, one, path)


def located_entry(entry: Entry, revision: str | None = None, *, allow_pt: bool = False) -> Path:
    """Fetch the files of a dictionary of the catalogue and return where they lie.

    Raises:
        DictionaryFormatError: If its files are pickled and that is not allowed, if nothing here
            reads them, or if the hub does not give them.
    """
    if not entry.format:
        raise DictionaryFormatError(
            f"{entry.name} must be of a format that is read here, got one without a reader; its "
            f"files are at {entry.repo}/{entry.path} on the hub"
        )
    if entry.format in _PICKLED_FORMATS and not allow_pt:
        raise DictionaryFormatError(
            f"{entry.name} must not be a pickled file, got one of {entry.format}; pass "
            f"allow_pt=True, or write it as ours by `sae convert {entry.name} TARGET --allow-pt`"
        )
    names = ("config.json", "*.pt") if entry.format == "vit_prisma" else _WANTED + _WANTED_PICKLED
    one = entry.format in _ONE_FILE
    address = Address(entry.repo, entry.path, revision)
    return _fetched(address, _of_one_file(entry.path) if one else names, one, entry.name)


_PICKLED_FORMATS = ("dictionary_learning", "qwen_scope", "goodfire", "saev", "vit_prisma", "openai")
_ONE_FILE = ("qwen_scope", "goodfire", "saev", "circuit_tracer", "openai")


def _fetched(address: Address, names: Iterable[str], one: bool, given: str) -> Path:
    """Fetch the named files of a folder, or one file and what stands beside it."""
    if address.revision is None or not _COMMIT.fullmatch(address.revision):
        _log.warning("%s names no commit: what it gives may change; add @COMMIT", given)
    prefix = f"{address.subfolder}/" if address.subfolder and not one else ""
    patterns = [prefix + name for name in names]
    try:
        root = snapshot_download(address.repo, revision=address.revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise DictionaryFormatError(_refusal(given, address, error)) from error
    result = Path(root) / address.subfolder
    if not result.exists():
        raise DictionaryFormatError(
            f"{given} must hold the files of a dictionary, got none of {patterns} in "
            f"{address.repo}; the catalogue or the name may be older than the repository: look "
            f"there, and name what is there as {address.repo}/FOLDER[@COMMIT]"
        )
    unfinished = [
        path.name for path in result.rglob("*") if path.is_symlink() and not path.exists()
    ]
    if unfinished:
        raise DictionaryFormatError(
            f"{given} must be whole, got an unfinished download without {unfinished[0]}; remove "
            f"{Path(root).parent.parent} and load it again"
        )
    return result


def _refusal(given: str, address: Address, error: Exception) -> str:
    """What the hub's client says, with what to do about it."""
    if isinstance(error, GatedRepoError):
        return (
            f"{given} must be open to you, got a gated repository {address.repo}; accept its terms "
            f"at https://huggingface.co/{address.repo} and log in by `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{given} must name a revision of {address.repo}, got {address.revision}, which is not "
            "there or has moved; name a commit of its history, or leave @ out for the newest"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{given} must be a directory, or a repository of the hub that can be fetched, got "
            f"{address.repo}, which is not there or is private; log in by `hf auth login`, or name "
            f"the new place as org/name/FOLDER{suggestions(given)}"
        )
    return (
        f"{given} must be a directory, or a repository of the hub that can be fetched, got "
        f"{one_line(error)}{suggestions(given)}"
    )


def _of_one_file(name: str) -> list[str]:
    """One file, and those beside it that tell how it is read."""
    folder, _, file = name.rpartition("/")
    others = [*_SETTINGS, file.replace("W_enc_", "W_dec_")]
    return [name, *(f"{folder}/{other}".lstrip("/") for other in others if other != file)]


def directory_of(path: str | Path, source: Source) -> Path:
    """Return where statistics of a dictionary lie: beside ours, of others in the user's cache.

    Args:
        path: As for `sae.load`.
        source: What it was read from; its hash of the weights names the directory.
    """
    if source.source_format == OURS and Path(path).is_dir():
        return Path(path)
    return dictionaries() / source.weights_sha256


def dictionaries() -> Path:
    """Where what is known of dictionaries that are not ours lies, by the hash of their weights."""
    return cache_directory() / "dictionaries"


def name_of(path: str | Path, where: Path) -> str:
    """Name the source: a path as it is, a hub name with the commit that was fetched."""
    parts = where.parts
    if str(path) == str(where) or "snapshots" not in parts:
        return str(path)
    commit = parts[parts.index("snapshots") + 1]
    return f"{str(path).partition('@')[0]}@{commit}"


def require_as_before(files: Files) -> None:
    """Refuse files of a commit that are not those that were read from there before.

    A commit never changes, so the files that were fetched, or the place they come from, did. The
    first time their SHA-256 are kept in the user's cache.

    Raises:
        DictionaryFormatError: Naming the file and both hashes.
    """
    parts = files.root.parts
    at = parts.index("snapshots") if "snapshots" in parts[1:-1] else 0
    if not at or not _COMMIT.fullmatch(parts[at + 1]) or files.latents is not None:
        return
    name, home, now = "/".join(parts[at - 1 :]), dictionaries() / "fetched", files.sha256
    record = f"{hashlib.sha256(name.encode()).hexdigest()}.json"
    before: dict[str, object] = {}
    if (home / record).is_file():
        data = seals.read(home / record, advice=f"remove {home}")
        before = parse_json(data, str(home / record))
    for file in now.keys() & before.keys():
        if now[file] != before[file]:
            raise DictionaryFormatError(
                f"{files.root / file} must be what it was when it was fetched first, sha256 "
                f"{before[file]}, got {now[file]}; remove {files.root} and load it again"
            )
    if now.keys() - before.keys():
        seals.write(home, {record: (json.dumps({**before, **now}, indent=1) + "\n").encode()})
